"""What each write direction adds to the logits directly: ``U[c] @ W_U``, without the final norm.

Of sites that write into the residual stream (W_O, W_out). Numbers are relative: the final norm scales them, and what later layers
make of the write is left out.

>>> effects = logit_effects(vpd, model, k=5)                     # doctest: +SKIP
>>> effects["blocks.1.mlp.W_out:3"]                              # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.analysis.harvest.tokens import token_texts
from tl_vpd.analysis.nodes import several
from tl_vpd.checks import check_finite, instance, integer
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.target_check import check_target
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent, nearest

BLOCK = 1 << 26
"""Bytes of logits at once."""


@dataclass(frozen=True)
class LogitEffects(Printed):
    """The tokens whose logits subcomponents raise and lower most.

    Attributes:
        subcomponents: that write into the residual stream.
        tokens: ``[n, 2, k]``, raised most and lowered most, the strongest first.
        values: by how much.
        names: texts of these tokens.
    """

    subcomponents: tuple[Subcomponent, ...]
    tokens: Int[Tensor, "n 2 k"]
    values: Float[Tensor, "n 2 k"]
    names: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.subcomponents)

    def __getitem__(self, address: str | Subcomponent) -> pd.DataFrame:
        """Of one: token_id, token, logit, from the most raised to the most lowered; raises KeyError if it is not among them."""
        parsed = Subcomponent.parse(address)
        if parsed not in self._places:
            near = nearest(str(parsed), [str(c) for c in self.subcomponents])
            raise KeyError(f"{parsed} has no logit effects{near}: W_O and W_out have, if they were asked for.")
        i = self._places[parsed]
        ids = [*self.tokens[i, 0].tolist(), *self.tokens[i, 1].tolist()[::-1]]
        values = [*self.values[i, 0].tolist(), *self.values[i, 1].tolist()[::-1]]
        return pd.DataFrame({"token_id": ids, "token": [self.names[t] for t in ids], "logit": values})

    def __contains__(self, address: object) -> bool:
        return isinstance(address, str | Subcomponent) and Subcomponent.parse(address) in self._places

    def to_pandas(self) -> pd.DataFrame:
        """Of all: subcomponent, token_id, token, logit."""
        tables = [self[c].assign(subcomponent=str(c)) for c in self.subcomponents]
        columns = ["subcomponent", "token_id", "token", "logit"]
        return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)

    @cached_property
    def _places(self) -> dict[Subcomponent, int]:
        return {c: i for i, c in enumerate(self.subcomponents)}


@torch.no_grad()
def logit_effects(
    decomposition: Decomposition,
    model: nn.Module,
    subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None = None,
    *,
    k: int = 10,
) -> LogitEffects:
    """The direct effect of write directions on the logits, in blocks: never all subcomponents times the vocabulary.

    Args:
        decomposition: of the model's weights.
        model: the target.
        subcomponents: of W_O and W_out (None: all of these).
        k: tokens at each end, fewer where the vocabulary is smaller.

    Raises:
        ValueError: the model has no unembedding that stands alone, has other weights, or a subcomponent does not write into the
            residual stream.
        KeyError: a site is not decomposed.
        IndexError: there is no such subcomponent.
        TypeError: an argument is of another type.
    """
    instance("decomposition", decomposition, Decomposition)
    k, adapter = integer("k", k, minimum=1), adapt(model)
    check_target(decomposition, adapter, check_weights=True)
    unembedding = adapter.unembedding()
    if unembedding is None:
        raise ValueError(f"A {type(model).__name__} has no unembedding that stands alone: logit effects need one.")
    writing = [name for name, site in decomposition.sites.items() if site.short in ("o", "out")]
    if subcomponents is None:
        chosen = [c for c in decomposition.site_axis.subcomponents() if c.site in writing]
    else:
        chosen = [decomposition.subcomponent(address) for address in several("subcomponents", subcomponents)]
        if other := next((c for c in chosen if c.site not in writing), None):
            raise ValueError(f"{other} does not write into the residual stream: give subcomponents of W_O or W_out.")
    W_U = unembedding.weight
    k, rows = min(k, len(W_U)), max(1, BLOCK // (4 * len(W_U)))
    tokens, values = [], []
    for start in range(0, len(chosen), rows):
        block = [decomposition.U[c.site][c.index] for c in chosen[start : start + rows]]
        logits = (torch.stack(block).to(W_U) @ W_U.T).float()
        check_finite(f"U/{chosen[start].site} @ W_U", logits)
        ends = [logits.topk(k, largest=largest) for largest in (True, False)]
        tokens.append(torch.stack([end.indices for end in ends], 1))
        values.append(torch.stack([end.values for end in ends], 1))
    none = torch.zeros(0, 2, k, device=W_U.device)
    ids = torch.cat(tokens) if tokens else none.long()
    names: Any = token_texts(getattr(adapter.model, "tokenizer", None), ids)
    return LogitEffects(tuple(chosen), ids, torch.cat(values) if values else none, names)
