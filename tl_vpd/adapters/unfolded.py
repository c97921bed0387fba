"""A change of a processed weight as the change of the weight and bias that transformers stores.

TransformerLens folds norms into the weights that read through them, centres what reads and writes the residual stream, and folds
value biases into b_O. With a norm's scale w and bias b, and x̂ its input at unit scale:

    reading   x̂ @ ΔW                  =  (w ⊙ x̂ + b) @ ΔW' − b @ ΔW',     ΔW' = diag(1/w) ΔW
    W_O       (z − b_V) @ ΔW          =  z @ ΔW − b_V @ ΔW                (z has the value biases in transformers' model)

so the bias takes up the second terms. Centring takes nothing away that a model computes with. Which of the forms a weight was
decomposed in, its fingerprint tells.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters.plain import PlainWeights
from tl_vpd.components import Fingerprint
from tl_vpd.components.fingerprint import TOLERANCE

READS = ("W_Q", "W_K", "W_V", "W_in", "W_gate")
Change = tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"] | None]
"""Of a stored weight, and of its bias (None: it stays)."""


def stored_change(
    plain: PlainWeights,
    name: str,
    delta: Float[Tensor, "d_in d_out"],
    fingerprints: Mapping[str, Fingerprint],
    processing: Mapping[str, bool],
) -> Change:
    """The change of a stored weight and bias, from that of the weight as it was decomposed, in float64 on the CPU.

    Raises ValueError, which says why, where the weight is of another model, or what ``processing`` and fingerprints say of
    how the weights were processed cannot be undone.
    """
    form, size = form_of(plain, name, fingerprints[name])
    change, bias = delta, None
    if form.startswith("folded"):
        change, bias = _through_norm(plain, name, delta)
    elif name.endswith("W_O"):
        bias = _without_value_biases(plain, name, delta, fingerprints, processing)
    centred = delta - delta.mean(0 if name.endswith(READS) else 1, keepdim=True)
    for weight in forms(plain, name).values():
        if any(fingerprints[name].shows_change(weight, added) for added in (delta, centred)):
            raise ValueError(already(name))
    if not size <= TOLERANCE:
        raise ValueError(
            f"{name} of this model is not the decomposed weight, neither as it is stored nor with norms folded in: it differs by "
            f"{size:.3g} (allowed {TOLERANCE})."
        )
    return change, bias


def already(name: str) -> str:
    """The refusal of an edit that a weight has."""
    return f"{name} of this model has this edit already: baking it twice would double it."


def forms(plain: PlainWeights, name: str) -> dict[str, Float[Tensor, "d_in d_out"]]:
    """A stored weight in the forms in which it may have been decomposed, in float64 on the CPU."""
    W = plain.weight(name).double().cpu()
    if not name.endswith(READS):
        return {"stored": W, "centred": W - W.mean(1, keepdim=True)}
    folded = plain.norm(name)[0].double().cpu()[:, None] * W
    return {"stored": W, "folded": folded, "folded and centred": folded - folded.mean(0)}


def form_of(plain: PlainWeights, name: str, fingerprint: Fingerprint) -> tuple[str, float]:
    """In which form a weight was decomposed: the one that differs least from the fingerprint, and by how much."""
    sizes = {form: fingerprint.mismatch(Fingerprint.of(weight)) for form, weight in forms(plain, name).items()}
    return min(sizes.items(), key=lambda entry: entry[1])


def _through_norm(plain: PlainWeights, name: str, delta: Tensor) -> Change:
    scale, norm_bias = plain.norm(name)
    scale = scale.double().cpu()
    lost = (scale == 0) & (delta != 0).any(1)
    if bool(lost.any()):
        raise ValueError(
            f"{name} was decomposed with its norm folded in, and the norm's scale is 0 at {int(lost.sum())} dimensions that the "
            "edit reads: it cannot be translated back."
        )
    change = delta / torch.where(scale == 0, 1.0, scale)[:, None]
    if norm_bias is None or not bool(norm_bias.any()):
        return change, None
    if plain.bias(name) is None:
        raise ValueError(
            f"{name} was decomposed with its norm folded in, and the norm's bias needs a bias of {name}, which this model does "
            "not have: decompose a model loaded with fold_ln=False."
        )
    return change, -(norm_bias.double().cpu() @ change)


def _without_value_biases(
    plain: PlainWeights,
    name: str,
    delta: Tensor,
    fingerprints: Mapping[str, Fingerprint],
    processing: Mapping[str, bool],
) -> Tensor | None:
    """The change of b_O where the value biases were folded into it (None: they were not, or there are none)."""
    values = name.removesuffix("W_O") + "W_V"
    bias, norm_bias = plain.bias(values), plain.norm(values)[1]
    V_form = form_of(plain, values, fingerprints[values])[0] if values in fingerprints else None
    effective = torch.zeros(plain.weight(values).shape[1], dtype=torch.float64)
    if bias is not None:
        effective += bias.double().cpu()
    if norm_bias is not None and V_form != "stored":
        effective += norm_bias.double().cpu() @ plain.weight(values).double().cpu()
    unprocessed = V_form == "stored" and form_of(plain, name, fingerprints[name])[0] == "stored"
    folded = processing.get("fold_value_biases", False if unprocessed else None)
    if folded is False or not bool(effective.any()):
        return None
    if folded is None or V_form is None:
        raise ValueError(
            f"Whether {name} was decomposed with value biases folded into b_O is not known: decompose a model loaded with "
            "fold_value_biases=False, or bake into the model as it was decomposed."
        )
    if plain.bias(name) is None:
        raise ValueError(f"{name} was decomposed with value biases folded into b_O, which this model does not have.")
    heads, kv_heads = plain.heads
    by_head = effective.view(kv_heads, -1).repeat_interleave(heads // kv_heads, dim=0)
    return -(by_head.flatten() @ delta)
