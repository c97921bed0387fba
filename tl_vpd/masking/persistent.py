"""The training adversary: sources that live across steps (persistent projected gradient ascent).

One source for every batch element, position, subcomponent and Δ, started uniform in [0, 1]. Adam *ascends* the
reconstruction loss; after every update the sources are clamped to [0, 1]. As the batch changes from step to step the
sources find what is wrong with the decomposition in general.

    m₁ ← β₁ m₁ + (1−β₁) ∇      m₂ ← β₂ m₂ + (1−β₂) ∇²      r ← clamp(r + lr · m̂₁ / (√m̂₂ + ε), 0, 1)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.sites import Packing


class PersistentSources:
    """Packed sources ``[batch, pos, C_total + n_sites]`` with their own Adam; one step counter for all updates."""

    def __init__(
        self,
        packing: Packing,
        shape: tuple[int, int],
        *,
        generator: torch.Generator,
        betas: tuple[float, float] = (0.5, 0.99),
        eps: float = 1e-8,
    ) -> None:
        self.betas, self.eps = betas, eps
        width = packing.total + len(packing.names)
        self.values = torch.rand(*shape, width, generator=generator, device=generator.device)
        self.first = torch.zeros_like(self.values)
        self.second = torch.zeros_like(self.values)
        self.updates = 0
        self._work = torch.empty_like(self.values)

    def leaf(self) -> Float[Tensor, "batch pos C_and_deltas"]:
        """The sources as a leaf that collects gradients; the values are shared, not copied."""
        return self.values.detach().requires_grad_()

    @torch.no_grad()
    def ascend(self, gradient: Float[Tensor, "batch pos C_and_deltas"], lr: float) -> None:
        """One Adam ascent step along ``gradient``, then the clamp."""
        beta1, beta2 = self.betas
        self.updates += 1
        self.first.lerp_(gradient, 1 - beta1)
        self.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (1 - beta2**self.updates) ** 0.5
        step = lr * scale / (1 - beta1**self.updates)
        torch.sqrt(self.second, out=self._work).add_(self.eps * scale)
        self.values.addcdiv_(self.first, self._work, value=step).clamp_(0, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Values, both moments and the counter."""
        return {
            "values": self.values,
            "first": self.first,
            "second": self.second,
            "updates": torch.tensor(self.updates),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores ``state_dict``; raises ValueError if the shapes differ."""
        if state["values"].shape != self.values.shape:
            raise ValueError(
                f"Saved sources are {tuple(state['values'].shape)}, this run's are {tuple(self.values.shape)}: "
                "resume with the batch size and sequence length that the run was started with."
            )
        device = self.values.device
        self.values, self.first, self.second = (state[k].to(device) for k in ("values", "first", "second"))
        self.updates = int(state["updates"])
