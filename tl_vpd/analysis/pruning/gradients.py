"""Gradients of a behaviour's loss in importances and sources, thousands of them on one short prompt.

    m = g + (1 − g) r,      m_Δ = r_Δ,      gradients of Σ_rows loss(logits under these masks) in g, or in r and r_Δ

A pass of a short prompt costs little arithmetic and many calls: hooks, modules, autograd. All of these do the same in every pass,
so forward and backward are recorded once as a list of tensor operations (``training.engine.recording``), which TorchScript then
calls without Python. Tokens, the model's weights, V and U are constants of a recording.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_vpd.adapters import Unsupported
from tl_vpd.analysis.pruning.behaviours import Behaviour
from tl_vpd.forward import MaskedModel, TraceableMasks
from tl_vpd.training.engine.recording import RECORDED, TOLERANCE, compiled

Variable = Literal["importances", "sources"]
Gradient = Callable[[Variable, Tensor, Tensor], Tensor]
"""From a variable, importances ``[rows, pos, C_total]`` and sources ``[rows, pos, C_total + sites]`` to the gradient in it."""


class PromptLoss:
    """A behaviour's loss on one prompt under masks; each row holds the masks of one circuit or adversary."""

    def __init__(self, masked_model: MaskedModel, tokens: Int[Tensor, "1 pos"], behaviour: Behaviour) -> None:
        self.masked_model, self.tokens, self.behaviour = masked_model, tokens, behaviour
        self.start = masked_model.late_start(tokens)

    def logits(
        self, g: Float[Tensor, "rows pos C_total"], sources: Float[Tensor, "rows pos C_and_deltas"]
    ) -> Float[Tensor, "rows vocab"]:
        """Logits at the behaviour's position, under the masks of importances and sources."""
        masks = TraceableMasks.from_sources(g, sources, self.masked_model.weights.site_axis)
        tokens = self.tokens.expand(len(g), -1)
        start = None if self.start is None else self.start.expand(len(g), -1, -1)
        return self.masked_model.masked(tokens, masks, start=start, constant_weights=True)[:, self.behaviour.pos]

    @torch.no_grad()
    def probability(
        self, g: Float[Tensor, "rows pos C_total"], sources: Float[Tensor, "rows pos C_and_deltas"]
    ) -> Float[Tensor, " rows"]:
        """The behaviour's probability in every row."""
        return self.behaviour.probability(self.logits(g, sources))

    def gradient(
        self, variable: Variable, g: Float[Tensor, "rows pos C_total"], sources: Float[Tensor, "rows pos C_and_deltas"]
    ) -> Float[Tensor, "rows pos _"]:
        """The gradient of the rows' summed losses in importances or in sources."""
        with torch.inference_mode(False), torch.enable_grad():
            g, sources = g.detach().clone(), sources.detach().clone()
            leaf = (g if variable == "importances" else sources).requires_grad_()
            (gradient,) = torch.autograd.grad(self.behaviour.losses(self.logits(g, sources)).sum(), leaf)
        return gradient


class RecordedGradient:
    """``PromptLoss.gradient`` from recordings, one per variable and number of rows, each made when it is first needed.

    Warns (RuntimeWarning) where the model's passes cannot be recorded, and runs the model instead.
    """

    def __init__(self, loss: PromptLoss) -> None:
        self.loss = loss
        self.recordings: dict[tuple[Variable, int], Gradient] = {}

    def __call__(
        self, variable: Variable, g: Float[Tensor, "rows pos C_total"], sources: Float[Tensor, "rows pos C_and_deltas"]
    ) -> Float[Tensor, "rows pos _"]:
        """The gradient of the rows' summed losses in importances or in sources."""
        key = variable, len(g)
        if key not in self.recordings:
            self.recordings[key] = self._record(variable, g, sources)
        with torch.no_grad():
            return self.recordings[key](variable, g, sources)

    def _record(self, variable: Variable, g: Tensor, sources: Tensor) -> Gradient:
        shape = g.shape[:2]

        def by_token(g: Tensor, sources: Tensor) -> Tensor:
            return self.loss.gradient(variable, g.unflatten(0, shape), sources.unflatten(0, shape)).flatten(0, 1)

        try:
            # With tokens on the first axis a recording of a single row is checked with other values too.
            flat = g.flatten(0, 1), sources.flatten(0, 1)
            graph = compiled(by_token, flat, RECORDED, TOLERANCE["float32"], gradients=False)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # deprecated in favour of compilers that need C++
                recording = torch.jit.trace(graph, flat, check_trace=False)
        except (Unsupported, RuntimeError) as error:
            warnings.warn(
                f"Pruning runs the model in every pass, which is slower than a recording of it: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.loss.gradient
        return lambda _, g, sources: recording(g.flatten(0, 1), sources.flatten(0, 1)).unflatten(0, shape)
