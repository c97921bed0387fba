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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.analysis.harvest.batch import true_at
from tl_vpd.checks import choice, integer
from tl_vpd.printing import Printed

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
class TokenCounts(Printed):
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


class Pairs:
    """Counts of (subcomponent, token) pairs, batch by batch.

    Args:
        C: number of subcomponents.
        limit: how many pairs; where there are more, the rarest are dropped.
        device: of the counts.
    """

    def __init__(self, C: int, limit: int, device: torch.device) -> None:
        self.limit = limit
        none, no_firings = (torch.zeros(n, dtype=torch.int64, device=device) for n in (0, C))
        self._sum = TokenCounts(none.int(), none.int(), none.int(), none, no_firings, 0)
        self._recent: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._size = 0

    def add(self, tokens: Int[Tensor, " m"], at: Int[Tensor, " n"], c: Int[Tensor, " n"]) -> None:
        """Counts positions.

        Args:
            tokens: there (−1: the position does not count).
            at: which subcomponents fire at, as places in ``tokens``.
            c: these subcomponents.
        """
        token = tokens.index_select(0, at)
        keys = c * _TOKENS + token
        self._recent.append(keys if bool((tokens >= 0).all()) else keys[true_at(token >= 0)])
        self._positions.append(tokens)
        self._size += len(self._recent[-1]) + len(tokens)
        # Sorting all pairs at every batch would take longer than counting them.
        if self._size > min(2 * self.limit, max(2_000_000, 2 * len(self._sum.count))):
            self.counts()

    def counts(self) -> TokenCounts:
        """All counts."""
        if self._recent:
            keys, count = torch.cat(self._recent).unique(return_counts=True)
            tokens = torch.cat(self._positions)
            tokens = tokens[tokens >= 0]
            index, token = keys // _TOKENS, (keys % _TOKENS).to(torch.int32)
            firings = torch.zeros_like(self._sum.firings).index_add_(0, index, count)
            recent = TokenCounts(
                index.to(torch.int32), token, count.to(torch.int32), torch.bincount(tokens), firings, len(tokens)
            )
            self._sum, self._recent, self._positions, self._size = total([self._sum, recent], self.limit), [], [], 0
        return self._sum


def token_table(
    tokens: Int[Tensor, " m"], fires: Bool[Tensor, " m"], names: Mapping[int, str], *, k: int, by: str, min_count: int
) -> pd.DataFrame:
    """``TokenCounts.table`` of one that fires at some of ``m`` positions."""
    pairs, at = Pairs(1, len(tokens), tokens.device), true_at(fires)
    pairs.add(tokens, at, torch.zeros_like(at))
    return pairs.counts().table(0, names, k=k, by=by, min_count=min_count)


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
