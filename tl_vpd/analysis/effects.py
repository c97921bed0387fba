"""Each of many subcomponents ablated in turn, and what that does to a metric: what activation patching's sweeps are for heads.

>>> table = ablation_table(vpd, model, tokens, lambda logits: logits[0, -1, answer])          # doctest: +SKIP
>>> table.sort_values("change").head()                                                        # doctest: +SKIP

The prompts are repeated along the batch, so that one pass ablates a different subcomponent in every copy; a pass computes only
the columns it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.hooks import attachment_of
from tl_vpd.hooks.importances import causal_importances
from tl_vpd.hooks.sparse import AblateEach, Positions
from tl_vpd.site import Subcomponent, nearest

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition

Metric = Callable[[Tensor], Any]


@torch.no_grad()
def ablation_table(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    metric: Metric,
    subcomponents: Sequence[str | Subcomponent] | None = None,
    *,
    pos: Positions = None,
    amount: float = 1.0,
    values: Mapping[str, Tensor] | None = None,
    above: float = 0.0,
    rows: int = 32,
    attention_mask: Tensor | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """A metric of the model's output with each subcomponent ablated alone.

    Args:
        prompts: a string, strings, or tokens ``[batch, pos]``.
        metric: takes the logits of all prompts ``[batch, pos, vocab]``, gives a number.
        subcomponents: ``"blocks.1.attn.W_Q:316"`` or ``Subcomponent``s (None: those whose importance exceeds ``above`` at any
            token of the prompts).
        pos, amount, values: as in ``ablation_hooks``.
        rows: prompts run at once (at least all of one copy).
        attention_mask: 0 at padding (None: found as TransformerLens finds it). progress: show a bar.

    Returns:
        One row a subcomponent, in the order given (or by site and index): ``subcomponent``, ``site``, ``index``, ``metric``, and
        ``change`` (``metric`` minus that of the model as it is).

    Raises:
        KeyError, IndexError, ValueError: a subcomponent or position does not exist; the metric gives no single number; another
            decomposition is attached to the model.
    """
    attached = attachment_of(decomposition, model)
    adapter = adapt(model)
    tokens = adapter.tokens(prompts)
    token_mask = adapter.padding(tokens, attention_mask)
    if subcomponents is None:
        g = causal_importances(decomposition, model, tokens, attention_mask=attention_mask).concatenated
        where = (g > above).flatten(0, -2).any(0).nonzero().flatten().tolist()
        chosen = [decomposition.site_axis.at(i) for i in where]
    else:
        chosen = [decomposition.subcomponent(c) for c in subcomponents]
    with decomposition.attach(model) if attached is None else nullcontext():
        clean = _number(metric(adapter.run(tokens, token_mask)))
        found: list[float] = []
        copies = max(1, rows // len(tokens))
        for start in tqdm(range(0, len(chosen), copies), disable=not progress, desc="ablating"):
            group = chosen[start : start + copies]
            hooks = _hooks(decomposition, group, len(tokens), pos, amount, values)
            with model.hooks(fwd_hooks=hooks):  # type: ignore[operator]
                output = _repeated(adapter, tokens, token_mask, len(group))
            found += [_number(metric(own)) for own in output.split(len(tokens))]
    return pd.DataFrame(
        {
            "subcomponent": [str(c) for c in chosen],
            "site": [c.site for c in chosen],
            "index": [c.index for c in chosen],
            "metric": found,
            "change": [value - clean for value in found],
        }
    )


def _repeated(adapter: Adapter, tokens: Tensor, token_mask: Tensor | None, n: int) -> Tensor:
    times = [n] + [1] * (tokens.ndim - 1)
    return adapter.run(tokens.repeat(times), None if token_mask is None else token_mask.repeat(n, 1))


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"The metric gave a tensor of shape {tuple(value.shape)}; one number is needed.")
    return float(value)


def _hooks(
    decomposition: Decomposition,
    group: Sequence[Subcomponent],
    batch: int,
    pos: Positions,
    amount: float,
    values: Mapping[str, Tensor] | None,
) -> list[tuple[str, AblateEach]]:
    """Copy i of the prompts goes without ``group[i]``."""
    kind = "mask" if values is None else "component_acts"
    hooks = []
    for site in dict.fromkeys(c.site for c in group):
        own = [(copy, c.index) for copy, c in enumerate(group) if c.site == site]
        copies, indices = (tuple(column) for column in zip(*own, strict=True))
        if values is not None and site not in values:
            raise KeyError(f"values has nothing for {site}{nearest(site, values)}.")
        given = None if values is None else values[site][..., list(indices)]
        hooks.append(
            (decomposition.sites[site].hook_name(kind), AblateEach(indices, pos, copies, batch, amount, given))
        )
    return hooks
