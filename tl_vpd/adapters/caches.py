"""Caches of passes whose W_O or W_out was not the stored one: ``ActivationCache`` would compute with the stored weight.

``stack_head_results`` computes every head's write into the residual stream as ``z @ W_O`` unless ``attn.hook_result`` was cached,
and ``stack_neuron_results`` every neuron's as ``post * W_out``. Where those sites were masked, ablated or patched in the
cached pass, the cache uses what was cached or refuses; everything else is ``ActivationCache``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor
from transformer_lens import ActivationCache

_NEURONS = "use component_acts of that site times its U, or mask the other sites alone (sites=...)"


class MaskedCache(ActivationCache):
    """The cache of a pass in which W_O or W_out of ``masked_sites`` did not write what their stored weights would."""

    def __init__(self, cache_dict: Any, model: Any, has_batch_dim: bool, masked_sites: Collection[str]) -> None:
        super().__init__(cache_dict, model, has_batch_dim=has_batch_dim)
        self.masked_sites = frozenset(masked_sites)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> MaskedCache:
        """As ActivationCache's."""
        cache = super().apply_slice_to_batch_dim(batch_slice)
        return MaskedCache(cache.cache_dict, cache.model, cache.has_batch_dim, self.masked_sites)

    def compute_head_results(self) -> None:
        """As ActivationCache's; raises ValueError where a W_O was masked and the results were not cached."""
        if not self._head_results_cached():
            super().compute_head_results()

    def _ensure_head_results(self) -> bool:
        """What 4.x's ``stack_head_results`` calls."""
        return self._head_results_cached() or super()._ensure_head_results()  # type: ignore[misc]

    def _head_results_cached(self) -> bool:
        """Whether every block's results are cached, ``[batch, pos, head, d_model]``, or can be computed (False)."""
        cfg = self.model.cfg
        results = [self.cache_dict.get(f"blocks.{layer}.attn.hook_result") for layer in range(cfg.n_layers)]
        axes = 4 if self.has_batch_dim else 3
        if all(isinstance(r, Tensor) and r.ndim == axes and r.shape[-2] == cfg.n_heads for r in results):
            return True
        self._refuse("W_O", "The results of heads", "call model.set_use_attn_result(True) before caching")
        return False

    def get_neuron_results(self, layer: int, *arguments: Any, **keywords: Any) -> Any:
        """As ActivationCache's; raises ValueError where a W_out was masked."""
        self._refuse("W_out", "The results of neurons", _NEURONS)
        return super().get_neuron_results(layer, *arguments, **keywords)

    def stack_neuron_results(self, layer: int, *arguments: Any, **keywords: Any) -> Any:
        """As ActivationCache's; raises ValueError where a W_out was masked."""
        self._refuse("W_out", "The results of neurons", _NEURONS)
        return super().stack_neuron_results(layer, *arguments, **keywords)

    def _refuse(self, weight: str, what: str, remedy: str) -> None:
        masked = sorted(name for name in self.masked_sites if name.endswith(weight))
        if masked:
            raise ValueError(
                f"{what} would be computed with the stored weight, but in the cached pass {', '.join(masked)} had another output "
                f"(it was masked, ablated or patched): {remedy}."
            )
