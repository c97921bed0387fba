"""Gradients of a behaviour in masks, by running the model or from a recording of its operations.

A pass of a short prompt costs little arithmetic and many calls: hooks, modules, autograd. All of these do the same in every pass,
so forward and backward are written down once as a list of tensor operations (``make_fx``, then TorchScript, which calls them
without Python), with tokens, weights and V, U as constants. A recording is used only where it gives what the model gives on masks
that it was not made with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.analysis.pruning.behaviours import Behaviour
from tl_vpd.analysis.pruning.masked import PromptModel

Gradients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From masks ``[rows, pos, C_total]`` and Δs' ``[rows, pos, sites]`` to the gradients of the rows' summed losses in both."""


def running(masked: PromptModel, tokens: Tensor, behaviour: Behaviour) -> Gradients:
    """Gradients by running the model."""

    def gradients(mask: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        logits, run = masked.logits(tokens, mask, delta, behaviour.pos, gradients=True)
        return masked.gradients(behaviour.losses, logits, run, (mask.shape[0], mask.shape[1]))

    return gradients


class Recorded:
    """Gradients from recordings, one for each number of rows; made when it is first asked for.

    Warns (RuntimeWarning) where a model's passes cannot be recorded, and runs the model itself then.
    """

    def __init__(self, masked: PromptModel, tokens: Tensor, behaviour: Behaviour) -> None:
        self.model = running(masked, tokens, behaviour)
        self.made: dict[int, Gradients] = {}

    def __call__(
        self, mask: Float[Tensor, "rows pos C_total"], delta: Float[Tensor, "rows pos sites"]
    ) -> tuple[Float[Tensor, "rows pos C_total"], Float[Tensor, "rows pos sites"]]:
        """The gradients of the rows' summed losses."""
        if len(mask) not in self.made:
            self.made[len(mask)] = self._made(mask, delta)
        with torch.no_grad():
            return self.made[len(mask)](mask, delta)

    def _made(self, mask: Tensor, delta: Tensor) -> Gradients:
        try:
            recording = record(self.model, mask, delta)
            others = torch.rand_like(mask), torch.rand_like(delta)
            pairs = list(zip(recording(*others), self.model(*others), strict=True))
            error = max(float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30) for a, b in pairs)
            if not error < 1e-3:
                raise RuntimeError(f"on other masks the recording is off by {error:.1e}")
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error_:
            warnings.warn(
                f"This model's passes cannot be recorded ({str(error_).splitlines()[0]}); pruning runs the model itself, "
                "which is slower.",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.model
        return recording


def record(function: Gradients, mask: Tensor, delta: Tensor) -> Gradients:
    """A function's tensor operations on these arguments, as a function of arguments of the same shapes.

    Raises:
        RuntimeError: it cannot be recorded.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # both are said to be superseded, by compilers that need one in C++
        graph: Any = make_fx(function)(mask, delta)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return torch.jit.trace(graph, (mask, delta), check_trace=False)
