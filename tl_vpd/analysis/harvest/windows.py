"""Windows of text: the best few of each subcomponent, by any score, over any number of batches.

They are the best of all rows, whatever the batches or parts that the rows came in: among equal scores the first row wins. Where
the score is a random number that follows from the seed, the token and the subcomponent, they are a random sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.analysis.harvest.batch import Active, Batch, true_at
from tl_vpd.printing import Printed


def cut(peak: int, radius: int, real: Bool[Tensor, " pos"]) -> tuple[int, int]:
    """Start and stop of the run of real tokens around ``peak``, at most ``radius`` to each side."""
    first = max(0, peak - radius)
    around = real[first : peak + radius + 1].tolist()
    before, after = around[: peak - first], around[peak - first + 1 :]
    start = peak - [*before[::-1], False].index(False)
    return start, peak + 1 + [*after, False].index(False)


@dataclass(frozen=True)
class Window(Printed):
    """A stretch of one row around its token of largest importance, at ``pos`` of the row and ``peak`` of the window."""

    row: int
    pos: int
    start: int
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    importances: Float[Tensor, " width"]
    activations: Float[Tensor, " width"]

    @property
    def peak(self) -> int:
        """The position within the window of the token that it is around."""
        return self.pos - self.start

    def to_pandas(self) -> pd.DataFrame:
        """One row per token: row, pos, token_id, token, importance, activation."""
        return pd.DataFrame(
            {
                "row": self.row,
                "pos": range(self.start, self.start + len(self.tokens)),
                "token_id": self.token_ids,
                "token": self.tokens,
                "importance": self.importances.tolist(),
                "activation": self.activations.tolist(),
            }
        )


@dataclass(frozen=True)
class Windows(Printed):
    """The windows of the largest scores of every subcomponent, in order.

    Attributes:
        score: by which they are chosen (−1: there is no such window).
        rows: of the data.
        positions: in the row, of the token that the window is around.
        tokens: around it (−1 outside the row, and at padding).
        importances: there.
        activations: there.
    """

    score: Float[Tensor, "C window"]
    rows: Int[Tensor, "C window"]
    positions: Int[Tensor, "C window"]
    tokens: Int[Tensor, "C window width"]
    importances: Float[Tensor, "C window width"]
    activations: Float[Tensor, "C window width"]

    @classmethod
    def none(cls, C: int, k: int, radius: int, device: torch.device) -> Windows:
        """Room for ``k`` windows of ``C`` subcomponents."""
        width = 2 * radius + 1
        score = torch.full((C, k), -1.0, dtype=torch.float64, device=device)
        rows, positions = (torch.full((C, k), -1, device=device) for _ in range(2))
        tokens = torch.full((C, k, width), -1, dtype=torch.int32, device=device)
        g, a = (torch.zeros(C, k, width, device=device) for _ in range(2))
        return cls(score, rows, positions, tokens, g, a)

    @staticmethod
    def bytes_for(C: int, k: int, radius: int) -> int:
        """Memory of ``none``."""
        return C * k * (24 + 12 * (2 * radius + 1))

    def best(self, other: Windows) -> Windows:
        """The best of both, as many as this one has room for."""
        k = self.score.shape[1]
        score, rows = torch.cat([self.score, other.score], 1), torch.cat([self.rows, other.rows], 1)
        source = _order(score, rows)[:, :k]
        chosen = {"score": score.gather(1, source), "rows": rows.gather(1, source)}
        for name in ("positions", "tokens", "importances", "activations"):
            both = torch.cat([getattr(self, name), getattr(other, name)], 1)
            chosen[name] = both.gather(1, source if both.ndim == 2 else source[..., None].expand(-1, -1, both.shape[2]))
        return Windows(**chosen)

    def add_(
        self,
        batch: Batch,
        tokens: Int[Tensor, "row pos"],
        candidates: tuple[Float[Tensor, "row C"], Int[Tensor, "row C"]],
        first_row: int,
    ) -> None:
        """Adds a batch, in place: one candidate per row and subcomponent.

        Args:
            batch: the rows, which come after those that were added before.
            tokens: of them, −1 at padding.
            candidates: scores (−1: there is none) and positions.
            first_row: the number of the batch's first row.
        """
        (n_rows, n_pos), k, width = tokens.shape, self.score.shape[1], self.tokens.shape[2]
        if not k:
            return
        changed = true_at((candidates[0] > self.score[:, -1]).any(0))
        score, at = (values[:, changed].T for values in candidates)
        numbers = torch.arange(first_row, first_row + n_rows, device=score.device).expand(len(changed), n_rows)
        scores, rows = torch.cat([self.score[changed], score], 1), torch.cat([self.rows[changed], numbers], 1)
        source = _order(scores, rows)[:, :k]
        score, rows = scores.gather(1, source), rows.gather(1, source)
        positions = torch.cat([self.positions[changed], at], 1).gather(1, source)
        i, slot = ((source < k) & (source != torch.arange(k, device=source.device)) & (score > 0)).nonzero(
            as_tuple=True
        )
        older, newer = changed[i] * k + source[i, slot], changed[i] * k + slot
        flat = [shown.view(-1, width) for shown in (self.tokens, self.importances, self.activations)]
        for shown in flat:
            shown.index_copy_(0, newer, shown.index_select(0, older))
        self.score[changed], self.positions[changed] = score, positions
        self.rows[changed] = torch.where(score < 0, -1, rows)
        i, slot = ((source >= k) & (score > 0)).nonzero(as_tuple=True)
        pos = positions[i, slot][:, None] + torch.arange(width, device=score.device) - width // 2
        outside, c = (pos < 0) | (pos >= n_pos), changed[i]
        token = ((rows[i, slot] - first_row)[:, None] * n_pos + pos.clamp(0, n_pos - 1)).flatten()
        g, a = batch.at(c.repeat_interleave(width), token)
        for shown, there, none in zip(flat, (tokens.flatten().index_select(0, token), g, a), (-1, 0, 0), strict=True):
            shown.index_copy_(0, c * k + slot, there.to(shown).view(-1, width).masked_fill_(outside, none))

    def of(self, i: int, names: Mapping[int, str]) -> tuple[Window, ...]:
        """Those of the i-th subcomponent.

        Args:
            i: its place.
            names: texts of tokens.
        """
        return tuple(self._window(i, j, names) for j in (self.rows[i] >= 0).nonzero()[:, 0].tolist())

    def _window(self, i: int, j: int, names: Mapping[int, str]) -> Window:
        pos, radius = int(self.positions[i, j]), self.tokens.shape[2] // 2
        start, stop = cut(radius, radius, self.tokens[i, j] >= 0)
        ids = tuple(self.tokens[i, j, start:stop].tolist())
        shown = self.importances[i, j, start:stop], self.activations[i, j, start:stop]
        return Window(int(self.rows[i, j]), pos, pos - radius + start, ids, tuple(names[t] for t in ids), *shown)


def _order(score: Float[Tensor, "C n"], rows: Int[Tensor, "C n"]) -> Int[Tensor, "C n"]:
    """By score from the largest, equal ones by row."""
    by_row = rows.argsort(dim=1, stable=True)
    by_score = score.gather(1, by_row).sort(dim=1, descending=True, stable=True).indices
    return by_row.gather(1, by_score)


def peaks(firing: Active, shape: Sequence[int], C: int) -> tuple[Float[Tensor, "row C"], Int[Tensor, "row C"]]:
    """In every row the token of largest importance at which a subcomponent fires, as its score (−1: none) and position.

    Many importances are exactly 1: among equal ones the largest ``|activation|`` wins, within a row and between rows, so
    the score (float64) is ``g + 1e-6 |a| / (1 + |a|)``. An activation that is NaN counts as 0 here.

    Args:
        firing: importances and activations.
        shape: rows and positions.
        C: number of subcomponents.
    """
    group = firing.token // shape[1] * C + firing.c
    largest = firing.g.new_full((shape[0] * C,), -1.0).scatter_reduce_(0, group, firing.g, "amax")
    top = true_at(firing.g == largest.index_select(0, group))
    size = firing.a.index_select(0, top).abs().nan_to_num(0.0).double()
    score = firing.g.index_select(0, top).double() + 1e-6 * size / (1 + size)
    return _best(score, firing.token.index_select(0, top), firing.c.index_select(0, top), shape, C)


def random_firings(
    token: Int[Tensor, " n"],
    c: Int[Tensor, " n"],
    shape: Sequence[int],
    chosen: Int[Tensor, " C"],
    seed: int,
    first_row: int,
) -> tuple[Float[Tensor, "row C"], Int[Tensor, "row C"]]:
    """In every row one firing of each subcomponent at random, as a random score in (0, 1) and its position (score −1: none).

    Args:
        token: where subcomponents fire, ``row * n_pos + pos``.
        c: these subcomponents.
        shape: rows and positions.
        chosen: concatenated positions of all of them.
        seed: with row, position and subcomponent, it fixes the score.
        first_row: the number of the batch's first row.
    """
    score = _uniform(seed, token + first_row * shape[1], chosen[c])
    return _best(score, token, c, shape, len(chosen))


def _best(
    score: Float[Tensor, " n"], token: Int[Tensor, " n"], c: Int[Tensor, " n"], shape: Sequence[int], C: int
) -> tuple[Float[Tensor, "row C"], Int[Tensor, "row C"]]:
    """In every row the largest score of each subcomponent (−1: none) and its position, the first among equals."""
    (n_rows, n_pos), pos = shape, token % shape[1]
    group = token // n_pos * C + c
    best = torch.full((n_rows * C,), -1.0, dtype=torch.float64, device=score.device)
    best.scatter_reduce_(0, group, score, "amax")
    winner = true_at(score == best.index_select(0, group))
    at = torch.full_like(best, n_pos, dtype=torch.int64).scatter_reduce_(0, group[winner], pos[winner], "amin")
    return best.view(n_rows, C), at.view(n_rows, C)


def _uniform(seed: int, token: Int[Tensor, " n"], c: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Numbers in (0, 1) that follow from their arguments alone: two rounds of splitmix64's finaliser."""
    x = _mixed(_mixed(token + _wrapped(seed)) + c)
    return ((x >> 11) & ((1 << 53) - 1)).double().add(0.5) / (1 << 53)


def _mixed(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    x = x + _wrapped(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _wrapped(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, " n"], bits: int) -> Int[Tensor, " n"]:
    """To the right, zeros from the left: PyTorch's shift of int64 repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(number: int) -> int:
    """Modulo 2^64, as int64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
