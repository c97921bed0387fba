"""Rank-one subcomponents with a Γ, as every measure of ground truth takes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.importance import lower_leaky
from tl_vpd.masking import Masks, SiteMask


class RankOne:
    """What VPD and SPD find: piece c of a site is ``V[:, c] ⊗ U[c]``, its importance Γ's."""

    def __init__(self, decomposition: Decomposition, model: nn.Module) -> None:
        self.decomposition, self.model = decomposition, model

    def pieces(self, site: str) -> Float[Tensor, "n d_in d_out"]:
        """Every subcomponent of a site as a matrix."""
        V, U = self.decomposition.V[site].detach(), self.decomposition.U[site].detach()
        return torch.einsum("i c, c o -> c i o", V, U)

    @torch.no_grad()
    def importances(self, inputs: Shaped[Tensor, "rows pos ..."]) -> dict[str, Float[Tensor, "rows pos _"]]:
        """Causal importances by site."""
        with MaskedModel(self.decomposition, self.model) as masked_model:
            _, seen = masked_model.clean(inputs)
            return self.decomposition.site_axis.split_sites(lower_leaky(self.decomposition.pre_sigmoid(seen)))

    def output(
        self, inputs: Shaped[Tensor, "rows pos ..."], masks: Mapping[str, Float[Tensor, "#rows #pos _"]]
    ) -> Float[Tensor, "rows pos d"]:
        """The model's output under masks, with every Δ ablated."""
        given = {site: SiteMask(mask, torch.zeros(mask.shape[:-1])) for site, mask in masks.items()}
        with MaskedModel(self.decomposition, self.model) as masked_model:
            return masked_model.masked(inputs, Masks(given), constant_weights=True)
