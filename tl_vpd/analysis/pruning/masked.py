"""Masked passes of a short prompt, thousands of them: as few operations as a site's masked product takes.

    m = g + (1 − g) r,      y = b + m_Δ (y₀ − b) + (a ⊙ (m − m_Δ)) @ U

Masks of all sites are made at once on the concatenated axis; backward leaves ∂m and ∂m_Δ there too. (``BlockedMasks`` works in
blocks, for long batches whose masks would fill the memory; here the number of operations is what costs time.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel, SitePass


class _Run:
    """One pass: differences ``m − m_Δ`` and Δ's masks, and where their gradients go."""

    def __init__(self, mask: Tensor, delta: Tensor, site_of: Tensor, wanted: bool) -> None:
        self.difference, self.delta = mask - delta[:, site_of], delta
        self.grad_mask = torch.empty_like(mask) if wanted else None
        self.grad_delta = torch.empty_like(delta) if wanted else None
        self.handle = torch.zeros((), dtype=mask.dtype, device=mask.device, requires_grad=wanted)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        handle: Tensor,
        y: Tensor,
        x: Tensor,
        V: Tensor,
        U: Tensor,
        bias: Tensor | None,
        run: _Run,
        at: slice,
        site: int,
    ) -> Tensor:
        acts = x @ V
        delta = run.delta[:, site : site + 1]
        ctx.save_for_backward(y, acts, V, U, bias)
        ctx.run, ctx.at, ctx.site = run, at, site
        own = y * delta if bias is None else torch.lerp(bias, y, delta)
        return own.addmm_(acts * run.difference[:, at], U)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, acts, V, U, bias = ctx.saved_tensors
        run, at, site = ctx.run, ctx.at, ctx.site
        of_coefficients = grad @ U.T
        of_mask = run.grad_mask[:, at]
        torch.mul(of_coefficients, acts, out=of_mask)
        centred = y if bias is None else y - bias
        run.grad_delta[:, site] = torch.linalg.vecdot(grad, centred) - of_mask.sum(-1)
        of_x = of_coefficients.mul_(run.difference[:, at]) @ V.T if ctx.needs_input_grad[2] else None
        of_y = grad * run.delta[:, site : site + 1] if ctx.needs_input_grad[1] else None
        return None, of_y, of_x, *[None] * 6


class PromptModel(MaskedModel):
    """A model for masked passes of one prompt. A context manager, as ``MaskedModel`` is.

    Raises:
        ValueError: attention is computed head by head.
    """

    def __init__(self, decomposition: Decomposition, model: nn.Module) -> None:
        super().__init__(decomposition, model, fused_attention=True)
        site_axis = self.weights.site_axis
        counts = torch.tensor(list(site_axis.counts.values()), device=self.adapter.device)
        self.site_of = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        self.fixed: dict[str, tuple[Tensor, Tensor, Tensor | None, slice, int]] = {}

    def __enter__(self) -> PromptModel:
        for i, name in enumerate(self.names):
            layout = self.adapter.layout(name)
            if layout.by_head or layout.repeats > 1:
                raise ValueError(
                    f"{name} is computed head by head here: switch use_split_qkv_input, use_attn_in, use_attn_result and "
                    "ungroup_grouped_query_attention off for pruning."
                )
            V, U, bias = self.weights.V[name].detach(), self.weights.U[name].detach(), self.adapter.bias(name)
            self.fixed[name] = V, U, None if bias is None else bias.detach(), self.weights.site_axis.slices[name], i
        super().__enter__()
        return self

    def logits(
        self,
        tokens: Tensor,
        mask: Float[Tensor, "rows pos C_total"],
        delta: Float[Tensor, "rows pos sites"],
        pos: int,
        *,
        gradients: bool = False,
    ) -> tuple[Float[Tensor, "rows vocab"], _Run]:
        """Logits at a position under masks, and the pass, whose gradients a backward through its ``handle`` fills in."""
        run = _Run(mask.detach().flatten(0, 1), delta.detach().flatten(0, 1), self.site_of, gradients)
        site_pass = SitePass(partial(self._masked_site, run))
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            return self.run(tokens.expand(len(mask), -1), site_pass)[:, pos], run

    def gradients(
        self, losses: Callable[[Tensor], Tensor], logits: Float[Tensor, "rows vocab"], run: _Run, shape: tuple[int, int]
    ) -> tuple[Float[Tensor, "rows pos C_total"], Float[Tensor, "rows pos sites"]]:
        """The gradients of the sum of ``losses(logits)`` in masks and Δs' masks."""
        with torch.inference_mode(False), torch.enable_grad():
            torch.autograd.grad(losses(logits).sum(), run.handle, allow_unused=True)
        assert run.grad_mask is not None
        assert run.grad_delta is not None
        return run.grad_mask.view(*shape, -1), run.grad_delta.view(*shape, -1)

    def _masked_site(self, run: _Run, name: str, x: Tensor, y: Tensor) -> Tensor:
        V, U, bias, at, site = self.fixed[name]
        rows = len(run.delta)
        output = _Masked.apply(run.handle, y.reshape(rows, -1), x.reshape(rows, -1), V, U, bias, run, at, site)
        return output.view(y.shape)
