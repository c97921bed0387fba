"""A decomposition in the dtype and on the device of the model it acts on.

V and U are cast to the model's dtype; Γ keeps its dtype, so that importances do not depend on the model's precision. Casts are
part of autograd's graph: gradients reach the decomposition itself, on whatever device it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.components import Components
from tl_vpd.forward.site_edit import SiteEdit
from tl_vpd.importance import DecomposedWeights, GammaCache
from tl_vpd.importance.inputs import layer_of
from tl_vpd.site import ConcatenatedAxis, Site


class CastTensors(Mapping[str, Tensor]):
    """Tensors by site in another dtype or on another device. A cast without gradients is reused until its tensor changes.

    Args:
        tensors: by site.
        device: of the casts.
        dtype: of the casts.

    Attributes:
        edits: changes of write directions, where the tensors are those.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.tensors, self.device, self.dtype = tensors, device, dtype
        self._casts: dict[str, tuple[tuple[int, int], Tensor]] = {}
        self.edits: list[Mapping[str, SiteEdit]] = []

    def follow(self, device: torch.device, dtype: torch.dtype) -> None:
        """Changes the device and dtype of all casts from now on."""
        self.device, self.dtype = device, dtype
        self._casts.clear()

    def __getitem__(self, site: str) -> Tensor:
        cast = self._cast(site)
        for edit in self.edits:
            cast = edit[site].write_directions(cast) if site in edit else cast
        return cast

    def _cast(self, site: str) -> Tensor:
        tensor = self.tensors[site]
        same = tensor.dtype == self.dtype and tensor.device == self.device
        if same or (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor.to(device=self.device, dtype=self.dtype)
        return self._reused(site, tensor)

    def constant(self, site: str) -> Tensor:
        """One site's tensor without gradients."""
        tensor = self.tensors[site].detach()
        same = tensor.dtype == self.dtype and tensor.device == self.device
        return tensor if same else self._reused(site, tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def _reused(self, site: str, tensor: Tensor) -> Tensor:
        """A cast without gradients, from the call before if the tensor has not changed since."""
        if tensor.is_inference():  # its changes are not counted
            return tensor.to(device=self.device, dtype=self.dtype)
        mark = (tensor.data_ptr(), tensor._version)
        stored = self._casts.get(site)
        if stored is None or stored[0] != mark:
            # Outside inference mode, so that a later pass with gradients can use it.
            with torch.inference_mode(False):
                stored = self._casts[site] = (mark, tensor.detach().to(device=self.device, dtype=self.dtype))
        return stored[1]


class CastWeights:
    """V, U and Γ as a model's passes use them.

    Args:
        weights: the decomposition, or ``Components``, which have no Γ.
        device: of the model.
        dtype: of the model.
    """

    def __init__(self, weights: DecomposedWeights | Components, device: torch.device, dtype: torch.dtype) -> None:
        self.weights = weights
        self.components = weights if isinstance(weights, Components) else weights.components
        self.device = device
        self.V = CastTensors(weights.V, device, dtype)
        self.U = CastTensors(weights.U, device, dtype)

    def follow(self, device: torch.device, dtype: torch.dtype) -> None:
        """Goes with a model that has been moved or cast."""
        if device == self.device and dtype == self.V.dtype:
            return
        self.device = device
        self.V.follow(device, dtype)
        self.U.follow(device, dtype)

    @property
    def sites(self) -> dict[str, Site]:
        """The decomposed sites by name."""
        return self.weights.sites

    @property
    def site_axis(self) -> ConcatenatedAxis:
        """Where each site lies on the concatenated axis."""
        return self.weights.site_axis

    @property
    def streams(self) -> dict[str, int]:
        """Blocks whose residual stream Γ reads, by the name of that input."""
        names = self.weights.gamma_inputs if isinstance(self.weights, DecomposedWeights) else ()
        return {name: layer for name in names if (layer := layer_of(name)) is not None}

    def importances(
        self,
        inputs: Mapping[str, Float[Tensor, "batch *pos _"]],
        token_mask: Bool[Tensor, "batch pos_of_keys"] | None,
        cache: GammaCache | None = None,
    ) -> Float[Tensor, "batch *pos C_total"]:
        """Causal importances; see ``DecomposedWeights.importances``."""
        assert isinstance(self.weights, DecomposedWeights)
        return self.weights.importances(inputs, token_mask, cache)
