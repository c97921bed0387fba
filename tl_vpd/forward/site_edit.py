"""A change of one site's weight that acts in forward passes while nothing is written.

    W' = W + Σ_k read_k ⊗ write_k

A change whose read direction is that of subcomponent c (``read = V[:, c]``) changes its write direction,
``U'[c] = U[c] + write``; any other one belongs to Δ. With ``y₀' = y₀ + x @ ΔW`` in the place of the model's output and U' in
the place of U, every masked pass is that of a model with the weight W' and a decomposition with U'. Its ``Δ' = W' − V U'``
differs from Δ by the second kind alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.forward.site_product import SiteProduct


@dataclass(frozen=True, eq=False)
class SiteEdit:
    """Rank-one changes of one site's weight.

    Attributes:
        reads: read directions.
        writes: what is written in addition along each; gradients reach them.
        indices: the subcomponent whose write direction each changes (None: it belongs to Δ).
    """

    reads: Float[Tensor, "d_in k"]
    writes: Float[Tensor, "k d_out"]
    indices: tuple[int | None, ...]

    def output(self, adapter: Adapter, name: str, x: Tensor, y: Tensor) -> Tensor:
        """The site's output with the changed weight, in the shape in which the model passes it.

        Args:
            adapter: of the model.
            name: of the site.
            x: its input, as the model passes it.
            y: its output, as the model passes it.
        """
        reads, writes = (t.to(device=y.device, dtype=y.dtype) for t in (self.reads, self.writes))
        return SiteProduct(name, adapter, x, y, reads, writes).added()

    def write_directions(self, U: Float[Tensor, "C d_out"]) -> Float[Tensor, "C d_out"]:
        """U with the changed write directions."""
        columns = [k for k, index in enumerate(self.indices) if index is not None]
        indices = [index for index in self.indices if index is not None]
        return U.index_add(0, torch.tensor(indices, dtype=torch.long, device=U.device), self.writes[columns].to(U))
