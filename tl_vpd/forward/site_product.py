"""One site's product ``x @ W`` in one pass: its activations, and its output under a mask, in the layout of the pass."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.components import Layout
from tl_vpd.forward.blocked import BlockedMasks
from tl_vpd.forward.product import masked_output, plus_product
from tl_vpd.forward.traceable import TraceableMasks
from tl_vpd.masking import SiteMask

PassMasks = BlockedMasks | TraceableMasks
"""Masks of one pass that are made inside each site's product."""


class SiteProduct:
    """A site's product in one pass.

    Args:
        name: of the site.
        adapter: of the model.
        x: the site's input, as the model passes it.
        y: the output that the model computed, as the model passes it.
        V: read directions.
        U: write directions.
    """

    def __init__(
        self,
        name: str,
        adapter: Adapter,
        x: Tensor,
        y: Tensor,
        V: Float[Tensor, "d_in C"],
        U: Float[Tensor, "C d_out"],
    ) -> None:
        self.name, self.adapter, self.V, self.U = name, adapter, V, U
        self.layout: Layout = adapter.layout(name)
        self.model_x, self.model_y = x, y
        self._x: Tensor | None = None
        self._y: Tensor | None = None

    # Not functools.cached_property: its lock breaks the graphs of compiled models.
    @property
    def x(self) -> Float[Tensor, "*batch d_x"]:
        """The input in the layout of the pass."""
        if self._x is None:
            self._x = self.layout.aligned(self.model_x, has_heads=self.layout.x_has_heads)
        return self._x

    @property
    def y(self) -> Float[Tensor, "*batch d_y"]:
        """The output that the model computed, in the layout of the pass."""
        if self._y is None:
            self._y = self.layout.aligned(self.model_y, has_heads=self.layout.y_has_heads)
        return self._y

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """What was added to the output before it was tapped, which is never masked."""
        return self.adapter.bias(self.name)

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes of the product's tokens: (batch, pos), or (batch,) without positions."""
        return tuple(self.y.shape[: -2 if self.layout.by_head else -1])

    def acts(self, columns: Tensor | None = None) -> Float[Tensor, "*batch C"]:
        """Inner activations ``x @ V`` in the layout of the pass, of all subcomponents or of ``columns``."""
        V = self.V if columns is None else self.V[:, columns]
        return self.layout.acts(self.x, V.to(self.x.dtype))

    def masked(
        self,
        mask: SiteMask,
        *,
        acts: Tensor | None = None,
        patched_acts: Tensor | None = None,
        columns: Tensor | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """The output under a mask, in the shape in which the model passes it.

        Args:
            mask: without a head axis.
            acts: inner activations, where they have been computed already.
            patched_acts: activations after users' hooks, if they changed them.
            columns: the subcomponents that ``acts`` and ``mask`` are of (None: all); the others are left unmasked.
            overwrite: whether y may be overwritten, since no hook has seen it (saves a copy).
        """
        factor, delta, routed = mask.mask, mask.delta, mask.routed
        acts = self.acts(columns) if acts is None else acts
        factor = None if factor is None else factor.to(acts)
        delta = None if delta is None else delta.to(acts)
        if self.layout.by_head:
            factor = None if factor is None else factor.unsqueeze(-2)
            delta = None if delta is None else delta.unsqueeze(-1)
            routed = None if routed is None else routed.unsqueeze(-1)
        bias = None if delta is None else self.bias
        U = self.U if columns is None else self.U[columns]
        output = masked_output(
            self.y,
            acts,
            self.layout.write_directions(U.to(acts.dtype)),
            None if bias is None or self.layout.kind == "result" else self.layout.site_bias(bias),
            mask=factor,
            delta_mask=delta,
            routed=routed,
            patched_acts=patched_acts,
            overwrite=overwrite,
        )
        return output.reshape(self.model_y.shape)

    def added(self) -> Tensor:
        """``y + x @ V @ U``, in the shape in which the model passes y."""
        acts = self.acts()
        U = self.layout.write_directions(self.U.to(acts.dtype))
        return plus_product(self.y, acts, U, in_place=False).reshape(self.model_y.shape)

    def masked_by(self, masks: PassMasks) -> Tensor:
        """The output under masks that are made inside the product, in the shape in which the model passes it."""
        if not self.layout.by_head and self.layout.repeats == 1:
            return masks.product(self.name, self.model_y, self.model_x, self.V, self.U, self.bias)
        routed = None if masks.routing is None else masks.routing[self.name]
        return self.masked(SiteMask(*masks.mask(self.name), routed))
