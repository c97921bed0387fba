"""Passes whose gradients stop at subcomponents: what one piece of the weights does to another directly.

All masks and Δs are 1, so values are the model's own. Of a site's output ``y = a @ U + x @ Δ + b`` with ``a = x @ V``, gradients
know only

    ∂y/∂a_c = U[c],      ∂y/∂x = Δ          (Δ's outputs held fixed: 0)

so that a gradient that reaches y is handed to the subcomponents that wrote it, and goes on through Δ alone. Residual skips,
norms, nonlinearities and attention are the model's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel, SitePass

Held = Literal["norms", "deltas", "patterns"]
"""What may be held fixed: norms' scales, Δs' outputs, attention patterns."""


class _Through(Exception):
    """The pass has come as far as it is wanted."""


class _Stopped(torch.autograd.Function):
    """y as it is, through which gradients reach x by Δ alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        ctx.delta, ctx.shape = delta, x.shape
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows = grad.reshape(-1, ctx.delta.shape[1])
        return (rows @ ctx.delta.T).view(ctx.shape), None, None


@dataclass
class DirectPass:
    """The tensors of one pass that gradients are taken of and in.

    Attributes:
        inputs, outputs: every site's x and y, in the shape in which the model passes them.
        embeddings: what enters the first block ``[batch, pos, d_model]``.
        logits: None where the pass ended at a site.
        norms: outputs of norms held fixed, and their biases.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    embeddings: Tensor | None = None
    logits: Tensor | None = None
    norms: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def gradients(
        self, of: Sequence[tuple[Tensor, Tensor]], outputs: Sequence[str], *, again: bool
    ) -> tuple[dict[str, Float[Tensor, "batch pos d_out"]], Tensor | None, list[Tensor | None]]:
        """Gradients of ``Σ tensor · seed`` in the outputs of sites, the embeddings and the norms' outputs, where there are any.

        ``again``: whether the pass is needed for further gradients.
        """
        assert self.embeddings is not None
        wanted = [self.outputs[name] for name in outputs]
        norms = [y for y, bias in self.norms if bias is not None and y.requires_grad]
        found = torch.autograd.grad(
            [tensor for tensor, _ in of],
            [*wanted, self.embeddings, *norms],
            [seed for _, seed in of],
            retain_graph=again,
            allow_unused=True,
        )
        batch, pos = self.embeddings.shape[:2]
        of_outputs = {
            name: grad.reshape(batch, pos, -1)
            for name, grad in zip(outputs, found[: len(wanted)], strict=True)
            if grad is not None
        }
        return of_outputs, found[len(wanted)], list(found[len(wanted) + 1 :])


class DirectModel(MaskedModel):
    """A model whose passes stop gradients at subcomponents. A context manager, as ``MaskedModel`` is.

    Raises:
        ValueError: attention is computed head by head, or what is to be held fixed is unknown.
    """

    def __init__(self, decomposition: Decomposition, model: nn.Module, *, held: Collection[str] = ()) -> None:
        unknown = sorted(set(held) - set(get_args(Held)))
        if unknown:
            raise ValueError(f"held={unknown}: norms, deltas and patterns can be held fixed.")
        super().__init__(decomposition, model, fused_attention="patterns" not in held)
        self.held = frozenset(held)
        self._pass: DirectPass | None = None
        self._deltas: dict[str, Tensor] = {}

    def __enter__(self) -> DirectModel:
        for name in self.names:
            layout = self.adapter.layout(name)
            if layout.by_head or layout.repeats > 1:
                raise ValueError(
                    f"{name} is computed head by head here: switch use_split_qkv_input, use_attn_in, use_attn_result and "
                    "ungroup_grouped_query_attention off for a graph."
                )
        super().__enter__()
        try:
            with torch.no_grad():
                for name in self.names:
                    product = self.weights.V[name].detach() @ self.weights.U[name].detach()
                    self._deltas[name] = self.adapter.weight(name).to(product) - product
            self._stack.callback(self._deltas.clear)
            for handle in self.adapter.tap_residual(self._embed):
                self._stack.callback(handle.remove)
            if self.held & {"norms", "patterns"}:
                options = {"norms": "norms" in self.held, "patterns": "patterns" in self.held}
                for handle in self.adapter.held_fixed(**options, see=self._see_norm):
                    self._stack.callback(handle.remove)
        except BaseException:
            self._stack.close()
            raise
        return self

    def direct(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        until: Collection[str] | None = None,
        token_mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> DirectPass:
        """Runs tokens; ``until``: the sites whose inputs are all that is wanted (None: on to the logits)."""
        direct = DirectPass()
        wanted = None if until is None else frozenset(until)
        run = SitePass(partial(self._stopped, direct), read=partial(self._noted, direct, wanted))
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
        if self._pass is None:
            return None
        self._pass.embeddings = x.detach().requires_grad_()
        return self._pass.embeddings

    def _see_norm(self, y: Tensor, bias: Tensor | None) -> None:
        if self._pass is not None:
            self._pass.norms.append((y, bias))

    @staticmethod
    def _noted(direct: DirectPass, until: frozenset[str] | None, name: str, x: Tensor) -> None:
        direct.inputs[name] = x
        if until is not None and until <= direct.inputs.keys():
            raise _Through

    def _stopped(self, direct: DirectPass, name: str, x: Tensor, y: Tensor) -> Tensor:
        delta = None if "deltas" in self.held else self._deltas[name]
        output = y.detach().requires_grad_() if delta is None else _Stopped.apply(x, y.detach(), delta)
        direct.outputs[name] = output
        return output


def shared_inputs(names: Sequence[str], inputs: Mapping[str, Float[Tensor, "batch pos _"]]) -> list[tuple[str, ...]]:
    """Sites that read the same input together, in the order of ``names``: Q, K, V of a layer, and gate and in."""
    found: list[list[str]] = []
    for name in names:
        owner, _, weight = name.rpartition(".")
        if found and weight not in ("W_O", "W_out"):
            first = found[-1][0]
            same = first.rpartition(".")[0] == owner and not first.endswith(("W_O", "W_out"))
            if same and torch.equal(inputs[first], inputs[name]):
                found[-1].append(name)
                continue
        found.append([name])
    return [tuple(family) for family in found]
