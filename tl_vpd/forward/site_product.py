"""One site's product ``x @ W`` in one pass: its activations, and its output under a mask, in the layout of the pass."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.components import Layout
from tl_vpd.forward.cast_weights import CastWeights
from tl_vpd.forward.product import masked_output
from tl_vpd.masking import SiteMask


class SiteProduct:
    """A site's product: x and y as the model passes them, V and U in the model's dtype.

    Args:
        name: of the site.
        adapter: of the model.
        weights: V and U in the model's dtype and on its device.
        x: the site's input.
        y: the output that the model computed.
    """

    def __init__(self, name: str, adapter: Adapter, weights: CastWeights, x: Tensor, y: Tensor) -> None:
        self.name, self.adapter, self.weights = name, adapter, weights
        self.layout: Layout = adapter.layout(name)
        self.shape = y.shape
        self.x = self.layout.aligned(x, has_heads=self.layout.x_has_heads)
        self.y = self.layout.aligned(y, has_heads=self.layout.y_has_heads)

    @property
    def plain(self) -> bool:
        """Whether the product is one of ``[*batch, d_in]`` with ``[d_in, d_out]``, with no head axis and no repeated head."""
        return not self.layout.by_head and self.layout.repeats == 1

    @property
    def V(self) -> Float[Tensor, "d_in C"]:
        """Read directions."""
        return self.weights.V[self.name]

    @property
    def U(self) -> Float[Tensor, "C d_out"]:
        """Write directions."""
        return self.weights.U[self.name]

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """What was added to the output before it was tapped, which is never masked."""
        return self.adapter.bias(self.name)

    def acts(self, columns: Tensor | None = None) -> Float[Tensor, "*batch C"]:
        """Inner activations ``x @ V`` in the pass's layout, of all subcomponents or of some."""
        return self.layout.acts(self.x, self.V if columns is None else self.V[:, columns])

    def masked(
        self,
        mask: SiteMask,
        *,
        acts: Tensor | None = None,
        patched_acts: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """The output under a mask, in the shape in which the model passes it.

        Args:
            mask: without a head axis.
            acts: inner activations where they are at hand (None: computed here).
            patched_acts: activations after users' hooks, if they changed them.
            columns: the subcomponents that ``acts`` and ``mask`` are of (None: all); the others are left unmasked.
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
        output = masked_output(
            self.y,
            acts,
            self.layout.write_directions(self.U if columns is None else self.U[columns]),
            None if bias is None or self.layout.kind == "result" else self.layout.site_bias(bias),
            mask=factor,
            delta_mask=delta,
            routed=routed,
            patched_acts=patched_acts,
            overwrite=True,
        )
        return output.reshape(self.shape)
