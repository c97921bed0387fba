"""One site in one attached pass: who listens to its HookPoints, what a mode wants, and the output that follows.

``write`` runs in this order: nobody listens → nothing; only ``Sparse`` hooks → their columns alone; else activations through
``hook_component_acts``, masks through ``hook_mask`` and ``hook_delta_mask``, and the masked output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.versions import HookPoint
from tl_vpd.components import Layout
from tl_vpd.hooks.parts import Parts
from tl_vpd.hooks.plans import unrouted
from tl_vpd.hooks.sparse import Sparse, SparsePoint
from tl_vpd.masking import SiteMask

Points = Mapping[str, HookPoint | None]
"""A site's HookPoints by kind, None where nobody listens."""
Planned = Callable[[Tensor], SiteMask]
"""Takes the site's activations; gives what the innermost masked context wants of it."""


def listening(points: Mapping[str, HookPoint], kind: str) -> HookPoint | None:
    """The HookPoint if anybody listens to it."""
    point = points.get(kind)
    return point if point is not None and (point._forward_hooks or point._backward_hooks) else None


class Product:
    """A site's product ``x @ W`` in one pass: x and y as the model passes them, V and U in the model's dtype."""

    def __init__(self, name: str, adapter: Adapter, parts: Parts, x: Tensor, y: Tensor) -> None:
        self.name, self.adapter, self.parts, self.raw = name, adapter, parts, y
        self.layout: Layout = adapter.layout(name)
        self.x = self.layout.aligned(x, has_heads=self.layout.x_has_heads)
        self.y = self.layout.aligned(y, has_heads=self.layout.y_has_heads)

    def acts(self, columns: Tensor | None = None) -> Tensor:
        """Inner activations in the product's layout, of all subcomponents or of some."""
        V = self.parts.V[self.name]
        return self.layout.acts(self.x, V if columns is None else V[:, columns])

    def masked(
        self, acts: Tensor, own: SiteMask, patched: Tensor | None = None, columns: Tensor | None = None
    ) -> Tensor:
        """The output under masks, in the shape in which the model passes it."""
        U = self.parts.U[self.name]
        output = self.layout.output(
            self.y,
            acts,
            U if columns is None else U[columns],
            None if own.delta is None else self.adapter.bias(self.name),
            mask=None if own.mask is None else own.mask.to(acts),
            delta_mask=None if own.delta is None else own.delta.to(acts),
            routed=own.routed,
            patched_acts=patched,
        )
        return output.reshape(self.raw.shape)

    def hooked(self, points: Points, planned: Planned | None) -> Tensor | None:
        """The output after users' hooks and the plan (None: unchanged)."""
        acts = self.acts()
        seen = self.layout.shown(acts)
        after, seen = through(points["component_acts"], seen, lambda: self.layout.shown(self.acts()))
        acts = acts if self.layout.by_head else seen
        # Where a plan is not routed its masks are 1, so that hooks act there as well.
        own = SiteMask(None, None) if planned is None else unrouted(planned(seen))
        mask, delta = own.mask, own.delta
        if (point := points["mask"]) is not None:
            mask = point(_awaited(point, torch.ones_like(seen) if mask is None else mask.expand_as(seen).clone()))
        if (point := points["delta_mask"]) is not None:
            # With a last axis of one, as TransformerLens's hook_scale has: run_with_cache finds positions by counting from it.
            ones = torch.ones_like(seen[..., :1])
            sent = ones if delta is None else delta.unsqueeze(-1).expand_as(ones).clone()
            delta = point(_awaited(point, sent)).squeeze(-1)
        if after is None and mask is None and delta is None:
            return None
        patched = None if after is None else self.layout.patched(acts, seen, after)
        return self.masked(acts, SiteMask(mask, delta), patched)

    def sparse(self, on_acts: list[Sparse], on_mask: list[Sparse], points: Points) -> Tensor:
        """The output after hooks that touch only some columns."""
        touched = sorted({i for hook in (*on_acts, *on_mask) for i in hook.indices})
        at = {c: column for column, c in enumerate(touched)}
        columns = torch.tensor(touched, device=self.x.device)
        acts = self.acts(columns)
        seen = self.layout.shown(acts)
        after: Tensor | None = None
        for hook in on_acts:
            after = hook.at(at)(seen if after is None else after, points["component_acts"])
        mask: Tensor | None = None
        for hook in on_mask:
            mask = hook.at(at)(torch.ones_like(seen) if mask is None else mask, points["mask"])
        patched = None if after is None else self.layout.patched(acts, seen, after)
        return self.masked(acts, SiteMask(mask, None), patched, columns)


def _awaited(point: HookPoint, sent: Tensor) -> Tensor:
    """A mask as a node of the graph where a backward hook waits for its gradient."""
    if not point._backward_hooks or not torch.is_grad_enabled() or sent.requires_grad:
        return sent
    return sent.requires_grad_().clone()


def sparse_hooks(points: Points, C: int) -> tuple[list[Sparse], list[Sparse]] | None:
    """The hooks on ``component_acts`` and ``mask``, if there are no others on the site and they touch less than half of C."""
    if points["delta_mask"] is not None:
        return None
    found: list[list[Sparse]] = []
    for kind in ("component_acts", "mask"):
        point = points[kind]
        own = [] if point is None else point.sparse_hooks() if isinstance(point, SparsePoint) else None
        if own is None:
            return None
        found.append(own)
    if 2 * sum(len(hook.indices) for hooks in found for hook in hooks) > C:
        return None
    return found[0], found[1]


def through(
    point: HookPoint | None, acts: Float[Tensor, "*batch C"], again: Callable[[], Tensor]
) -> tuple[Tensor | None, Tensor]:
    """Sends activations through a HookPoint; gives (what came out if it may differ, the activations as they were).

    With gradients on, what came out is its own node of the graph, so that a cached activation has a gradient.
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
