"""Masks and ablations as lists of ``fwd_hooks``, for ``run_with_hooks`` and everything else that takes them.

They act on the HookPoints that ``Decomposition.attach`` puts on the model, so the model must be attached. ``mask_hooks`` and
``delta_hooks`` set masks; ``ablation_hooks`` multiplies the masks that earlier hooks set, or replaces activations by other
values, so that several lists compose in their order:

    y = y₀ − Σ_{c ∈ S} amount · a_c U[c]                  removed from the target (other masks and Δ at 1)
    y = y₀ − Σ_{c ∈ S} amount · (a_c − v_c) U[c]          mean- and resample-ablation, with the values v
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_vpd.checks import check_finite, shown
from tl_vpd.forward.attachments import attachments
from tl_vpd.forward.target_check import check_decomposition
from tl_vpd.hooks.mask_spec import MaskFunction, unrouted
from tl_vpd.hooks.positions import Positions
from tl_vpd.hooks.setters import Computed, SetDelta, SetTo
from tl_vpd.hooks.sparse import Ablate, Replace
from tl_vpd.importance import DecomposedWeights
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.masking.factors import factor_of
from tl_vpd.site import Subcomponent, nearest, select

FwdHooks = list[tuple[str, Callable[..., Any]]]
Subcomponents = str | Subcomponent | Sequence[str | Subcomponent]


def require_points(decomposition: DecomposedWeights, function: str, points: Sequence[tuple[str, str]]) -> None:
    """Checks that the decomposition is attached to a model with these HookPoints.

    Args:
        decomposition: of the hooks.
        function: that makes the hooks, for messages.
        points: (site, kind) of each.

    Raises:
        RuntimeError: it is attached to no model.
        KeyError: it is attached without one of the HookPoints.
    """
    attached = attachments(decomposition)
    if not attached:
        raise RuntimeError(
            f"{function} makes hooks for an attached model, and this decomposition is attached to none: call "
            "`with vpd.attach(model):` first."
        )
    for site, kind in points:
        if not any(kind in a.hook_points.get(site, {}) for a in attached):
            raise KeyError(
                f"{function} needs {decomposition.sites[site].hook_name(kind)}, which is not on the model: attach with "
                f"sites and hooks that include it, such as hooks=['component_acts', 'mask', 'delta_mask']."
            )


def indices_by_site(
    decomposition: DecomposedWeights, subcomponents: Subcomponents, *, name: str = "subcomponents"
) -> dict[str, tuple[int, ...]]:
    """Indices of subcomponents by site, each once.

    Args:
        decomposition: that has them.
        subcomponents: one or several.
        name: of the argument, for messages.

    Raises:
        TypeError: they are neither addresses nor Subcomponents.
        KeyError: a site does not exist.
        IndexError: a site has no such subcomponent.
        ValueError: an address is not written ``site:index``.
    """
    check_decomposition(decomposition)
    if isinstance(subcomponents, str | Subcomponent):
        subcomponents = [subcomponents]
    try:
        addresses = [Subcomponent.parse(address) for address in subcomponents]
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{name}={shown(subcomponents)}: give 'site:index', such as 'blocks.1.attn.W_Q:316', or several in a list."
        ) from error
    by_site: dict[str, dict[int, None]] = defaultdict(dict)
    for address in addresses:
        subcomponent = decomposition.subcomponent(address)
        by_site[subcomponent.site][subcomponent.index] = None
    return {site: tuple(indices) for site, indices in by_site.items()}


def mask_hooks(decomposition: DecomposedWeights, masks: Mapping[str, SiteMask | Tensor] | MaskFunction) -> FwdHooks:
    """``fwd_hooks`` that set the masks (and Δ's) of every site in ``masks``; the other sites are left unmasked.

    Args:
        decomposition: attached to the model that the hooks are for.
        masks: masks by site, or a function ``(site, acts) -> mask`` for every site, called in each pass.

    Raises:
        RuntimeError: the decomposition is attached to no model.
        KeyError: the masks name a site that is not decomposed, or the model was attached without its HookPoints.
        TypeError: a mask is neither a tensor nor a SiteMask.
        ValueError: there are no masks, one has another number of subcomponents, or factors are not finite.
    """
    check_decomposition(decomposition)
    sites = decomposition.sites
    if not isinstance(masks, Mapping):
        if not callable(masks):
            raise TypeError(
                f"Masks are a {type(masks).__name__}: give masks by site, or a function (site, acts) -> mask."
            )
        kinds = ("component_acts", "mask", "delta_mask")
        names = [n for n in sites if any(n in a.sites for a in attachments(decomposition))]
        require_points(decomposition, "mask_hooks", [(n, kind) for n in names for kind in kinds])
        computed = [(sites[name], Computed(name, masks)) for name in names]
        return [
            (site.hook_name(kind), hook)
            for site, hooks_of_site in computed
            for kind, hook in zip(kinds, (hooks_of_site.acts, hooks_of_site.mask, hooks_of_site.delta), strict=True)
        ]
    hooks: list[tuple[str, str, SetTo]] = []
    for name, site_mask in Masks.of(masks, decomposition.counts).items():
        mask = unrouted(site_mask)
        if mask.mask is not None:
            hooks.append((name, "mask", SetTo(mask.mask)))
        if mask.delta is not None:
            hooks.append((name, "delta_mask", SetTo(mask.delta.unsqueeze(-1))))
    require_points(decomposition, "mask_hooks", [(name, kind) for name, kind, _ in hooks])
    return [(sites[name].hook_name(kind), hook) for name, kind, hook in hooks]


def delta_hooks(
    decomposition: DecomposedWeights,
    value: float,
    *,
    sites: str | Sequence[str] | None = None,
    pos: Positions = None,
) -> FwdHooks:
    """``fwd_hooks`` that set the factor of Δ: 0 removes it, 1 leaves it.

    Args:
        decomposition: attached to the model that the hooks are for.
        value: the factor.
        sites: patterns (None: all that are attached).
        pos: positions of each forward pass (None: all).

    Raises:
        RuntimeError: the decomposition is attached to no model.
        KeyError: a pattern matches nothing, or the model was attached without ``delta_mask``.
    """
    check_decomposition(decomposition)
    value = factor_of("value", value)
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
    """``fwd_hooks`` that remove subcomponents from the target. Removing k of C computes k columns.

    Args:
        decomposition: attached to the model that the hooks are for.
        subcomponents: ``"blocks.1.attn.W_Q:316"`` or ``Subcomponent``s.
        pos: an index, indices or slice of positions of each forward pass (None: all). Generation with a KV cache sees one
            position at a time, so an index acts on every new token there.
        amount: 1 removes, 0.5 halves, 0 leaves, 2 reverses the contribution.
        values: by site, what the activations become instead of 0, ``[C]`` or ``[batch or 1, pos or 1, C]``: means
            (``component_acts(...).mean()``) or those of other prompts (``component_acts(...)``).

    Raises:
        RuntimeError: the decomposition is attached to no model.
        KeyError: a site does not exist, ``values`` lacks it, or the model was attached without the HookPoint.
        IndexError: a site has no such subcomponent.
        ValueError: there are no subcomponents, an address is not written ``site:index``, or ``values`` has another number of
            subcomponents.
    """
    chosen = indices_by_site(decomposition, subcomponents)
    amount = factor_of("amount", amount)
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(
            f"values is a {type(values).__name__}: give tensors by site, such as those of component_acts(...)."
        )
    if not chosen:
        raise ValueError("There are no subcomponents to ablate: the list is empty. Name one or more, as 'site:index'.")
    kind = "mask" if values is None else "component_acts"
    require_points(decomposition, "ablation_hooks", [(site, kind) for site in chosen])
    hooks: FwdHooks = []
    for site, indices in chosen.items():
        name = decomposition.sites[site].hook_name(kind)
        if values is None:
            hooks.append((name, Ablate(indices, pos, amount)))
            continue
        value = _values_of(values, site, decomposition.counts[site])
        hooks.append((name, Replace(indices, pos, value[..., list(indices)], amount)))
    return hooks


def _values_of(values: Mapping[str, Tensor], site: str, C: int) -> Float[Tensor, "*rows C"]:
    """The values of one site, checked as far as they can be before a pass."""
    if site not in values:
        raise KeyError(f"values has nothing for {site}{nearest(site, values)}.")
    value = values[site]
    if not isinstance(value, Tensor):
        raise TypeError(f"values of {site} is a {type(value).__name__}: give a tensor [C] or [batch, pos, C].")
    if value.ndim == 0 or value.shape[-1] != C:
        raise ValueError(
            f"values of {site} is {tuple(value.shape)}, and the site has {C} subcomponents: give one value each, on the last "
            "axis."
        )
    check_finite(f"values of {site}", value.float())  # as a model of single precision has them
    return value
