"""The masks of a mode that needs a clean pass first: importances of the call, or an attack on its output."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
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
    if spec.node_set is None:
        g = passes.importances(call, run)
    else:
        if passes.wants_importances():
            passes.importances(call, run)
        first = next(iter(run.inputs.values()))
        g = spec.indicator(first.new_zeros(*first.shape[:-1], site_axis.total), site_axis)
    if not attacks:
        options = spec.options
        return _limited(
            passes,
            spec,
            call,
            masks_of_mode(
                spec.mode,
                g,
                site_axis,
                threshold=options.threshold,
                delta=options.delta,
                generator=spec.generator,
            ),
        )
    if not isinstance(output, Tensor):
        raise TypeError(
            f"The adversarial mode attacks the model's output, which must be a tensor and is a {type(output).__name__}."
        )
    return _attacked(passes, spec, call, output, g)


def _attacked(
    passes: InternalPasses,
    spec: MaskSpec,
    call: Call,
    output: Float[Tensor, "batch ..."],
    g: Float[Tensor, "batch *pos C_total"],
) -> Masks:
    """The masks of the adversarial mode."""
    # Under inference_mode the attack needs copies that autograd may save.
    with torch.inference_mode(False):
        arguments = tuple(map(savable, call.arguments))
        keywords = {k: savable(v) for k, v in call.keywords.items()}
        token_mask = savable(passes.token_mask(call))
        constant = savable(g.detach())
        distance = Reconstruction(savable(output), "kl" if passes.adapter.return_types else "mse", token_mask)
    call.padding = (token_mask,)

    def loss(masks: Masks) -> Tensor:
        with passes.internal(SitePass(partial(_masked, passes, _limited(passes, spec, call, masks)))):
            return distance(passes.adapter.call(arguments, keywords, "logits"))

    with torch.inference_mode(False):
        masks = attacked_masks(
            constant,
            passes.weights.site_axis,
            loss,
            steps=spec.options.steps,
            step_size=spec.options.step_size,
            generator=spec.generator,
        )
    return _limited(passes, spec, call, masks)


def _masked(passes: InternalPasses, masks: Masks, name: str, x: Tensor, y: Tensor) -> Tensor | None:
    """A site's output in an internal pass."""
    if name not in masks:
        return None
    V, U = passes.weights.V[name], passes.weights.U[name]
    return SiteProduct(name, passes.adapter, x, y, V, U).masked(masks[name])


def _limited(passes: InternalPasses, spec: MaskSpec, call: Call, masks: Masks) -> Masks:
    """Masks at the spec's sites and positions, and at real tokens."""
    names = [name for name in passes.weights.sites if name in spec.sites]
    token_mask = passes.token_mask(call)
    return Masks({n: spec.limited(n, masks[n], masks[n].mask, token_mask) for n in names})  # type: ignore[arg-type]
