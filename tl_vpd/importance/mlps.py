"""Γ as small MLPs: one per subcomponent (SPD paper, section on causal importances; right for toys), or one per site.

Per subcomponent, on its inner activation: ``z_c = w₂_c · GELU(w₁_c · a_c + b₁_c) + b₂_c``. Per site, on the site's
RMS-normalised input: ``z = W₂ GELU(W₁ x + b₁) + b₂``. Neither sees other positions or other sites.

The hidden layer of all subcomponents' MLPs, ``[C, tokens, hidden]``, is larger than everything else in a toy's training. It is
never stored: forward and backward each make it for a few subcomponents at a time, small enough to stay in the processor's cache,
or, compiled, for one hidden unit at a time in a processor's registers (``computed_by``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tl_vpd.importance.transformer import GammaCache, rms_norm
from tl_vpd.site import ConcatenatedAxis

_BLOCK = 1 << 17
"""Elements of the hidden layer made at once."""


class _SmallMLPs(torch.autograd.Function):
    """``z_c = w₂_c · GELU(w₁_c a_c + b₁_c) + b₂_c`` for each c of ``a [C, tokens]``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
        ctx.save_for_backward(a, w_in, b_in, w_out)
        z = torch.empty_like(a)
        for block in _blocks(a, w_in):
            h = F.gelu(_hidden(a[block], w_in[block], b_in[block]))
            z[block] = torch.baddbmm(b_out[block, None, None], h, w_out[block, :, None]).squeeze(-1)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, w_in, b_in, w_out = ctx.saved_tensors
        grad_a = torch.empty_like(a) if ctx.needs_input_grad[0] else None
        grad_w_in, grad_b_in, grad_w_out = (torch.empty_like(w) for w in (w_in, b_in, w_out))
        for block in _blocks(a, w_in):
            h = _hidden(a[block], w_in[block], b_in[block])
            grad_w_out[block] = torch.bmm(grad[block, None], F.gelu(h)).squeeze(1)
            slope = torch.ops.aten.gelu_backward(torch.ones_like(h), h)
            # Both sums over tokens in one product: the gradients of b₁ and w₁, but for w₂.
            sums = torch.stack([grad[block], grad[block] * a[block]], dim=1) @ slope
            torch.mul(sums[:, 0], w_out[block], out=grad_b_in[block])
            torch.mul(sums[:, 1], w_out[block], out=grad_w_in[block])
            if grad_a is not None:
                torch.mul((slope @ (w_in[block] * w_out[block])[..., None]).squeeze(-1), grad[block], out=grad_a[block])
        return grad_a, grad_w_in, grad_b_in, grad_w_out, grad.sum(-1)


Hidden = Float[Tensor, "C hidden"]
Run = Callable[..., Any]
"""``run(name, function, *tensors)``: the function's result, however it is computed."""


