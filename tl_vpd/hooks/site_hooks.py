"""One site in one attached pass: its HookPoints, its mask, and its output.

In this order: nobody listens → nothing; only ``Sparse`` hooks → only their columns; otherwise activations through
``hook_component_acts``, masks through ``hook_mask`` and ``hook_delta_mask``, and the masked output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters.versions import HookPoint
from tl_vpd.forward import SiteProduct
from tl_vpd.hooks.mask_spec import unrouted
from tl_vpd.hooks.sparse import Sparse, SparsePoint
from tl_vpd.masking import SiteMask

Points = Mapping[str, HookPoint | None]
"""A site's HookPoints by kind, None where nobody listens."""
MaskOf = Callable[[Tensor], SiteMask]
"""Takes the site's activations and returns the mask of the innermost mask spec."""


def listening(points: Mapping[str, HookPoint], kind: str) -> HookPoint | None:
    """The HookPoint if anybody listens to it."""
    point = points.get(kind)
    return point if point is not None and (point._forward_hooks or point._backward_hooks) else None


def hooked_output(product: SiteProduct, points: Points, mask_of: MaskOf | None) -> Tensor | None:
    """A site's output after users' hooks and the mask spec (None: unchanged).

    Args:
        product: the site's in this pass.
        points: its HookPoints that somebody listens to.
        mask_of: makes the spec's mask from the site's activations (None: no spec is on).
    """
    layout, acts, name = product.layout, product.acts(), product.name
    after, shown = through(points["component_acts"], layout.shown(acts), lambda: layout.shown(product.acts()))
    after = None if after is None else returned(f"the activations of {name}", after, shown).to(shown)
    acts = acts if layout.by_head else shown
    # Where a spec is not routed its masks are 1, so that hooks act there as well.
    site_mask = SiteMask(None, None) if mask_of is None else unrouted(mask_of(shown))
    mask, delta = site_mask.mask, site_mask.delta
    if (point := points["mask"]) is not None:
        mask = point(
            _as_node(point, torch.ones_like(shown) if mask is None else mask.to(shown).expand_as(shown).clone())
        )
    if (point := points["delta_mask"]) is not None:
        # With a last axis of one, as TransformerLens's hook_scale has: run_with_cache finds positions by counting from it.
        ones = torch.ones_like(shown[..., :1])
        sent = ones if delta is None else delta.to(ones).unsqueeze(-1).expand_as(ones).clone()
        result = point(_as_node(point, sent))
        # SiteMask takes a number, and refuses what is neither.
        delta = result.squeeze(-1) if isinstance(result, Tensor) else result
    if after is None and mask is None and delta is None:
        return None
    patched = None if after is None else layout.patched(acts, shown, after)
    fitted = SiteMask(mask, delta).fitted(name, shown.shape, shown.device)  # hooks return what they like
    return product.masked(fitted, acts=acts, patched_acts=patched)


def sparse_output(product: SiteProduct, on_acts: list[Sparse], on_mask: list[Sparse], points: Points) -> Tensor:
    """A site's output after hooks that touch a few columns.

    Args:
        product: the site's in this pass.
        on_acts: the hooks on its activations.
        on_mask: the hooks on its mask.
        points: its HookPoints that somebody listens to.
    """
    indices = sorted({i for hook in (*on_acts, *on_mask) for i in hook.indices})
    column_of = {c: column for column, c in enumerate(indices)}
    columns = torch.tensor(indices, device=product.x.device)
    acts = product.acts(columns)
    shown = product.layout.shown(acts)
    after: Tensor | None = None
    for hook in on_acts:
        after = hook.at(column_of)(shown if after is None else after, points["component_acts"])
    mask: Tensor | None = None
    for hook in on_mask:
        mask = hook.at(column_of)(torch.ones_like(shown) if mask is None else mask, points["mask"])
    patched = None if after is None else product.layout.patched(acts, shown, after)
    return product.masked(SiteMask(mask, None), acts=acts, patched_acts=patched, columns=columns)


def returned(what: str, result: Any, sent: Tensor) -> Tensor:
    """What hooks made of a tensor.

    Args:
        what: the tensor is, for messages.
        result: of its HookPoint.
        sent: what went in.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has another shape.
    """
    shape = tuple(sent.shape)
    if not isinstance(result, Tensor):
        raise TypeError(f"A hook on {what} returned a {type(result).__name__}: return a tensor {shape} or None.")
    if result.shape != sent.shape:
        raise ValueError(f"A hook on {what} returned {tuple(result.shape)}: return {shape} or None.")
    return result


def _as_node(point: HookPoint, sent: Tensor) -> Tensor:
    """A mask as a node of autograd's graph, if a backward hook needs its gradient."""
    if not point._backward_hooks or not torch.is_grad_enabled() or sent.requires_grad:
        return sent
    return sent.requires_grad_().clone()


def sparse_hooks(points: Points, C: int) -> tuple[list[Sparse], list[Sparse]] | None:
    """The hooks on ``component_acts`` and ``mask``, if there are no others on the site and they touch less than half of C."""
    if points["delta_mask"] is not None:
        return None
    by_kind: list[list[Sparse]] = []
    for kind in ("component_acts", "mask"):
        point = points[kind]
        hooks = [] if point is None else point.sparse_hooks() if isinstance(point, SparsePoint) else None
        if hooks is None:
            return None
        by_kind.append(hooks)
    if 2 * sum(len(hook.indices) for hooks in by_kind for hook in hooks) > C:
        return None
    return by_kind[0], by_kind[1]


def through(
    point: HookPoint | None, acts: Float[Tensor, "*batch C"], again: Callable[[], Tensor]
) -> tuple[Any, Tensor]:
    """Sends activations through a HookPoint; returns (what came out, if it may differ, the unchanged activations).

    With gradients on, the result is a node of autograd's graph, so that a cached activation has a gradient.

    Args:
        point: None: nobody listens.
        acts: the activations.
        again: computes them once more, if a hook has written into them.
    """
    if point is None:
        return None, acts
    if acts.is_inference():
        sent = acts.clone()
        out = point(sent)
        return (None if out is sent and torch.equal(sent, acts) else out), acts
    sent = acts.view_as(acts) if torch.is_grad_enabled() else acts
    version = acts._version
    out = point(sent)
    if acts._version != version:  # a hook wrote into them
        return out, again()
    return (out if out is not sent or out.requires_grad else None), acts
