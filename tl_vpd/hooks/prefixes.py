"""The clean run of the tokens in a user's KV cache: what masked generation needs besides that cache.

Under masks, the user's KV cache holds keys and values of the *masked* run. Importances come from the clean run, which needs a
cache of its own, and from Γ's keys and values. Both belong to the user's cache: they are found by it, grow with it, and go when
it goes.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.importance import GammaCache


@dataclass
class CleanPrefix:
    """The tokens in a user's KV cache, as the clean run and Γ have read them.

    Attributes:
        cache: the model's keys and values of the clean run (None: the user's own are, since no call has been masked).
        gamma: Γ's keys and values.
        length: number of tokens.
        token_mask: False at padding (None: no padding).
        masked: whether a call has been masked.
    """

    cache: Any
    gamma: GammaCache = field(default_factory=GammaCache)
    length: int = 0
    token_mask: Bool[Tensor, "batch pos"] | None = None
    masked: bool = False

    def follow(self, *, masked: bool) -> None:
        """Notes how the next call runs.

        Args:
            masked: whether it is masked; otherwise its own keys and values are the clean ones.

        Raises:
            ValueError: it is not, and calls before it were.
        """
        if self.masked and not masked:
            raise ValueError("The KV cache was filled under masks: go on in a masked context, or use a new cache.")
        self.masked = masked
        if not masked:
            self.cache = None

    def check_gamma(self) -> None:
        """Raises ValueError unless Γ has read every token of the prefix."""
        if self.gamma.length not in (0, self.length):  # 0: each token is read alone
            raise ValueError(
                f"The KV cache holds {self.length} tokens, and importances have been computed for {self.gamma.length} of them: "
                "use a new cache in this context, or generate with use_past_kv_cache=False."
            )

    def extend(self, batch: int, n: int, token_mask: Bool[Tensor, "batch n"] | None) -> None:
        """Notes new tokens.

        Args:
            batch: rows.
            n: new tokens.
            token_mask: False at those that are padding (None: no padding).
        """
        if self.token_mask is not None or token_mask is not None:
            device = token_mask.device if token_mask is not None else self.token_mask.device  # type: ignore[union-attr]
            before, new = (
                torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask
                for mask, length in ((self.token_mask, self.length), (token_mask, n))
            )
            self.token_mask = torch.cat([before, new], dim=1)
        self.length += n


class CleanPrefixes:
    """The clean prefixes of the KV caches that are in use.

    Args:
        adapter: of the model.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._by_cache: dict[int, tuple[weakref.ref[Any], CleanPrefix]] = {}

    def of(self, cache: Any) -> CleanPrefix:
        """The prefix of a KV cache (None: one that the call is going to make); of a frozen one, a copy.

        Raises:
            ValueError: the cache holds tokens that the clean run has not read.
        """
        if cache is None:
            return CleanPrefix(self.adapter.empty_kv_cache(None))
        length, stored = self.adapter.kv_cache_length(cache), self._by_cache.get(id(cache))
        if stored is None and length == 0:
            prefix = CleanPrefix(self.adapter.empty_kv_cache(cache))
            if not self.adapter.kv_cache_frozen(cache):
                self.keep(cache, prefix)
            return prefix
        if stored is None or stored[1].length != length:
            known = 0 if stored is None else stored[1].length
            raise ValueError(
                f"The KV cache holds {length} tokens, and importances have been computed for {known} of them: use a new cache in "
                "this context, or generate with use_past_kv_cache=False."
            )
        return copy.deepcopy(stored[1]) if self.adapter.kv_cache_frozen(cache) else stored[1]

    def keep(self, cache: Any, prefix: CleanPrefix) -> None:
        """Keeps a prefix for as long as a KV cache exists."""
        key = id(cache)
        self._by_cache[key] = weakref.ref(cache, lambda _: self._by_cache.pop(key, None)), prefix
