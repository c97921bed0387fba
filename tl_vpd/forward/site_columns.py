"""One site's columns of a blocked pass: its masks, made for a few tokens at a time, and where their gradients go.

m = g + (1 − g) r,      ∂g = ∂m (1 − r),      ∂r = ∂m (1 − g)
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_vpd.importance.squash import Squash

Rows = slice | Tensor
"""Tokens of a pass: a slice, or their indices."""
ALL = slice(None)


class SiteColumns:
    """Importances, sources and Δ's source of one site. Rows are tokens.

    Args:
        values: importances, or with ``squash`` pre-sigmoid values.
        sources: of the subcomponents.
        delta: Δ's.
        one: the number 1 with their dtype and device.
        source_rows: the row of the sources that each token uses (None: the same row).
        squash: makes importances from the values (None: they are importances).
        grad_g: where the gradient of the importances is added (None: nowhere).
        grad_sources: where the gradients of sources and of Δ's source, or of the first rows of them, go (None: nowhere).
    """

    def __init__(
        self,
        values: Float[Tensor, "tokens C"],
        sources: Float[Tensor, "rows C"],
        delta: Float[Tensor, "rows 1"],
        *,
        one: Float[Tensor, ""],
        source_rows: Int[Tensor, " tokens"] | None,
        squash: Squash | None,
        grad_g: Float[Tensor, "tokens C"] | None,
        grad_sources: tuple[Float[Tensor, "first C"], Float[Tensor, "first 1"]] | None,
    ) -> None:
        self.values, self.sources, self.deltas, self.one = values, sources, delta, one
        self.source_rows, self.squash = source_rows, squash
        self.grad_g, self.grad_sources = grad_g, grad_sources

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradient of importances or of sources is computed."""
        return self.grad_g is not None or self.grad_sources is not None

    def g(self, rows: Rows) -> Float[Tensor, "rows C"]:
        """The importances of tokens."""
        values = _rows_of(self.values, rows)
        return values if self.squash is None else self.squash.importances(values)

    def r(self, rows: Rows) -> Float[Tensor, "rows C"]:
        """The sources that tokens use."""
        return _rows_of(self.sources, self._source_rows(rows))

    def delta(self, rows: Rows) -> Float[Tensor, "rows 1"]:
        """Δ's masks of tokens."""
        return _rows_of(self.deltas, self._source_rows(rows))

    def mask(self, g: Float[Tensor, "rows C"], r: Float[Tensor, "rows C"]) -> Float[Tensor, "rows C"]:
        """``g + (1 − g) r``, as ``mask_of`` computes it."""
        return torch.lerp(r, self.one, g)

    def add_mask_gradient(
        self,
        rows: Rows,
        grad_mask: Float[Tensor, "rows C"],
        g: Float[Tensor, "rows C"],
        r: Float[Tensor, "rows C"],
        n: int | None = None,
    ) -> None:
        """Passes ∂m of tokens on to ∂g, and to ∂r.

        Args:
            rows: the tokens.
            grad_mask: ∂m.
            g: their importances.
            r: the sources that they use.
            n: how many of them, from the first on, have sources with a gradient (None: all).
        """
        if self.grad_g is not None:
            if isinstance(rows, slice):
                _rows_of(self.grad_g, rows).add_(grad_mask).addcmul_(grad_mask, r, value=-1)
            else:
                self.grad_g.index_add_(0, rows, torch.addcmul(grad_mask, grad_mask, r, value=-1))
        if self.grad_sources is None or n == 0:
            return
        target = self.grad_sources[0]
        if n is not None:
            rows, grad_mask, g = _first(rows, n), grad_mask[:n], g[:n]
        if isinstance(rows, slice) and self.source_rows is None:  # straight into place
            torch.addcmul(grad_mask, grad_mask, g, value=-1, out=_rows_of(target, rows))
        else:
            self._add(target, rows, torch.addcmul(grad_mask, grad_mask, g, value=-1))

    def add_delta_gradient(self, rows: Rows, grad_delta: Float[Tensor, " rows"], n: int | None = None) -> None:
        """Passes ∂m_Δ of tokens on, of the first n of them (None: of all)."""
        if self.grad_sources is None:
            return
        rows, grad_delta = (rows, grad_delta) if n is None else (_first(rows, n), grad_delta[:n])
        self._add(self.grad_sources[1], rows, grad_delta.unsqueeze(1))

    def _source_rows(self, rows: Rows) -> Rows:
        return rows if self.source_rows is None else _rows_of(self.source_rows, rows)

    def _add(self, target: Tensor, rows: Rows, gradient: Tensor) -> None:
        """Adds to the source rows that tokens use."""
        rows = self._source_rows(rows)
        if self.source_rows is not None and isinstance(rows, Tensor):
            target.index_add_(0, rows, gradient)
        else:
            target[rows] = gradient


def _rows_of(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor if rows is ALL else tensor[rows]


def _first(rows: Rows, n: int) -> Rows:
    """The first n of some tokens."""
    if isinstance(rows, Tensor):
        return rows[:n]
    start = rows.start or 0
    return slice(start, start + n)
