"""VPD as one of the methods that are compared, and its result as every measure of ground truth reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tl_vpd.checks import config_of, flag
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.training import ExecutionConfig, SavingConfig, VPDConfig, decompose
from tl_vpd.training.data import Batches
from tl_vpd.training.state import latest_state


class RankOne:
    """The result of VPD and SPD: piece c of a site is ``V[:, c] ⊗ U[c]``, its importance Γ's."""

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
            _, site_inputs = masked_model.clean(inputs)
            return self.decomposition.site_axis.split_sites(self.decomposition.importances(site_inputs))

    def output(
        self, inputs: Shaped[Tensor, "rows pos ..."], masks: Mapping[str, Float[Tensor, "#rows #pos _"]]
    ) -> Float[Tensor, "rows pos d"]:
        """The model's output under masks, with every Δ ablated."""
        site_masks = {site: SiteMask(mask, torch.zeros(mask.shape[:-1])) for site, mask in masks.items()}
        with MaskedModel(self.decomposition, self.model) as masked_model:
            return masked_model.masked(inputs, Masks(site_masks), constant_weights=True)


def vpd(
    model: nn.Module,
    data: Batches,
    config: VPDConfig,
    *,
    folder: Path | None = None,
    progress: bool = False,
    compile: bool = False,
) -> RankOne:
    """Decomposes a model by VPD (``tl_vpd.baselines.methods`` documents the arguments).

    Raises:
        KeyboardInterrupt: the run was interrupted; with a folder, the next call continues it.
        TypeError: the config is another one.
    """
    config = config_of(VPDConfig, config)
    run = decompose(
        model,
        data,
        config,
        execution=ExecutionConfig(compile=flag("compile", compile)),
        saving=None if folder is None else SavingConfig(folder=folder, save_every=1_000, keep_states=1),
        resume=folder is not None and latest_state(folder / "state") is not None,
        progress=progress,
    )
    if not run.finished:
        raise KeyboardInterrupt
    return RankOne(run.decomposition, model)
