"""A masked product of plain operations, for recording and compiling.

    y = b + m_Δ (y₀ − b) + (a ⊙ (m − m_Δ)) @ U,      a = x @ V                                  (VPD paper, section 2)

Masks are tensors in autograd's graph; there are no blocks, buffers or shapes that depend on data. Carried out operation by
operation, masks fill the memory; a compiler makes them inside the loops that use them. Routed tokens alone are computed, in slots
(``tl_vpd.forward.slots``).

    >>> masks = TraceableMasks.from_sources(g, sources, vpd.site_axis)      # doctest: +SKIP
    >>> logits = masked_model.masked(tokens, masks)                         # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.forward.slots import Slots
from tl_vpd.masking.masks import mask_of
from tl_vpd.site import ConcatenatedAxis


class TraceableMasks:
    """Masks and routing of one masked pass, and every site's product in it (a ``PassMasks``). Rows are tokens, or slots.

    Args:
        masks: by masked site; gradients reach them.
        deltas: Δ's masks by site.
        batch: the shape that tokens have in the model.
        slots: by site, where the masked path is computed (None: everywhere); elsewhere the output of a site is the model's.
    """

    def __init__(
        self,
        masks: Mapping[str, Float[Tensor, "rows _"]],
        deltas: Mapping[str, Float[Tensor, "rows 1"]],
        batch: torch.Size,
        slots: Mapping[str, Slots] | None = None,
    ) -> None:
        self.masks, self.deltas, self.batch, self.slots = masks, deltas, batch, slots
        self.routing = None if slots is None else {name: at.routed.view(batch) for name, at in slots.items()}

    @classmethod
    def from_sources(
        cls,
        g: Float[Tensor, "*batch C_total"],
        sources: Float[Tensor, "*batch C_and_deltas"],
        site_axis: ConcatenatedAxis,
    ) -> TraceableMasks:
        """Masks of all sites at all tokens.

        Args:
            g: importances.
            sources: in [0, 1], Δ's behind.
            site_axis: the sites on g's last axis.
        """
        r, deltas = sources.flatten(0, -2).split([site_axis.total, len(site_axis.names)], dim=-1)
        masks = site_axis.split_sites(mask_of(g.flatten(0, -2), r))
        return cls(masks, dict(zip(site_axis.names, deltas.split(1, dim=-1), strict=True)), g.shape[:-1])

    def __contains__(self, name: str) -> bool:
        return name in self.masks

    def mask(self, name: str) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, "*batch"]]:
        """One site's mask and Δ's, for layouts that ``product`` does not compute; at tokens that are not routed, any values."""
        mask, delta = self.masks[name], self.deltas[name]
        if self.slots is not None:
            mask, delta = self.slots[name].spread(mask), self.slots[name].spread(delta)
        return mask.view(*self.batch, -1), delta.view(self.batch)

    def product(
        self,
        name: str,
        y: Float[Tensor, "*y"],
        x: Float[Tensor, "*x"],
        V: Float[Tensor, "d_in C"],
        U: Float[Tensor, "C d_out"],
        bias: Float[Tensor, " d_out"] | None,
    ) -> Float[Tensor, "*y"]:
        """The site's masked output, in the precision of ``y``; y and x are with or without heads."""
        low, y_tokens, x_rows = y.dtype, y.reshape(-1, U.shape[1]), x.reshape(-1, V.shape[0])
        slots = None if self.slots is None else self.slots[name]
        y_rows, x_rows = (y_tokens, x_rows) if slots is None else (slots.gathered(y_tokens), slots.gathered(x_rows))
        acts, delta = x_rows.to(low) @ V.to(low), self.deltas[name]
        unmasked = y_rows * delta if bias is None else bias + (y_rows - bias) * delta
        output = unmasked.to(low) + (acts * (self.masks[name] - delta)).to(low) @ U.to(low)
        if slots is not None:
            output = torch.where(slots.routed[:, None], slots.spread(output), y_tokens)
        return output.view(y.shape)
