"""Masks that are made inside each product: what ``MaskedModel`` needs of ``BlockedMasks`` and ``TraceableMasks``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class PassMasks(Protocol):
    """Masks of one pass by site; a site that is not in them runs unmasked."""

    @property
    def routing(self) -> Mapping[str, Bool[Tensor, "*batch"]] | None:
        """By site, where the masked path is computed (None: everywhere)."""

    def __contains__(self, name: str) -> bool: ...

    def mask(self, name: str) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, "*batch"]]:
        """One site's mask and Δ's as tensors, for layouts that ``product`` does not compute."""

    def product(
        self,
        name: str,
        y: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"],
        V: Float[Tensor, "d_in C"],
        U: Float[Tensor, "C d_out"],
        bias: Float[Tensor, " d_out"] | None,
    ) -> Float[Tensor, "*batch d_out"]:
        """The site's masked output (``tl_vpd.forward.product``) from the output y that the model computed and its input x."""
