"""The subcomponents of every site: read directions V and write directions U.

W = Σ_c V[:, c] ⊗ U[c, :] + Δ                                                                  (VPD paper, section 2)

>>> from tl_vpd.site import Site
>>> components = Components([Site("blocks.0.mlp.W_in", 4, 8)], {"blocks.0.mlp.W_in": 6})
>>> components.V["blocks.0.mlp.W_in"].shape, components.U["blocks.0.mlp.W_in"].shape
(torch.Size([4, 6]), torch.Size([6, 8]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.site import ConcatenatedAxis, Site


class SiteComponents(nn.Module):
    """V and U of one site.

    What trains V and U reads them through ``forward`` alone: where they are sharded (PyTorch's ``fully_shard``), they are whole
    only inside it and inside its backward.
    """

    def __init__(self, V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> None:
        super().__init__()
        self.V, self.U = nn.Parameter(V), nn.Parameter(U)

    def forward(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``function(V, U, *tensors)``."""
        return function(self.V, self.U, *tensors)


class _BySite(Mapping[str, Tensor]):
    """V or U of all sites by name."""

    def __init__(self, sites: Mapping[str, SiteComponents], matrix: Literal["V", "U"]) -> None:
        self._sites, self._matrix = sites, matrix

    def __getitem__(self, site: str) -> Tensor:
        matrix: Tensor = getattr(self._sites[site], self._matrix)
        return matrix

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


class Components(nn.Module):
    """V ``[d_in, C]`` and U ``[C, d_out]`` of every site.

    Initialised normal with standard deviation ``1/√d_in`` (V) and ``1/√C`` (U), as in the VPD paper (section 3, training), from a
    generator (None: PyTorch's global one). Raises ValueError where a site's C is below 1.
    """

    def __init__(
        self, sites: Sequence[Site], counts: Mapping[str, int], *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.sites = {site.name: site for site in sites}
        for name in self.sites:
            if counts[name] < 1:
                raise ValueError(f"C of {name} is {counts[name]}; a site needs at least one subcomponent.")
        self.site_axis = ConcatenatedAxis({name: counts[name] for name in self.sites})
        self.by_site: dict[str, SiteComponents] = {}
        for name, site in self.sites.items():
            C = counts[name]
            V = torch.randn(site.d_in, C, generator=generator) / site.d_in**0.5
            U = torch.randn(C, site.d_out, generator=generator) / C**0.5
            self.by_site[name] = SiteComponents(V, U)
        self._registered = nn.ModuleList(
            self.by_site.values()
        )  # names of sites may hold dots, those of modules may not

    @property
    def V(self) -> Mapping[str, Tensor]:
        """Read directions ``[d_in, C]`` by site."""
        return _BySite(self.by_site, "V")

    @property
    def U(self) -> Mapping[str, Tensor]:
        """Write directions ``[C, d_out]`` by site."""
        return _BySite(self.by_site, "U")

    def matrices(self) -> list[nn.Parameter]:
        """V of every site, then U of every site."""
        return [*self.V.values(), *self.U.values()]  # type: ignore[list-item]

    def delta(self, site: str, W: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "d_in d_out"]:
        """What the subcomponents do not explain: ``W − V @ U``."""
        delta: Tensor = self.by_site[site](lambda V, U, W: W - V @ U, W)
        return delta

    def acts(self, site: str, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch C"]:
        """Inner activations ``x @ V`` in the dtype of x, as constants."""
        acts: Tensor = self.by_site[site](lambda V, U, x: x @ V.detach().to(x.dtype), x)
        return acts

    def write_norms(self, site: str) -> Float[Tensor, " C"]:
        """``‖U[c]‖``, which turns inner activations into the ones that pictures show."""
        return self.U[site].norm(dim=-1)
