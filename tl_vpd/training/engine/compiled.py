"""The passes of a training step as compiled graphs.

A step's passes do the same operations every time, so each is recorded once as a graph of tensor operations, forward and
backward together (``make_fx``), and compiled (``torch.compile``): elementwise work is fused into few loops, masks never reach
memory, and no Python, hook or autograd node runs between operations. The graphs are

    weights     W → faithfulness, gradients of V and U                           Δs are formed, no tokens
    clean       tokens → logits and every site's input                           the target, no gradients
    gamma       inputs → z                                                       Γ, except the largest MLPs; backward too
    counts      z → the sums s_c, L0                                             one pass over z
    masked      tokens, z, sources → losses, gradients of V, U, g and sources    one for each kind of pass (``masked_graph``)
    pullback    z, gradients of g and of s_c → the gradient of z                 one pass over z
    ascend      sources, moments, gradient → the same, updated                   one pass over sources

Losses, masks and gradients are those of ``EagerEngine`` to rounding. Unlike there, routed tokens have a fixed number of slots
(shapes must not depend on data; the rare pass that has more tokens runs as it does there), and softmax of the whole output is
computed at once (in blocks, where there are too many logits). A graph is made when its shapes first occur, and compared with the
model itself on other numbers before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tl_vpd.adapters import Unsupported
from tl_vpd.forward.mask_inputs import MaskInputs
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.forward.site_taps import SitePass
from tl_vpd.importance.chunked import ChunkedTransformers
from tl_vpd.importance.mlps import PerSubcomponentMLPs
from tl_vpd.importance.squash import LOWER_LEAKY, Squash
from tl_vpd.importance.transformer import SharedTransformer
from tl_vpd.losses import Penalty, faithfulness_terms
from tl_vpd.losses.precision import at_least_float32
from tl_vpd.masking import PersistentSources
from tl_vpd.masking.persistent import Rows
from tl_vpd.training.config import Precision
from tl_vpd.training.engine.eager import EagerEngine
from tl_vpd.training.engine.masked_graph import MaskedGraph, gradients_of
from tl_vpd.training.engine.recording import TOLERANCE, Function, compiled
from tl_vpd.training.engine.records import CleanForward, LossTerm
from tl_vpd.training.micro_batch import MicroBatch

WHOLE = 1 << 62
"""Block size of a penalty that processes all importances at once."""
UNROLLED = 32
"""Hidden units of Γ's MLPs up to which they are compiled, one after the other."""
SHORT = 128
"""Positions up to which attention on a CPU is recorded as products and a softmax, whose loops are fused with others; PyTorch's
single call costs twice as much there at 32 positions, and less from 256 on."""


