"""Taps of a TransformerBridge where it bypasses the modules of its products, and what its modules are."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from tl_vpd.adapters.calls import Arguments, Keywords
from tl_vpd.adapters.linearised import SeeNorm, at_fixed_scale
from tl_vpd.adapters.taps import Read, ReadMethod, Write


def product_of(owner: nn.Module, short: str) -> nn.Module | None:
    """The module that holds the weight of ``q``, ``in``, ... inside an ``attn`` or ``mlp``."""
    return getattr(owner._modules.get(short), "original_component", None)


def flag_is_on(attn: nn.Module, flag: str) -> bool:
    """Whether an attention has one of TransformerLens's flags on."""
    return bool(getattr(attn.config, flag, False))


def splits_inputs(attn: nn.Module) -> bool:
    """Whether Q, K and V have an input for every head."""
    return flag_is_on(attn, "use_split_qkv_input") or flag_is_on(attn, "use_attn_in")


def projects_per_head(attn: nn.Module) -> bool:
    """Whether an attention can compute Q, K and V from an input for every head."""
    return hasattr(type(attn), HeadInputs.name)


def uses_processed_weights(mlp: nn.Module) -> bool:
    """Whether a gated MLP computes with its processed weights, past its modules."""
    return bool(getattr(mlp, "_use_processed_weights", False))


@runtime_checkable
class HasBatch(Protocol):
    """Something that knows the batch size of the pass that runs."""

    batch: int | None


class BatchedRows:
    """Restores the batch axis for layers that run on all tokens as rows (OPT's MLP), and flattens it again."""

    def __init__(self, adapter: HasBatch, read: Read, write: Write) -> None:
        self._adapter, self._read, self._write = adapter, read, write

    def _batched(self, rows: Tensor) -> Tensor:
        batch = self._adapter.batch
        return rows.unflatten(0, (batch, -1)) if rows.ndim == 2 and batch is not None else rows

    def read(self, x: Tensor) -> None:
        """Sends a layer's input to the reader."""
        self._read(self._batched(x))

    def write(self, y: Tensor) -> Tensor | None:
        """Sends a layer's output through the writer."""
        changed = self._write(self._batched(y))
        return None if changed is None else changed.reshape(y.shape)


class HeadInputs(ReadMethod):
    """Shows the input per head of an attention's ``q``, ``k`` or ``v`` (an entry is its short name and a reader)."""

    name = "_project_per_head_qkv"

    def __call__(self, product: nn.Module, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        for short, read in self.readers:
            if product is self.owner._modules[short]:
                read(x)
        return getattr(type(self.owner), self.name)(self.owner, product, x, *arguments, **keywords)


def norm_at_fixed_scale(see: SeeNorm, module: Any, arguments: Arguments, keywords: Keywords, output: Tensor) -> Tensor:
    """A forward hook: a NormalizationBridge's output at a constant scale."""
    x = arguments[0] if arguments else next(iter(keywords.values()))
    bare = "Pre" in type(module).__name__
    weight = None if bare else module.weight
    if weight is not None and getattr(module.config, "rmsnorm_uses_offset", False):
        weight = 1 + weight
    bias = None if bare or module.uses_rms_norm else getattr(module.original_component, "bias", None)
    linear = at_fixed_scale(x, output, weight, bias, centred=not module.uses_rms_norm)
    see(linear, bias)
    return linear
