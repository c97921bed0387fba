"""Metrics of a model's output that users give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Metric = Callable[[Tensor], Any]
"""Takes logits ``[batch, pos, vocab]`` of all prompts, gives one number, differentiable where an adversary is to use it."""


def number_of(value: Any) -> float:
    """A metric's result as a number; raises ValueError if it is not a single one."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"The metric gave a tensor of shape {tuple(value.shape)}; one number is needed.")
    return float(value.detach() if isinstance(value, Tensor) else value)
