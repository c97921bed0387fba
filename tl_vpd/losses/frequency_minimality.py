"""Frequency minimality: each subcomponent should be important at few tokens.

    L_frequency = Σ_c Φ(f_c),      Φ(f) = f · log2(1 + a f),      f_c = s_c / N

s_c is the penalty of subcomponent c summed over the N real tokens of the whole batch (``penalty``): f_c is a soft frequency.
The logarithm charges a subcomponent more per token the more tokens it is used at, so that one subcomponent does not carry several
mechanisms. ``a = N`` is the term of the VPD paper, section "Optimizing for simplicity". With a fixed *reference count* a the loss
does not depend on the batch size (the authors' later code). At a debiased running mean ``f̂`` of the frequency
(``RunningFrequency``) the value is ``Φ(f̂)`` and the gradient ``Φ'(f̂) · ∂f``.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.checks import number


def frequency_minimality(
    s: Float[Tensor, " C_total"], n: int, *, reference: float | None = None, at: Float[Tensor, " C_total"] | None = None
) -> Float[Tensor, ""]:
    """``Σ_c Φ(f_c)``; 0 for a batch without real tokens.

    Args:
        s: the penalty of each subcomponent, summed over real tokens.
        n: how many real tokens that are.
        reference: the count a (None: the number of tokens, the paper's term).
        at: the running mean ``f̂`` at which Φ and its slope are evaluated (None: the frequency of this batch).
    """
    n = max(n, 1)
    a = float(n) if reference is None else reference
    f = s / n
    if at is None:
        return (f * (1 + a * f).log2()).sum()
    mean = at.detach()
    slope = (1 + a * mean).log2() + a * mean / ((1 + a * mean) * math.log(2))
    value = (mean * (1 + a * mean).log2()).sum()
    return value + (slope * (f - f.detach())).sum()


class RunningFrequency:
    """A debiased running mean of the frequencies: ``f̂ ← β f̂ + (1 − β) f``, divided by ``1 − β^t``.

    Args:
        width: number of subcomponents.
        half_life: in steps; ``β = ½^(1 / half_life)``.
        device: of the mean.
        dtype: of the mean.

    Raises:
        ValueError: the half-life is not above 0.
    """

    def __init__(
        self, width: int, half_life: float, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.beta = 0.5 ** (1 / number("half_life", half_life, above=0))
        self.mean = torch.zeros(width, device=device, dtype=dtype)
        self.updates = 0

    @torch.no_grad()
    def update(self, f: Float[Tensor, " C_total"]) -> Float[Tensor, " C_total"]:
        """Adds the frequencies of a batch and returns the debiased mean."""
        self.updates += 1
        self.mean.lerp_(f.to(self.mean), 1 - self.beta)
        return self.mean / (1 - self.beta**self.updates)
