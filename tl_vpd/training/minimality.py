"""Both minimality losses of a step, from sums over the whole batch.

They are not sums over tokens, so they are differentiated once in the sums ``s_c`` of the whole batch, however it is split:

    ∇ L_min = Σ_c (∂L_min/∂s_c) ∇ s_c,      s_c = Σ over micro-batches and processes          (VPD paper, section 3)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.losses import Penalty, RunningFrequency, frequency_minimality, importance_minimality
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.schedules import Schedule


class Minimality:
    """The losses, and the running mean of frequencies if the config has one.

    Args:
        config: of the run.
        width: number of all subcomponents.
        like: a tensor with the device and dtype of importances.
    """

    def __init__(self, config: VPDConfig, width: int, like: Tensor) -> None:
        self.config = config
        self.frequencies: RunningFrequency | None = None
        half_life = config.minimality.frequency_half_life
        if half_life is not None:
            self.frequencies = RunningFrequency(width, half_life, device=like.device, dtype=like.dtype)

    def penalty(self, now: Schedule) -> Penalty:
        """The penalty on an importance at a step."""
        kind = self.config.minimality.kind
        if kind == "power":
            return Penalty(kind, now.p)
        return Penalty(kind, now.smooth, normalised=self.config.minimality.normalised)

    def losses(
        self, sums: Float[Tensor, " C_total"], n: int, now: Schedule
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, " C_total"]]:
        """Both losses by name, and the gradient of their weighted sum in the sums.

        Args:
            sums: ``s_c`` of the whole batch.
            n: its real tokens.
            now: the schedule of the step.
        """
        c, leaf = now.coefficients, sums.detach().requires_grad_()
        mean = None if self.frequencies is None else self.frequencies.update(sums.detach() / max(n, 1))
        reference = self.config.minimality.frequency_reference
        losses = {
            "importance": importance_minimality(leaf, n),
            "frequency": frequency_minimality(leaf, n, reference=reference, at=mean),
        }
        weighted = c.importance * losses["importance"] + c.frequency * losses["frequency"]
        (gradient,) = torch.autograd.grad(weighted, leaf)
        return {name: loss.detach() for name, loss in losses.items()}, gradient
