"""Metrics of a model's output that users give."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from tl_vpd.checks import shown

Metric = Callable[[Tensor], Any]
"""Takes logits ``[batch, pos, vocab]`` of all prompts, gives one number, differentiable where an adversary is to use it."""


def check_metric(metric: Any) -> None:
    """Raises TypeError unless a metric can be called."""
    if not callable(metric):
        raise TypeError(f"metric={shown(metric)} is a {type(metric).__name__}: give a function of the logits.")


def number_of(value: Any) -> float:
    """A metric's result as a number, which may be NaN or infinite; raises TypeError or ValueError where it is not one number."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"The metric gave a tensor of shape {tuple(value.shape)}; one number is needed.")
        value = value.detach().item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"The metric gave a {type(value).__name__}; one number is needed.")
    return float(value)


def differentiable(value: Any) -> Tensor:
    """A metric's result, where gradients are needed; raises ValueError if it has none."""
    if not isinstance(value, Tensor) or (torch.is_grad_enabled() and not value.requires_grad):
        raise ValueError(
            "The metric cannot be differentiated, or does not depend on the logits: return a tensor computed from them."
        )
    return value


def finite_number_of(value: Any, where: str) -> float:
    """A metric's result as a number; raises FloatingPointError, which says ``where`` it was taken, unless it is finite."""
    result = number_of(value)
    if not math.isfinite(result):
        raise FloatingPointError(
            f"The metric is {result} {where}: give one that is finite there, such as a difference of logits, or a model in "
            "float32."
        )
    return result