class CompiledEngine(EagerEngine):
    """Runs passes as compiled graphs.

    Args:
        masked_model: as in ``EagerEngine``.
        kind: as there.
        squash: as there.
        precision: as there.
        blocked_logits: as there.
        backend: of ``torch.compile``, or ``recorded``.

    Raises:
        Unsupported: the model's dtype is not that of V and U.
    """

    def __init__(
        self,
        masked_model: MaskedModel,
        kind: Literal["kl", "mse"] = "kl",
        squash: Squash = LOWER_LEAKY,
        *,
        precision: Precision = "float32",
        blocked_logits: bool | None = None,
        backend: str = "inductor",
    ) -> None:
        super().__init__(masked_model, kind, squash, precision=precision, blocked_logits=blocked_logits)
        self.dtype = next(self.decomposition.components.parameters()).dtype
        if masked_model.adapter.dtype != self.dtype:
            raise Unsupported(
                f"compile=True needs a target in the dtype of V and U, {self.dtype}, and this one is in "
                f"{masked_model.adapter.dtype}: use model.float() (with precision='bfloat16' for fast products), or leave "
                "compile out."
            )
        self.backend = backend
        self.graphs: dict[Any, Function] = {}
        self._input_of: dict[str, int] = {}
        """By name of what Γ reads, which of the clean graph's inputs it is."""
        self._pos = 0

    # -- the passes ------------------------------------------------------------------------------------------------

    def faithfulness(
        self, weights: Mapping[str, Float[Tensor, "_ _"]], coefficient: float, *, relative: bool = False
    ) -> Float[Tensor, ""]:
        """The loss; its gradients, times the coefficient, go to V and U."""
        if not coefficient:
            return super().faithfulness(weights, coefficient, relative=relative)
        components, n = self.decomposition.components, len(weights)
        matrices = components.matrices()

        def loss(coefficient: Tensor, *tensors: Tensor) -> Tensor:
            with torch.enable_grad():
                by_site = dict(zip(weights, tensors[:n], strict=True))
                value = torch.stack(list(faithfulness_terms(components, by_site, relative=relative))).sum()
                gradients = torch.autograd.grad(coefficient * value, matrices)
            for stored, gradient in zip(tensors[n:], gradients, strict=True):
                stored += gradient
            return value.detach()

        value: Tensor = self._run(
            "weights", loss, self._number(coefficient), *weights.values(), *gradients_of(matrices)
        )
        return value

    def clean(
        self,
        micro_batch: MicroBatch,
        tokens: Tensor,
        token_mask: Bool[Tensor, "batch pos"] | None,
        penalty: Penalty,
    ) -> CleanForward:
        """The target's output and Γ's values on a micro-batch; see ``EagerEngine.clean``."""
        rows, mask = self._select(micro_batch, tokens, token_mask)
        self._pos = rows.shape[1] if rows.ndim > 1 else 0
        output, *inputs = self._run("clean", self._target, rows, mask)
        residual = inputs.pop() if self.starts_late else None
        z = self._gamma(inputs, mask)
        arguments = z.detach(), mask, self._number(penalty.parameter)
        sums, l0 = self._run(("counts", *_form(penalty)), partial(_counts, penalty), *arguments)
        return CleanForward(micro_batch, rows, mask, self._distance(output, mask), z, sums, l0, residual)

    def backward_into_gamma(
        self,
        clean: CleanForward,
        grad_g: Float[Tensor, "batch *pos C_total"],
        grad_sums: Float[Tensor, " C_total"],
        penalty: Penalty,
    ) -> None:
        """Γ's gradients, from those of the importances and of the sums; see ``EagerEngine.backward_into_gamma``."""
        arguments = clean.z.detach(), grad_g, grad_sums, clean.token_mask, self._number(penalty.parameter)
        clean.z.backward(self._run(("pullback", *_form(penalty)), partial(_pullback, penalty, self.squash), *arguments))

    def ascend(self, sources: PersistentSources, gradient: Tensor, lr: float, rows: Rows, update: int) -> None:
        """Moves rows of sources along their gradient."""
        sources.ascend(gradient, lr, rows, update=update, by=partial(self._run, "ascend", sources.ascended))

    # -- what is recorded ------------------------------------------------------------------------------------------

    def _target(self, tokens: Tensor, token_mask: Tensor | None) -> list[Tensor]:
        """The output, what Γ reads, and what masked passes start from, if they start late.

        An input that several sites read is there once (``_gamma`` knows which).
        """
        run = SitePass(collect=self.decomposition.gamma_inputs)
        with self.autocast(), self.without_logits(), torch.no_grad():
            output = self.masked_model.run(tokens, run, token_mask)
        distinct = {id(x): x for x in run.inputs.values()}
        self._input_of = {name: list(distinct).index(id(x)) for name, x in run.inputs.items()}
        late = [run.residual] if self.starts_late and run.residual is not None else []
        return [output, *distinct.values(), *late]

    def _gamma(self, inputs: Sequence[Tensor], token_mask: Tensor | None) -> Tensor:
        def pre_sigmoid(*arguments: Tensor | None) -> Tensor:
            *tensors, mask = arguments
            by_site: dict[str, Any] = {name: tensors[i] for name, i in self._input_of.items()}
            with self.autocast():
                return at_least_float32(self.decomposition.pre_sigmoid(by_site, mask))

        gamma = self.decomposition.gamma
        if isinstance(gamma, PerSubcomponentMLPs) and gamma.w_in.shape[1] <= UNROLLED:
            with gamma.computed_by(self._run):
                return pre_sigmoid(*inputs, token_mask)
        if not isinstance(gamma, SharedTransformer | ChunkedTransformers):
            return pre_sigmoid(*inputs, token_mask)
        z: Tensor = self._run("gamma", pre_sigmoid, *inputs, token_mask, gradients=True)
        return z

    def _losses(
        self,
        clean: CleanForward,
        rows: slice,
        inputs: MaskInputs,
        terms: Sequence[LossTerm],
        *,
        grad_g: Tensor | None = None,
        grad_sources: Tensor | None = None,
    ) -> list[Float[Tensor, ""]]:
        graph = MaskedGraph(self, inputs, terms)
        arguments = graph.arguments(clean, rows, inputs, terms, grad_g, grad_sources)
        if arguments is None:  # more tokens are routed than there are slots
            return super()._losses(clean, rows, inputs, terms, grad_g=grad_g, grad_sources=grad_sources)
        return self._run(graph.key, graph, *arguments)

    # -- recording -------------------------------------------------------------------------------------------------

    def _run(self, what: Any, function: Function, *arguments: Tensor | None, gradients: bool = False) -> Any:
        """The result of a function from its compiled graph, made at the first call with arguments of these shapes."""
        key = what, tuple(None if a is None else (a.shape, a.dtype, a.stride()) for a in arguments)
        if key not in self.graphs:
            with self._attention():
                self.graphs[key] = compiled(
                    function, arguments, self.backend, TOLERANCE[self.precision], gradients=gradients
                )
        with torch.set_grad_enabled(gradients):
            return self.graphs[key](*(a for a in arguments if a is not None))

    def _attention(self) -> AbstractContextManager[None]:
        """How attention is recorded."""
        short = self._pos <= SHORT and self.precision == "float32" and self.decomposition.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if short else nullcontext()

    def _number(self, value: float | Tensor) -> Float[Tensor, ""]:
        """A number as an argument of graphs, which are made once for all its values."""
        return torch.full((), float(value), dtype=self.dtype, device=self.decomposition.device)


def _form(penalty: Penalty) -> tuple[str, bool]:
    """What graphs of a penalty depend on besides its parameter."""
    return penalty.kind, penalty.normalised


def _counts(penalty: Penalty, z: Tensor, token_mask: Tensor | None, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """The penalty's sums over tokens, and L0."""
    important = (z > 0).sum(-1)
    mask = None if token_mask is None else token_mask.flatten()
    sums = replace(penalty, parameter=parameter, block=WHOLE).sums(z.flatten(0, -2), mask)
    return sums, (important if token_mask is None else important * token_mask).sum().to(z.dtype)


def _pullback(
    penalty: Penalty,
    squash: Squash,
    z: Tensor,
    grad_g: Tensor,
    grad_sums: Tensor,
    token_mask: Tensor | None,
    parameter: Tensor,
) -> Tensor:
    """The gradient of z."""
    mask = None if token_mask is None else token_mask.flatten()
    grad = grad_g.flatten(0, -2).clone()
    penalty = replace(penalty, parameter=parameter, block=WHOLE)
    return penalty.pullback(z.flatten(0, -2), grad_sums, mask, grad_g=grad, squash=squash).view_as(z)
