"""A decomposition in the dtype and on the device of the model it acts on.

V and U are cast to the model's dtype; Γ keeps its own, so that importances do not depend on the model's precision. Casts are
part of the graph: gradients reach the decomposition itself, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.components import Components
from tl_vpd.importance import DecomposedWeights
from tl_vpd.site import ConcatenatedAxis, Site


class _Cast(Mapping[str, Tensor]):
    """Tensors by site in another dtype or place; a cast without gradients is kept until the tensor changes."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.tensors, self.device, self.dtype = tensors, device, dtype
        self.constant = False
        self._kept: dict[str, tuple[tuple[int, int], Tensor]] = {}

    def follow(self, device: torch.device, dtype: torch.dtype) -> None:
        """From now on in another place or dtype."""
        self.device, self.dtype = device, dtype
        self._kept.clear()

    def __getitem__(self, site: str) -> Tensor:
        own = self.tensors[site].detach() if self.constant else self.tensors[site]
        if own.dtype == self.dtype and own.device == self.device:
            return own
        if own.requires_grad and torch.is_grad_enabled():
            return own.to(device=self.device, dtype=self.dtype)
        if own.is_inference():  # it does not say when it changes
            return own.to(device=self.device, dtype=self.dtype)
        mark = (own.data_ptr(), own._version)
        kept = self._kept.get(site)
        if kept is None or kept[0] != mark:
            # Outside inference mode, so that a later pass with gradients may use it.
            with torch.inference_mode(False):
                kept = self._kept[site] = (mark, own.detach().to(device=self.device, dtype=self.dtype))
        return kept[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class CastWeights:
    """V, U and Γ as a model's passes use them.

    Args:
        weights: Components will do, which have no Γ.
        device: of the model.
        dtype: of the model.
    """

    def __init__(self, weights: DecomposedWeights | Components, device: torch.device, dtype: torch.dtype) -> None:
        self.weights = weights
        self.device = device
        self.V = _Cast(weights.V, device, dtype)
        self.U = _Cast(weights.U, device, dtype)

    def follow(self, device: torch.device, dtype: torch.dtype) -> None:
        """Goes with a model that has been moved or cast."""
        if device == self.device and dtype == self.V.dtype:
            return
        self.device = device
        self.V.follow(device, dtype)
        self.U.follow(device, dtype)

    @contextmanager
    def constant(self) -> Iterator[None]:
        """Inside, V and U collect no gradients."""
        before = self.V.constant, self.U.constant
        self.V.constant = self.U.constant = True
        try:
            yield
        finally:
            self.V.constant, self.U.constant = before

    @property
    def sites(self) -> dict[str, Site]:
        """The decomposed sites by name."""
        return self.weights.sites

    @property
    def site_axis(self) -> ConcatenatedAxis:
        """Where each site lies on the concatenated axis."""
        return self.weights.site_axis

    def pre_sigmoid(
        self, inputs: Mapping[str, Float[Tensor, "batch *pos _"]], token_mask: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "batch *pos C_total"]:
        """Γ's values before squashing; see ``DecomposedWeights.pre_sigmoid``."""
        assert isinstance(self.weights, DecomposedWeights)
        return self.weights.pre_sigmoid(inputs, token_mask)