class _RunMLPs(torch.autograd.Function):
    """The same, computed by ``run``."""

    @staticmethod
    def forward(ctx: Any, run: Run, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:4])
        ctx.run = run
        return run("small MLPs", values, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *ctx.run("small MLPs, backward", gradients, grad.contiguous(), *ctx.saved_tensors)


def values(
    a: Float[Tensor, "C tokens"], w_in: Hidden, b_in: Hidden, w_out: Hidden, b_out: Float[Tensor, " C"]
) -> Float[Tensor, "C tokens"]:
    """z, as plain operations one hidden unit after the other: for compilers, which make one loop of them."""
    z = b_out[:, None].expand_as(a)
    for h, _, out in _units(a, w_in, b_in, w_out):
        z = z + h * _cdf(h) * out[:, None]
    return z


def gradients(
    grad: Float[Tensor, "C tokens"], a: Float[Tensor, "C tokens"], w_in: Hidden, b_in: Hidden, w_out: Hidden
) -> tuple[Tensor, ...]:
    """Gradients of a, w₁, b₁, w₂ and b₂ from that of z, in the same manner.  GELU(h) = h Φ(h), GELU'(h) = Φ(h) + h φ(h)."""
    grad_a = torch.zeros_like(a)
    grad_w_in, grad_b_in, grad_w_out = [], [], []
    for h, w, out in _units(a, w_in, b_in, w_out):
        below = _cdf(h)
        slope = grad * torch.addcmul(below, h, torch.exp(-0.5 * h * h), value=(2 * math.pi) ** -0.5)
        grad_a = grad_a + slope * (w * out)[:, None]
        grad_w_in.append((slope * a).sum(-1) * out)
        grad_b_in.append(slope.sum(-1) * out)
        grad_w_out.append((grad * h * below).sum(-1))
    return grad_a, *(torch.stack(units, dim=1) for units in (grad_w_in, grad_b_in, grad_w_out)), grad.sum(-1)


def _units(a: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each hidden unit before its GELU ``[C, tokens]``, and its weights in and out ``[C]``."""
    for w, b, out in zip(w_in.unbind(1), b_in.unbind(1), w_out.unbind(1), strict=True):
        yield torch.addcmul(b[:, None], a, w[:, None]), w, out


def _cdf(h: Tensor) -> Tensor:
    """Φ, of a normal distribution."""
    return 0.5 * (1 + torch.erf(h * 2**-0.5))


def _hidden(
    a: Float[Tensor, "C tokens"], w_in: Float[Tensor, "C hidden"], b_in: Float[Tensor, "C hidden"]
) -> Float[Tensor, "C tokens hidden"]:
    return torch.addcmul(b_in[:, None], a[..., None], w_in[:, None])


def _blocks(a: Float[Tensor, "C tokens"], w_in: Float[Tensor, "C hidden"]) -> Iterator[slice]:
    """A few subcomponents at a time."""
    n = max(1, _BLOCK // max(1, a.shape[1] * w_in.shape[1]))
    return (slice(start, start + n) for start in range(0, len(a), n))


class PerSubcomponentMLPs(nn.Module):
    """One MLP of ``hidden`` GELU units for every subcomponent, which reads only its inner activation.

    Args:
        counts: number of subcomponents by site.
        hidden: units of each MLP.
        rising: whether weights start positive: z then rises with the inner activation (except in the dip of GELU below 0).
    """

    needs = "acts"

    def __init__(self, counts: Mapping[str, int], *, hidden: int, rising: bool = False) -> None:
        super().__init__()
        self.site_axis = ConcatenatedAxis(counts)
        total = self.site_axis.total
        self.w_in = nn.Parameter(torch.randn(total, hidden))
        self.b_in = nn.Parameter(torch.zeros(total, hidden))
        self.w_out = nn.Parameter(torch.randn(total, hidden) / hidden**0.5)
        self.b_out = nn.Parameter(torch.zeros(total))
        self._run: Run | None = None
        if rising:
            with torch.no_grad():
                self.w_in.abs_()
                self.w_out.abs_()

    def forward(
        self,
        acts: Mapping[str, Float[Tensor, "*batch _"]],
        token_mask: Bool[Tensor, "batch _"] | None = None,
        cache: GammaCache | None = None,
    ) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid values from inner activations; other tokens, and so their mask and cache, do not matter."""
        concatenated = torch.cat([acts[name].to(self.w_in.dtype) for name in self.site_axis.slices], dim=-1)
        rows = concatenated.flatten(0, -2)
        tensors = (rows.T.contiguous(), self.w_in, self.b_in, self.w_out, self.b_out)
        with torch.autocast(rows.device.type, enabled=False):
            z = _SmallMLPs.apply(*tensors) if self._run is None else _RunMLPs.apply(self._run, *tensors)
        return z.T.reshape(concatenated.shape)

    @contextmanager
    def computed_by(self, run: Run) -> Iterator[None]:
        """Inside, ``run`` computes z with ``values``, and its gradients, also after the context, with ``gradients``."""
        self._run = run
        try:
            yield
        finally:
            self._run = None

    def output_biases(self) -> list[Tensor]:
        """The biases that are added last."""
        return [self.b_out]

    def rows_of_subcomponents(self) -> dict[str, list[str]]:
        """By parameter that has one row per subcomponent: the sites whose subcomponents they are, in order."""
        return dict.fromkeys(("w_in", "b_in", "w_out", "b_out"), self.site_axis.names)


class PerSiteMLPs(nn.Module):
    """One MLP of ``hidden`` GELU units for every site, which reads the site's RMS-normalised input.

    Args:
        d_in: input width by site.
        counts: number of subcomponents by site.
        hidden: units of each MLP.
    """

    needs = "inputs"

    def __init__(self, d_in: Mapping[str, int], counts: Mapping[str, int], *, hidden: int) -> None:
        super().__init__()
        self.names = list(d_in)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(d_in[n], hidden), nn.GELU(), nn.Linear(hidden, counts[n])) for n in self.names
        )

    def forward(
        self,
        inputs: Mapping[str, Float[Tensor, "*batch _"]],
        token_mask: Bool[Tensor, "batch _"] | None = None,
        cache: GammaCache | None = None,
    ) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid values from site inputs; other tokens, and so their mask and cache, do not matter."""
        dtype = self.mlps[0][0].bias.dtype  # type: ignore[index]
        z = [mlp(rms_norm(inputs[n].to(dtype))) for n, mlp in zip(self.names, self.mlps, strict=True)]
        return torch.cat(z, dim=-1)

    def output_biases(self) -> list[Tensor]:
        """The biases that are added last."""
        return [mlp[-1].bias for mlp in self.mlps]  # type: ignore[index]

    def rows_of_subcomponents(self) -> dict[str, list[str]]:
        """By parameter that has one row per subcomponent: the sites whose subcomponents they are, in order."""
        return {f"mlps.{i}.2.{name}": [site] for i, site in enumerate(self.names) for name in ("weight", "bias")}
