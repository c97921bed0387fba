"""At which tokens subcomponents fire, as sparse counts, and the text of tokens.

With ``N`` real tokens, ``n_f`` firings, ``n_t`` occurrences of token t and ``n_ft`` firings on it:

    recall(t) = n_ft / n_f                  the fraction of its firings that falls on t
    PMI(t)    = ln(n_ft N / (n_f n_t))      in nats: how much more often it fires on t than by chance
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_vpd.checks import choice, integer

_TOKENS = 1 << 32
"""Above every token's number: pairs are one integer, ``subcomponent * _TOKENS + token``."""


def pmi(
    together: Float[Tensor, " token"], firings: int, occurrences: Float[Tensor, " token"], n: int
) -> Float[Tensor, " token"]:
    """``ln(together · n / (firings · occurrences))`` in nats; −inf where it never fires."""
    return (together * n / (firings * occurrences)).log()


def recall(together: Float[Tensor, " token"], firings: int) -> Float[Tensor, " token"]:
    """The fraction of the firings that falls on each token."""
    return together / firings


@dataclass(frozen=True)
class TokenCounts:
    """At which tokens subcomponents fired: sparse counts sorted by subcomponent, with the totals they are compared to.

    Attributes:
        index: the subcomponent of each pair.
        token: the token of each pair.
        count: how often it fired there.
        occurrences: of every token among the counted positions.
        firings: of every subcomponent.
        n: how many positions were counted.
        missing: by how many firings a pair's count may be too small (0: all are exact); rare pairs were dropped to stay within
            the memory.
    """

    index: Int[Tensor, " pair"]
    token: Int[Tensor, " pair"]
    count: Int[Tensor, " pair"]
    occurrences: Int[Tensor, " vocab"]
    firings: Int[Tensor, " C"]
    n: int
    missing: int = 0

    def table(self, i: int, names: Mapping[int, str], *, k: int, by: str, min_count: int) -> pd.DataFrame:
        """The ``k`` best tokens of the i-th subcomponent by PMI or recall."""
        by = choice("by", by, ("pmi", "recall"))
        k, min_count = integer("k", k, minimum=0), integer("min_count", min_count, minimum=0)
        ends = torch.tensor([i, i + 1], dtype=self.index.dtype, device=self.index.device)
        low, high = torch.searchsorted(self.index, ends).tolist()
        token, count = self.token[low:high], self.count[low:high]
        occurrences, firings = self.occurrences[token.long()], int(self.firings[i])
        table = pd.DataFrame(
            {
                "token_id": token.tolist(),
                "token": [names[t] for t in token.tolist()],
                "count": count.tolist(),
                "occurrences": occurrences.tolist(),
                "recall": recall(count.double(), firings).tolist(),
                "pmi": pmi(count.double(), firings, occurrences.double(), self.n).tolist(),
            }
        )
        ties = ["recall" if by == "pmi" else "pmi", "token_id"]
        order = table[table["count"] >= min_count].sort_values([by, *ties], ascending=[False, False, True])
        return order.head(k).reset_index(drop=True)


def total(parts: Sequence[TokenCounts], limit: int | None = None) -> TokenCounts:
    """The counts of all parts.

    Args:
        parts: of the same subcomponents.
        limit: pairs; where there are more, those of the smallest counts are dropped (None: all stay).
    """
    keys = torch.cat([part.index.long() * _TOKENS + part.token for part in parts])
    keys, inverse = keys.unique(return_inverse=True)
    count = torch.zeros_like(keys, dtype=torch.int32).index_add_(0, inverse, torch.cat([part.count for part in parts]))
    missing = sum(part.missing for part in parts)
    if limit is not None and len(keys) > limit:
        most = int(count.kthvalue(len(count) - limit // 2).values)  # half of the limit stays, so that this is rare
        keys, count, missing = keys[count > most], count[count > most], missing + most
    occurrences = torch.zeros(max(len(p.occurrences) for p in parts), dtype=torch.int64, device=keys.device)
    for part in parts:
        occurrences[: len(part.occurrences)] += part.occurrences
    index, token = (keys // _TOKENS).to(torch.int32), (keys % _TOKENS).to(torch.int32)
    firings = torch.stack([part.firings for part in parts]).sum(0)
    return TokenCounts(index, token, count, occurrences, firings, sum(part.n for part in parts), missing)


def count_tokens(tokens: Int[Tensor, " m"], fires: Float[Tensor, "m C"]) -> TokenCounts:
    """The counts of ``m`` positions; ``fires`` is 1 or 0."""
    distinct, inverse = tokens.unique(return_inverse=True)
    dense = torch.zeros(len(distinct), fires.shape[1], device=fires.device).index_add_(0, inverse, fires)
    index, place = dense.T.nonzero(as_tuple=True)
    index, token, count = (x.to(torch.int32) for x in (index, distinct[place], dense[place, index]))
    return TokenCounts(index, token, count, torch.bincount(tokens), fires.sum(0).long(), len(tokens))


def token_texts(tokenizer: Any, tokens: Int[Tensor, "..."]) -> dict[int, str]:
    """The text of every token that occurs; its number where the token alone is no text (half a character)."""
    ids = tokens.unique().tolist()
    if tokenizer is None:
        return {i: str(i) for i in ids}
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    names = {}
    for i, text, piece in zip(ids, texts, pieces, strict=True):
        # Sentencepiece tokenizers drop the space in front when a token is decoded alone.
        spaced = " " + text if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text
        names[i] = f"⟨{i}⟩" if not text or "\ufffd" in text else spaced
    return names
