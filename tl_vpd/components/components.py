"""The subcomponents of every site: read directions V and write directions U.

W = Σ_c V[:, c] ⊗ U[c, :] + Δ

>>> from tl_vpd.site import Site
>>> parts = Components([Site("blocks.0.mlp.W_in", 4, 8)], {"blocks.0.mlp.W_in": 6})
>>> parts.V["blocks.0.mlp.W_in"].shape, parts.U["blocks.0.mlp.W_in"].shape
(torch.Size([4, 6]), torch.Size([6, 8]))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.site import ConcatenatedAxis, Site


class _BySite(Mapping[str, Tensor]):
    """A module's parameters by site name (module attributes cannot hold dots)."""

    def __init__(self, parameters: nn.ParameterDict) -> None:
        self._parameters = parameters

    def __getitem__(self, site: str) -> Tensor:
        return self._parameters[site.replace(".", "/")]

    def __iter__(self) -> Iterator[str]:
        return (name.replace("/", ".") for name in self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


class Components(nn.Module):
    """V ``[d_in, C]`` and U ``[C, d_out]`` of every site.

    Initialised normal with standard deviation ``1/√d_in`` (V) and ``1/√C`` (U), as in the VPD paper.

    Raises:
        ValueError: a site's C is below 1.
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
        self._V, self._U = nn.ParameterDict(), nn.ParameterDict()
        for name, site in self.sites.items():
            C = counts[name]
            key = name.replace(".", "/")
            self._V[key] = nn.Parameter(torch.randn(site.d_in, C, generator=generator) / site.d_in**0.5)
            self._U[key] = nn.Parameter(torch.randn(C, site.d_out, generator=generator) / C**0.5)

    @property
    def V(self) -> Mapping[str, Tensor]:
        """Read directions ``[d_in, C]`` by site: parameters, or tensors made of them where they are split among processes."""
        return _BySite(self._V)

    @property
    def U(self) -> Mapping[str, Tensor]:
        """Write directions ``[C, d_out]`` by site."""
        return _BySite(self._U)

    def delta(self, site: str, W: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "d_in d_out"]:
        """What the subcomponents leave over: ``W − V @ U``."""
        return W - self.V[site] @ self.U[site]

    def write_norms(self, site: str) -> Float[Tensor, " C"]:
        """``‖U[c]‖``, which turns inner activations into the ones shown to people."""
        return self.U[site].norm(dim=-1)
