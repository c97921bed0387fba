"""Locality: each subcomponent should write to few of the units that a nonlinearity works on (the authors' newer recipe).

    L_locality = mean over c of Σ_u f_u / (f_u + t/N),      f_u = ‖U[c, u]‖² / ‖U[c]‖²

u is one of the N units of what a site writes: a neuron of ``W_in`` and ``W_gate``, a head of ``W_Q``, ``W_K`` and ``W_V``. f_u is
its part of a subcomponent's squared norm. Each sum counts, softly, the units that have more than about t/N of it; t falls over
the run. Scaling V and U against each other changes nothing. Sites that write to the residual stream (``W_O``, ``W_out``) have no
units, nor have sites of custom models: they are left out of the mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.components import Components
from tl_vpd.site import Site

SMALLEST = 1e-30
"""The least squared norm of a subcomponent that is divided by: one that writes nothing has no units."""


def units_of(site: Site) -> int | None:
    """The number of heads or neurons that a site writes to; None if it writes to neither."""
    if site.short in ("q", "k", "v"):
        return site.n_heads
    return site.d_out if site.short in ("in", "gate") else None


def units_used(U: Float[Tensor, "C d_out"], units: int, width: float) -> Float[Tensor, " C"]:
    """The soft number of the N ``units`` that each subcomponent writes to, at the width t."""
    squares = U.unflatten(-1, (units, -1)).square().sum(-1)
    return (squares / (squares + width / units * squares.sum(-1, keepdim=True).clamp(min=SMALLEST))).sum(-1)


def locality_terms(components: Components, width: float) -> Iterator[Float[Tensor, ""]]:
    """The terms of the loss at the width t, one per site that has units."""
    units = {name: n for name, site in components.sites.items() if (n := units_of(site)) is not None}
    total = sum(components.site_axis.counts[name] for name in units)
    for name, n in units.items():
        yield components.by_site[name](lambda V, U, n=n: units_used(U, n, width).sum() / total)


def locality(components: Components, width: float) -> Float[Tensor, ""]:
    """The loss at the width t; raises ValueError where no site has units."""
    check_units(components)
    return torch.stack(list(locality_terms(components, width))).sum()


def check_units(components: Components) -> None:
    """Raises ValueError unless the sites write to heads or neurons."""
    if all(units_of(site) is None for site in components.sites.values()):
        raise ValueError(
            f"No site writes to heads or neurons ({', '.join(components.sites)}), so locality has nothing to count: set "
            "coefficients.locality to 0."
        )
