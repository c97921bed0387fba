"""The last product of a transformer, ``logits = x @ W_U + b_U``, taken out of it.

Logits are the largest tensor of a small model with a large vocabulary. With the product in hand, a loss can make them for a few
tokens at a time (``tl_vpd.divergence.unembedded_kl``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Unembedding:
    """``weight`` and ``bias`` of the product; both are constants."""

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None

    @classmethod
    def of(cls, module: Any) -> Unembedding | None:
        """A TransformerLens unembedding's (None: it is another kind of module, or somebody hooks what it gives)."""
        W, b = getattr(module, "W_U", None), getattr(module, "b_U", None)
        if not isinstance(W, Tensor) or hooked(module):
            return None
        return cls(W.detach().T, b.detach() if isinstance(b, Tensor) else None)

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        return len(self.weight)

    def to(self, dtype: torch.dtype) -> Unembedding:
        """The same, for products in another dtype."""
        return Unembedding(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def logits(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        """Logits in float32, from what the unembedding reads."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).float()


def hooked(module: nn.Module) -> bool:
    """Whether anything stands on a module or on one of its HookPoints."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())


@contextmanager
def left_out(module: nn.Module) -> Iterator[None]:
    """Inside, a module gives what it is given."""
    module.__dict__["forward"] = _given
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _given(x: Tensor, *rest: Any, **more: Any) -> Tensor:
    return x
