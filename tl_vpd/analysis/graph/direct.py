"""Passes whose gradients stop at subcomponents: what one subcomponent does to another directly.

All masks and Δs are 1, so values are the model's. Of a site's output ``y = a @ U + x @ Δ + b`` with ``a = x @ V``, gradients
know only

    ∂y/∂a_c = U[c],      ∂y/∂x = Δ          (with Δs' outputs fixed: 0)

so that a gradient that reaches y is passed to the subcomponents that wrote it, and continues through Δ alone. Residual skips,
norms, nonlinearities and attention are the model's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tl_vpd.adapters.changes import Later
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel, SitePass


class _Through(Exception):
    """The pass has read all that is needed."""


class _Stopped(torch.autograd.Function):
    """y unchanged; gradients reach x through Δ alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        ctx.delta, ctx.shape = delta, x.shape
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows = grad.reshape(-1, ctx.delta.shape[1])
        return (rows @ ctx.delta.T).view(ctx.shape), None, None


@dataclass(frozen=True)
class Gradients:
    """Gradients of one batch of seeds.

    Attributes:
        outputs: in the outputs of sites, where there are any.
        embeddings: in what enters the first block (None: there is none).
        norms: in the outputs of fixed norms that have a bias.
    """

    outputs: dict[str, Float[Tensor, "batch pos d_out"]]
    embeddings: Float[Tensor, "batch pos d_model"] | None
    norms: list[Tensor | None]


@dataclass
class DirectPass:
    """The tensors of one pass between which gradients are taken.

    Attributes:
        inputs: every site's x, in the shape in which the model passes it.
        outputs: every site's y, likewise.
        embeddings: what enters the first block ``[batch, pos, d_model]``.
        logits: None where the pass ended at a site.
        norms: outputs of fixed norms, and their biases.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    embeddings: Tensor | None = None
    logits: Tensor | None = None
    norms: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def gradients(self, seeds: Sequence[tuple[Tensor, Tensor]], sites: Sequence[str], *, again: bool) -> Gradients:
        """Gradients of ``Σ tensor · seed`` in sites' outputs, the embeddings and norms' outputs; ``again``: more will follow."""
        assert self.embeddings is not None
        outputs = [self.outputs[name] for name in sites]
        norms = [y for y, bias in self.norms if bias is not None and y.requires_grad]
        gradients = torch.autograd.grad(
            [tensor for tensor, _ in seeds],
            [*outputs, self.embeddings, *norms],
            [seed for _, seed in seeds],
            retain_graph=again,
            allow_unused=True,
        )
        batch, pos = self.embeddings.shape[:2]
        grad_outputs = {
            name: grad.reshape(batch, pos, -1)
            for name, grad in zip(sites, gradients[: len(outputs)], strict=True)
            if grad is not None
        }
        return Gradients(grad_outputs, gradients[len(outputs)], list(gradients[len(outputs) + 1 :]))


class DirectModel(MaskedModel):
    """A model whose passes stop gradients at subcomponents, and at what is ``fixed``: ``norms``, ``deltas`` and ``patterns``. A
    context manager, as ``MaskedModel`` is.
    """

    def __init__(self, decomposition: Decomposition, model: nn.Module, *, fixed: Collection[str] = ()) -> None:
        super().__init__(decomposition, model, fused_attention="patterns" not in fixed)
        self.fixed = frozenset(fixed)
        self._pass: DirectPass | None = None
        self._deltas: dict[str, Tensor] = {}

    def put_on(self, undo: Later) -> None:
        """Puts the taps on the model; raises ValueError where attention is computed head by head."""
        for name in self.names:
            layout = self.adapter.layout(name)
            if layout.by_head or layout.repeats > 1:
                raise ValueError(
                    f"{name} is computed head by head here: switch use_split_qkv_input, use_attn_in, use_attn_result and "
                    "ungroup_grouped_query_attention off for a graph."
                )
        super().put_on(undo)
        undo(self._deltas.clear)
        with torch.no_grad():
            for name in self.names:
                product = self.weights.V[name].detach() @ self.weights.U[name].detach()
                self._deltas[name] = self.adapter.weight(name).to(product) - product
        for handle in self.adapter.tap_residual(self._embed):
            undo(handle.remove)
        if self.fixed & {"norms", "patterns"}:
            options = {"norms": "norms" in self.fixed, "patterns": "patterns" in self.fixed}
            for handle in self.adapter.linearised(**options, see=self._note_norm):
                undo(handle.remove)

    def direct(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        until: Collection[str] | None = None,
        token_mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> DirectPass:
        """Runs tokens as far as the inputs of the sites in ``until`` (None: to the logits)."""
        direct = DirectPass()
        needed = None if until is None else frozenset(until)
        run = SitePass(partial(self._stopped, direct), read=partial(self._note_input, direct, needed))
        with self._collecting(direct), torch.inference_mode(False), torch.enable_grad(), suppress(_Through):
            direct.logits = self.run(tokens, run, token_mask)
        return direct

    @contextmanager
    def _collecting(self, direct: DirectPass) -> Iterator[None]:
        self._pass = direct
        try:
            yield
        finally:
            self._pass = None

    def delta_output(self, name: str, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What Δ writes."""
        return x @ self._deltas[name]

    def _embed(self, x: Tensor) -> Tensor | None:
        run = self.taps.current
        if self._pass is None or run is None or run.is_elsewhere():
            return None
        self._pass.embeddings = x.detach().requires_grad_()
        return self._pass.embeddings

    def _note_norm(self, y: Tensor, bias: Tensor | None) -> None:
        if self._pass is not None:
            self._pass.norms.append((y, bias))

    @staticmethod
    def _note_input(direct: DirectPass, needed: frozenset[str] | None, name: str, x: Tensor) -> None:
        direct.inputs[name] = x
        if needed is not None and needed <= direct.inputs.keys():
            raise _Through

    def _stopped(self, direct: DirectPass, name: str, x: Tensor, y: Tensor) -> Tensor:
        delta = None if "deltas" in self.fixed else self._deltas[name]
        output = y.detach().requires_grad_() if delta is None else _Stopped.apply(x, y.detach(), delta)
        direct.outputs[name] = output
        return output


def shared_inputs(names: Sequence[str], inputs: Mapping[str, Float[Tensor, "batch pos _"]]) -> list[tuple[str, ...]]:
    """Families of sites that read the same input, in the order of ``names``: Q, K, V of a layer, and gate and in."""
    families: list[list[str]] = []
    for name in names:
        module, _, weight = name.rpartition(".")
        if families and weight not in ("W_O", "W_out"):
            first = families[-1][0]
            same = first.rpartition(".")[0] == module and not first.endswith(("W_O", "W_out"))
            if same and torch.equal(inputs[first], inputs[name]):
                families[-1].append(name)
                continue
        families.append([name])
    return [tuple(family) for family in families]
