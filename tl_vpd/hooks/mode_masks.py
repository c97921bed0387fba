"""The masks of a mode that needs a clean pass first: importances of the call, or an attack on its output."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor

from tl_vpd.adapters.prompts import savable
from tl_vpd.forward import SitePass, SiteProduct
from tl_vpd.hooks.internal_passes import Call, InternalPasses
from tl_vpd.hooks.mask_spec import MaskSpec
from tl_vpd.losses import Reconstruction
from tl_vpd.masking import Masks, attacked_masks
from tl_vpd.masking.modes import masks_of_mode


def masks_of_call(passes: InternalPasses, spec: MaskSpec, call: Call) -> Masks:
    """Runs the clean pass that a mode needs and makes the call's masks from it.

    Args:
        passes: of the attached model.
        spec: of a mode that needs a clean pass.
        call: the user's.

    Raises:
        TypeError: the mode attacks the model's output, and that is not a tensor.
    """
    assert spec.mode is not None
    attacks = spec.mode == "adversarial"
    site_axis = passes.weights.site_axis
    output, run = passes.clean(call, "logits" if attacks else None)
    if spec.node_set is None or passes.wants_importances():
        g = passes.importances(call, run)
    if spec.node_set is not None:
        first = next(iter(run.inputs.values()))
        g = spec.indicator(first.new_zeros(*first.shape[:-1], site_axis.total), site_axis)

    def limited(masks: Masks) -> Masks:
        """Masks at the spec's sites and positions, and at real tokens."""
        names = [name for name in passes.weights.sites if name in spec.sites]
        token_mask = passes.token_mask(call)
        return Masks({n: spec.limited(n, masks[n], masks[n].mask, token_mask) for n in names})  # type: ignore[arg-type]

    if not attacks:
        options = {"threshold": spec.options.threshold, "delta": spec.options.delta, "generator": spec.generator}
        return limited(masks_of_mode(spec.mode, g, site_axis, **options))  # type: ignore[arg-type]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"The adversarial mode attacks the model's output, which must be a tensor and is a {type(output).__name__}."
        )
    # Under inference_mode the attack needs copies that autograd may save.
    with torch.inference_mode(False):
        arguments = tuple(map(savable, call.arguments))
        keywords = {k: savable(v) for k, v in call.keywords.items()}
        token_mask = savable(passes.token_mask(call))
        distance = Reconstruction(savable(output), "kl" if passes.adapter.return_types else "mse", token_mask)
        call.padding = (token_mask,)

        cache = passes.adapter.kv_cache(arguments, keywords)

        def loss(masks: Masks) -> Tensor:
            run = SitePass(partial(_masked, passes, limited(masks)))
            # Each pass goes on from the user's KV cache and must leave it as it is.
            again = (
                (arguments, keywords)
                if cache is None
                else passes.adapter.with_kv_cache(arguments, keywords, copy.deepcopy(cache))
            )
            with passes.internal(run):
                return distance(passes.adapter.call(*again, "logits"))

        attack = {"steps": spec.options.steps, "step_size": spec.options.step_size, "generator": spec.generator}
        masks = attacked_masks(savable(g.detach()), site_axis, loss, **attack)  # type: ignore[arg-type]
    return limited(masks)


def _masked(passes: InternalPasses, masks: Masks, name: str, x: Tensor, y: Tensor) -> Tensor | None:
    """A site's output in an internal pass."""
    if name not in masks:
        return None
    V, U = passes.weights.V[name], passes.weights.U[name]
    return SiteProduct(name, passes.adapter, x, y, V, U).masked(masks[name])
