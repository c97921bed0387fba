"""Masks and ablations as lists of ``fwd_hooks``, for ``run_with_hooks`` and everything else that takes them.

They act on the HookPoints that ``Decomposition.attach`` puts on the model, so the model must be attached. ``mask_hooks`` and
``delta_hooks`` set masks; ``ablation_hooks`` multiplies into whatever masks stand, or moves activations to other values, so that
several lists compose in the order given:

    y = y₀ − Σ_{c ∈ S} amount · a_c U[c]                  out of the target (other masks and Δ at 1)
    y = y₀ − Σ_{c ∈ S} amount · (a_c − v_c) U[c]          mean- and resample-ablation, v the values instead
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.forward.attachments import attachments
from tl_vpd.hooks.mask_spec import MaskFunction, check_mask, unrouted
from tl_vpd.hooks.sparse import Ablate, Positions, Replace, rows_of
from tl_vpd.masking import SiteMask
from tl_vpd.site import Subcomponent, nearest, select

FwdHooks = list[tuple[str, Callable[..., Any]]]
Subcomponents = str | Subcomponent | Sequence[str | Subcomponent]


@dataclass(frozen=True)
class SetTo:
    """A hook that puts a given tensor in the place of the mask."""

    value: Float[Tensor, "*batch"] = field(repr=False)  # TransformerLens names hooks by their repr

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        try:
            return self.value.to(tensor).expand_as(tensor)
        except RuntimeError as error:
            raise ValueError(
                f"The mask for {hook.name} is {tuple(self.value.shape)}, this forward pass needs {tuple(tensor.shape)}: "
                "masks belong to the prompt they were made for (generation with a KV cache sees one position at a time)."
            ) from error


@dataclass(frozen=True)
class SetDelta:
    """A hook that sets Δ's factor at some positions."""

    value: float
    pos: Positions

    def __call__(self, tensor: Float[Tensor, "batch *pos 1"], hook: Any) -> Float[Tensor, "batch *pos 1"]:
        """Δ's factors with some of them set."""
        if self.pos is None:
            return torch.full_like(tensor, self.value)
        if tensor.ndim < 3:
            raise IndexError(f"pos={self.pos} was given, and {hook.name} has no positions.")
        return tensor.index_fill(1, rows_of(self.pos, tensor.shape[1], tensor.device, hook.name), self.value)


class Computed:
    """Three hooks that call a function ``(site, acts) -> mask`` once in each pass and set what it gives."""

    def __init__(self, site: str, function: MaskFunction) -> None:
        self.site, self.function = site, function
        self.own = SiteMask(None, None)

    def acts(self, tensor: Tensor, hook: Any) -> None:
        """On ``component_acts``: computes the masks."""
        given = self.function(self.site, tensor)
        self.own = given if isinstance(given, SiteMask) else SiteMask(given, None)
        check_mask(self.site, self.own, tensor)
        self.own = unrouted(self.own)

    def mask(self, tensor: Tensor, hook: Any) -> Tensor:
        """On ``mask``: sets it."""
        return tensor if self.own.mask is None else self.own.mask.to(tensor).expand_as(tensor)

    def delta(self, tensor: Tensor, hook: Any) -> Tensor:
        """On ``delta_mask``: sets it."""
        return tensor if self.own.delta is None else self.own.delta.unsqueeze(-1).to(tensor).expand_as(tensor)


def require_points(decomposition: DecomposedWeights, function: str, wanted: Sequence[tuple[str, str]]) -> None:
    """Raises unless the decomposition is attached somewhere with these (site, kind) HookPoints.

    Raises:
        RuntimeError: it is attached to no model. KeyError: it is attached without one of the HookPoints.
    """
    attached = attachments(decomposition)
    if not attached:
        raise RuntimeError(
            f"{function} makes hooks for an attached model, and this decomposition is attached to none: call "
            "`with vpd.attach(model):` first."
        )
    for site, kind in wanted:
        if not any(kind in a.hook_points.get(site, {}) for a in attached):
            raise KeyError(
                f"{function} needs {decomposition.sites[site].hook_name(kind)}, which is not on the model: attach with "
                f"sites and hooks that include it, such as hooks=['component_acts', 'mask', 'delta_mask']."
            )


def indices_by_site(decomposition: DecomposedWeights, subcomponents: Subcomponents) -> dict[str, tuple[int, ...]]:
    """Indices of subcomponents by site, each once.

    Raises:
        KeyError, IndexError, ValueError: a subcomponent does not exist or is not written ``site:index``.
    """
    if isinstance(subcomponents, str | Subcomponent):
        subcomponents = [subcomponents]
    found: dict[str, dict[int, None]] = defaultdict(dict)
    for address in subcomponents:
        own = decomposition.subcomponent(address)
        found[own.site][own.index] = None
    return {site: tuple(indices) for site, indices in found.items()}


