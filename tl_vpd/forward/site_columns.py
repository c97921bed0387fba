"""One site's columns of a blocked pass: its masks, made for a few tokens at a time, and where their gradients go.

m = g + (1 − g) r,      ∂g = ∂m (1 − r),      ∂r = ∂m (1 − g)
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_vpd.importance.squash import Squash
from tl_vpd.masking.masks import mask_of

Rows = slice | Tensor
"""Tokens of a pass: a slice, or their indices."""


class SiteColumns:
    """Importances, sources and Δ's source of one site. Rows are tokens.

    Args:
        values: importances, or with ``squash`` pre-sigmoid values.
        sources: of the subcomponents.
        delta: Δ's.
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
        source_rows: Int[Tensor, " tokens"] | None,
        squash: Squash | None,
        grad_g: Float[Tensor, "tokens C"] | None,
        grad_sources: tuple[Float[Tensor, "first C"], Float[Tensor, " first"]] | None,
    ) -> None:
        self.values, self.sources, self.deltas = values, sources, delta
        self.source_rows, self.squash = source_rows, squash
        self.grad_g, self.grad_sources = grad_g, grad_sources

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradient of importances or of sources is computed."""
        return self.grad_g is not None or self.grad_sources is not None

    def g(self, rows: Rows) -> Float[Tensor, "rows C"]:
        """The importances of tokens."""
        values = self.values[rows]
        return values if self.squash is None else self.squash.importances(values)

    def r(self, rows: Rows) -> Float[Tensor, "rows C"]:
        """The sources that tokens use."""
        return self.sources[self._source_rows(rows)]

    def delta(self, rows: Rows) -> Float[Tensor, "rows 1"]:
        """Δ's masks of tokens."""
        return self.deltas[self._source_rows(rows)]

    def mask(self, rows: Rows) -> Float[Tensor, "rows C"]:
        """``g + (1 − g) r`` of tokens."""
        return mask_of(self.g(rows), self.r(rows))

    def difference(self, rows: Rows) -> Float[Tensor, "rows C"]:
        """``m − m_Δ`` of tokens."""
        return self.mask(rows).sub_(self.delta(rows))

    def add_mask_gradient(self, rows: Rows, grad_mask: Float[Tensor, "rows C"], n: int | None = None) -> None:
        """Passes ∂m of tokens on to ∂g, and of the first n of them to ∂r (None: of all)."""
        if self.grad_g is not None:
            if isinstance(rows, slice):
                self.grad_g[rows].add_(grad_mask).addcmul_(grad_mask, self.r(rows), value=-1)
            else:
                self.grad_g.index_add_(0, rows, torch.addcmul(grad_mask, grad_mask, self.r(rows), value=-1))
        if self.grad_sources is not None and n != 0:
            target, (rows, grad_mask) = self.grad_sources[0], _first(rows, grad_mask, n)
            if isinstance(rows, slice) and self.source_rows is None:  # straight into place
                torch.addcmul(grad_mask, grad_mask, self.g(rows), value=-1, out=target[rows])
            else:
                self._add(target, rows, torch.addcmul(grad_mask, grad_mask, self.g(rows), value=-1))

    def add_delta_gradient(self, rows: Rows, grad_delta: Float[Tensor, " rows"], n: int | None = None) -> None:
        """Passes ∂m_Δ of tokens on, of the first n of them (None: of all)."""
        if self.grad_sources is not None:
            self._add(self.grad_sources[1], *_first(rows, grad_delta, n))

    def _source_rows(self, rows: Rows) -> Rows:
        return rows if self.source_rows is None else self.source_rows[rows]

    def _add(self, target: Tensor, rows: Rows, gradient: Tensor) -> None:
        """Adds to the source rows that tokens use."""
        rows = self._source_rows(rows)
        if self.source_rows is not None and isinstance(rows, Tensor):
            target.index_add_(0, rows, gradient)
        else:
            target[rows] = gradient


def _first(rows: Rows, gradient: Tensor, n: int | None) -> tuple[Rows, Tensor]:
    """The first n of some tokens (None: all), and their gradients."""
    if n is None:
        return rows, gradient
    start = 0 if isinstance(rows, Tensor) else rows.start or 0
    return rows[:n] if isinstance(rows, Tensor) else slice(start, start + n), gradient[:n]
