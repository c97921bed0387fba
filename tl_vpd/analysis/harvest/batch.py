"""Importances and activations of one batch of rows, computed at those pairs of token and subcomponent where they are asked for.

A subcomponent is *active* where its importance is above 0. ``x @ V`` of all pairs takes several times as long as the products at
these alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.decomposition import Decomposition

_FEW = 4
"""One product at a time is faster than the whole product of matrices below one of so many pairs."""


@dataclass(frozen=True)
class Active:
    """Pairs of token and subcomponent, site by site, then token by token.

    Attributes:
        token: ``row * n_pos + pos`` in the batch.
        c: place of the subcomponent among the harvested ones.
        g: importances.
        a: activations.
    """

    token: Int[Tensor, " n"]
    c: Int[Tensor, " n"]
    g: Float[Tensor, " n"]
    a: Float[Tensor, " n"]

    def above(self, threshold: float) -> Active:
        """Those whose importance exceeds a threshold (what is NaN does not)."""
        keep = self.g > threshold
        return self if bool(keep.all()) else self.at(true_at(keep))

    def at(self, places: Int[Tensor, " m"]) -> Active:
        """Some of them."""
        return Active(*(values.index_select(0, places) for values in (self.token, self.c, self.g, self.a)))


class Chosen:
    """The harvested subcomponents ``C``, by site.

    Args:
        decomposition: of the model's weights.
        columns: their concatenated positions, ascending.
    """

    def __init__(self, decomposition: Decomposition, columns: Int[Tensor, " C"]) -> None:
        self.decomposition, self.columns = decomposition, columns
        self.all = len(columns) == decomposition.site_axis.total
        norms = torch.cat([decomposition.U[name].norm(dim=-1) for name in decomposition.sites]).detach()
        self.norms = norms.to(columns.device).index_select(0, columns)
        self.sites: dict[str, slice] = {}
        """By name, where each site's are among them; sites that have none are left out."""
        for name, at in decomposition.site_axis.slices.items():
            start, stop = torch.searchsorted(columns, columns.new_tensor([at.start, at.stop])).tolist()
            if start < stop:
                self.sites[name] = slice(start, stop)
        lengths = columns.new_tensor([at.stop - at.start for at in self.sites.values()])
        self.site = torch.arange(len(lengths), dtype=torch.int16, device=columns.device).repeat_interleave(lengths)

    def V(self, name: str, like: Tensor, places: Int[Tensor, " n"] | None = None) -> Float[Tensor, "d_in n"]:
        """Columns of V.

        Args:
            name: of the site.
            like: of which dtype and where.
            places: among the site's harvested ones (None: all of these).
        """
        V, at = self.decomposition.V[name].detach(), self.decomposition.site_axis.slices[name]
        if not self.all or places is not None:
            columns = self.columns[self.sites[name]] - at.start
            columns = columns if places is None else columns.index_select(0, places)
            V = V.index_select(1, columns.to(V.device))
        return V.to(like)


class Batch:
    """One batch of rows.

    Args:
        chosen: the harvested subcomponents.
        tokens: the rows.
        real: False at padding.
        inputs: of the sites.
        g: importances of all subcomponents, 0 at padding.
    """

    def __init__(
        self,
        chosen: Chosen,
        tokens: Int[Tensor, "row pos"],
        real: Bool[Tensor, "row pos"],
        inputs: Mapping[str, Float[Tensor, "row pos _"]],
        g: Float[Tensor, "row pos total"],
    ) -> None:
        self.chosen, self.tokens, self.real = chosen, tokens, real
        self._x = {name: inputs[name].flatten(0, 1) for name in chosen.sites}
        g = (g if chosen.all else g.index_select(-1, chosen.columns)).flatten()
        self._g = g.to(torch.promote_types(g.dtype, torch.float32))

    def active(self) -> Active:
        """All active subcomponents; those whose importance is NaN are among them."""
        at, C = self._active_at(), len(self.chosen.columns)
        site = self.chosen.site.index_select(0, at % C)
        at = at.index_select(0, site.argsort(stable=True))
        token, c = at // C, at % C
        parts, low = [], 0
        for n, (name, x) in zip(torch.bincount(site, minlength=len(self._x)).tolist(), self._x.items(), strict=True):
            columns = c[low : low + n] - self.chosen.sites[name].start
            parts.append(dots(x, self.chosen.V(name, x), token[low : low + n], columns))
            low += n
        return Active(token, c, self._g.index_select(0, at), self._scaled(parts, c))

    def at(self, c: Int[Tensor, " n"], token: Int[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Importances and activations at any pairs; ``c`` ascends."""
        stops = c.new_tensor([at.stop for at in self.chosen.sites.values()])
        parts, low = [], 0
        for high, (name, x) in zip(torch.searchsorted(c, stops).tolist(), self._x.items(), strict=True):
            places, which = (c[low:high] - self.chosen.sites[name].start).unique_consecutive(return_inverse=True)
            parts.append(dots(self.chosen.V(name, x, places).T, x.T, which, token[low:high]))
            low = high
        return self._g.index_select(0, token * len(self.chosen.columns) + c), self._scaled(parts, c)

    def _active_at(self) -> Int[Tensor, " n"]:
        if self._g.device.type == "cpu":
            return torch.from_numpy(np.flatnonzero(~(self._g.numpy() <= 0)))
        return true_at(~(self._g <= 0))

    def _scaled(self, products: Sequence[Tensor], c: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Activations, in float32 at least, from ``x @ V``."""
        return torch.cat(list(products)).to(self._g) * self.chosen.norms.index_select(0, c).to(self._g)


def activations_of(
    decomposition: Decomposition, inputs: Mapping[str, Tensor], columns: Int[Tensor, " C"]
) -> Float[Tensor, "row pos C"]:
    """``(x @ V[:, c]) ‖U[c]‖`` of some subcomponents at every token."""
    chosen = Chosen(decomposition, columns)
    products = torch.cat([inputs[name] @ chosen.V(name, inputs[name]) for name in chosen.sites], dim=-1)
    return products * chosen.norms.to(products)


def dots(
    left: Float[Tensor, "rows d"], right: Float[Tensor, "d columns"], i: Int[Tensor, " n"], j: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """``(left @ right)[i, j]``; ``i`` ascends."""
    shape = len(left), right.shape[1]
    few = _FEW * len(i) < shape[0] * shape[1]
    if not few or left.device.type != "cpu" or left.dtype not in (torch.float32, torch.float64):
        return (left @ right)[i, j]
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(i, minlength=shape[0]), 0, out=starts[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch calls this layout a beta version
        where = torch.sparse_csr_tensor(starts, j, left.new_zeros(len(i)), shape, check_invariants=False)
    return torch.sparse.sampled_addmm(where, left, right, beta=0.0).values()


def true_at(values: Bool[Tensor, " n"]) -> Int[Tensor, " m"]:
    """Where values are true; on a CPU by NumPy, which takes half as long."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(values.numpy()))
    return values.nonzero()[:, 0]