def mask_hooks(decomposition: DecomposedWeights, masks: Mapping[str, SiteMask] | MaskFunction) -> FwdHooks:
    """``fwd_hooks`` that set the masks (and Δ's) of every site in ``masks``; the other sites stay as they are.

    Args:
        masks: masks by site, or a function ``(site, acts) -> mask`` for every site, called in each pass.

    Raises:
        RuntimeError: the decomposition is attached to no model.
        KeyError: the masks name a site that is not decomposed, or the model was attached without its HookPoints.
    """
    sites = decomposition.sites
    if not isinstance(masks, Mapping):
        kinds = ("component_acts", "mask", "delta_mask")
        names = [n for n in sites if any(n in a.sites for a in attachments(decomposition))]
        require_points(decomposition, "mask_hooks", [(n, kind) for n in names for kind in kinds])
        computed = [(sites[name], Computed(name, masks)) for name in names]
        return [
            (site.hook_name(kind), hook)
            for site, own in computed
            for kind, hook in zip(kinds, (own.acts, own.mask, own.delta), strict=True)
        ]
    hooks: list[tuple[str, str, SetTo]] = []
    for name, given in masks.items():
        if name not in sites:
            raise KeyError(f"The masks name {name!r}, which this decomposition does not have{nearest(name, sites)}.")
        own = unrouted(given)
        if own.mask is not None:
            hooks.append((name, "mask", SetTo(own.mask)))
        if own.delta is not None:
            hooks.append((name, "delta_mask", SetTo(own.delta.unsqueeze(-1))))
    require_points(decomposition, "mask_hooks", [(name, kind) for name, kind, _ in hooks])
    return [(sites[name].hook_name(kind), hook) for name, kind, hook in hooks]


def delta_hooks(
    decomposition: DecomposedWeights,
    value: float,
    *,
    sites: str | Sequence[str] | None = None,
    pos: Positions = None,
) -> FwdHooks:
    """``fwd_hooks`` that set the factor of Δ: 0 takes it out, 1 leaves it.

    Args:
        sites: patterns (None: all that are attached). pos: positions of each forward pass (None: all).

    Raises:
        RuntimeError: the decomposition is attached to no model. KeyError: a pattern matches nothing, or the model was attached
            without ``delta_mask``.
    """
    names = [n for n in decomposition.sites if any(n in a.sites for a in attachments(decomposition))]
    names = select(sites, names) if names else []
    require_points(decomposition, "delta_hooks", [(name, "delta_mask") for name in names])
    return [(decomposition.sites[name].hook_name("delta_mask"), SetDelta(value, pos)) for name in names]


def ablation_hooks(
    decomposition: DecomposedWeights,
    subcomponents: Subcomponents,
    *,
    pos: Positions = None,
    amount: float = 1.0,
    values: Mapping[str, Tensor] | None = None,
) -> FwdHooks:
    """``fwd_hooks`` that take subcomponents out of the target. Taking out k of C costs k of C.

    Args:
        subcomponents: ``"blocks.1.attn.W_Q:316"`` or ``Subcomponent``s.
        pos: an index, indices or slice of positions of each forward pass (None: all). Generation with a KV cache sees one
            position at a time, so an index acts on every new token there.
        amount: 1 removes, 0.5 halves, 0 leaves, 2 reverses the contribution.
        values: by site, what the activations become instead of 0, broadcasting to ``[batch, pos, C]``: means
            (``component_acts(...).mean()``) or those of other prompts (``component_acts(...)``).

    Raises:
        RuntimeError: the decomposition is attached to no model.
        KeyError, IndexError, ValueError: a subcomponent does not exist or is not written ``site:index``; ``values`` lacks a
            site or has another number of subcomponents; the model was attached without the HookPoint.
    """
    chosen = indices_by_site(decomposition, subcomponents)
    kind = "mask" if values is None else "component_acts"
    require_points(decomposition, "ablation_hooks", [(site, kind) for site in chosen])
    hooks: FwdHooks = []
    for site, indices in chosen.items():
        name = decomposition.sites[site].hook_name(kind)
        if values is None:
            hooks.append((name, Ablate(indices, pos, amount)))
            continue
        if site not in values:
            raise KeyError(f"values has nothing for {site}{nearest(site, values)}.")
        own = values[site]
        if own.shape[-1] != decomposition.counts[site]:
            raise ValueError(
                f"values of {site} has {own.shape[-1]} subcomponents on its last axis, the site has "
                f"{decomposition.counts[site]}."
            )
        hooks.append((name, Replace(indices, pos, own[..., list(indices)], amount)))
    return hooks
