"""Windows of text: the best few of each subcomponent, by any score, over any number of batches.

They are the best of all rows, whatever the batches or parts that the rows came in: among equal scores the first row wins. Where
the score is a random number that follows from the seed, the token and the subcomponent, they are a random sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def cut(peak: int, radius: int, real: Bool[Tensor, " pos"]) -> tuple[int, int]:
    """Start and stop of the run of real tokens around ``peak``, at most ``radius`` to each side."""
    first = max(0, peak - radius)
    around = real[first : peak + radius + 1].tolist()
    before, after = around[: peak - first], around[peak - first + 1 :]
    start = peak - [*before[::-1], False].index(False)
    return start, peak + 1 + [*after, False].index(False)


@dataclass(frozen=True)
class Window:
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
class Windows:
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
        tokens: Int[Tensor, "row pos"],
        g: Float[Tensor, "row pos C"],
        a: Float[Tensor, "row pos C"],
        candidates: tuple[Float[Tensor, "row C"], Int[Tensor, "row C"]],
        first_row: int,
    ) -> None:
        """Adds a batch, in place: one candidate per row and subcomponent.

        Args:
            tokens: the rows, −1 at padding.
            g: importances.
            a: activations.
            candidates: scores (−1: there is none) and positions.
            first_row: the number of the batch's first row.
        """
        (n_rows, n_pos), (C, k) = tokens.shape, self.score.shape
        if not k:
            return
        score, at = candidates[0].nan_to_num(-1.0), candidates[1]
        numbers = torch.arange(first_row, first_row + n_rows, device=score.device).expand(C, n_rows)
        scores, rows = torch.cat([self.score, score.T], 1), torch.cat([self.rows, numbers], 1)
        source = _order(scores, rows)[:, :k]
        positions = torch.cat([self.positions, at.T], 1)
        changed = (source != torch.arange(k, device=source.device)).any(1).nonzero()[:, 0]
        older = source[changed].clamp(max=k - 1)[..., None].expand(-1, -1, self.tokens.shape[2])
        for shown in (self.tokens, self.importances, self.activations):
            shown[changed] = shown[changed].gather(1, older)
        for values, both in ((self.score, scores), (self.rows, rows), (self.positions, positions)):
            values.copy_(both.gather(1, source))
        self.rows[self.score < 0] = -1
        c, slot = ((source >= k) & (self.score > 0)).nonzero(as_tuple=True)
        row, width = (self.rows[c, slot] - first_row)[:, None], self.tokens.shape[2]
        pos = self.positions[c, slot][:, None] + torch.arange(width, device=score.device) - width // 2
        inside = (pos >= 0) & (pos < n_pos)
        pos = pos.clamp(0, n_pos - 1)
        self.tokens[c, slot] = torch.where(inside, tokens[row, pos], -1).to(torch.int32)
        for shown, values in ((self.importances, g), (self.activations, a)):
            shown[c, slot] = torch.where(inside, values[row, pos, c[:, None]], 0).to(shown)

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


def peaks(
    g: Float[Tensor, "row pos C"], a: Float[Tensor, "row pos C"]
) -> tuple[Float[Tensor, "row C"], Int[Tensor, "row C"]]:
    """In every row the token of largest importance, as its score and position.

    Many importances are exactly 1: among equal ones the largest ``|activation|`` wins, within a row and between rows, so
    the score (float64) is ``g + 1e-6 |a| / (1 + |a|)``. An activation that is NaN counts as 0 here.
    """
    best = g.amax(1)
    size, at = torch.where(g == best[:, None], a.abs().nan_to_num(0.0), -1).max(1)
    size = size.double()
    return best.double() + 1e-6 * size / (1 + size), at


def random_firings(
    fires: Bool[Tensor, "row pos C"], chosen: Int[Tensor, " C"], seed: int, first_row: int
) -> tuple[Float[Tensor, "row C"], Int[Tensor, "row C"]]:
    """In every row one firing of each subcomponent at random, as a random score in (0, 1) and its position (score −1: none).

    Args:
        fires: where subcomponents fire.
        chosen: their concatenated positions.
        seed: with row, position and subcomponent, it fixes the score.
        first_row: the number of the batch's first row.
    """
    n_rows, n_pos, C = fires.shape
    row, pos, c = fires.nonzero(as_tuple=True)
    score = _uniform(seed, (row + first_row) * n_pos + pos, chosen[c])
    flat = row * C + c
    best = torch.full((n_rows * C,), -1.0, dtype=torch.float64, device=fires.device)
    best.scatter_reduce_(0, flat, score, "amax")
    at, winner = torch.zeros_like(best, dtype=torch.int64), score == best[flat]
    at[flat[winner]] = pos[winner]
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
