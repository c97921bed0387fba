"""The training adversary: sources that live across steps (persistent projected gradient ascent).

One source for every batch element, position, subcomponent and Δ, started uniform in [0, 1]. Adam *ascends* the
reconstruction loss; after every update the sources are clamped to [0, 1]. As the batch changes from step to step, the
sources learn what is wrong with the decomposition in general (VPD paper, section on training). *Pooled*, every batch element has
a few sources instead, and each position uses one of them at random at each step.

    m₁ ← β₁ m₁ + (1−β₁) ∇      m₂ ← β₂ m₂ + (1−β₂) ∇²      r ← clamp(r + lr · m̂₁ / (√m̂₂ + ε), 0, 1)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim.adam import adam

ALL = slice(None)
Rows = slice | tuple[slice, slice]
"""Some rows, and some of their slots."""


class PersistentSources:
    """Concatenated sources ``[rows, slots, C_total + n_sites]`` with an Adam of theirs; a slot is a position, or one of a pool.

    Args:
        values: where they start, in [0, 1].
        betas: of Adam.
        eps: of Adam.
    """

    def __init__(
        self,
        values: Float[Tensor, "rows slots C_and_deltas"],
        *,
        betas: tuple[float, float] = (0.5, 0.99),
        eps: float = 1e-8,
    ) -> None:
        self.betas, self.eps = betas, eps
        self.values = values
        self.first = torch.zeros_like(values)
        self.second = torch.zeros_like(values)
        self.updates = 0

    @torch.no_grad()
    def ascend(
        self,
        gradient: Float[Tensor, "rows slots C_and_deltas"],
        lr: float,
        rows: Rows = ALL,
        *,
        update: int | None = None,
        by: Callable[..., object] | None = None,
    ) -> None:
        """One Adam ascent step along ``gradient``, then the clamp.

        Args:
            gradient: of the loss.
            lr: learning rate.
            rows: whose gradient it is, with all slots or some.
            update: number of this update, where rows are updated one slice after the other (None: the next one).
            by: carries out ``ascended`` (None: it runs here, or as one call).
        """
        self.updates = self.updates + 1 if update is None else update
        tensors = self.values[rows], self.first[rows], self.second[rows], gradient
        if by is None and tensors[0].is_contiguous():
            self._ascend_in_one_call(*tensors, lr)
            return
        scale = (1 - self.betas[1] ** self.updates) ** 0.5
        step = lr * scale / (1 - self.betas[0] ** self.updates)
        numbers = (gradient.new_full((), number) for number in (step, self.eps * scale))
        (by or self.ascended)(*tensors, *numbers)

    def _ascend_in_one_call(self, values: Tensor, first: Tensor, second: Tensor, gradient: Tensor, lr: float) -> None:
        """``ascended`` by PyTorch's fused Adam, which goes through the numbers once."""
        before = torch.full((), float(self.updates - 1), device=values.device)  # the kernel counts this update itself
        adam(
            [values],
            [gradient.contiguous()],
            [first],
            [second],
            [],
            [before],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=-lr,  # and not ``maximize``, which would store the moments of the negative gradient
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )
        values.clamp_(0, 1)

    def ascended(
        self,
        values: Float[Tensor, "*sources"],
        first: Float[Tensor, "*sources"],
        second: Float[Tensor, "*sources"],
        gradient: Float[Tensor, "*sources"],
        step: Float[Tensor, ""],
        eps: Float[Tensor, ""],
    ) -> None:
        """Adam's arithmetic on some sources, in place, with its bias corrections in ``step`` and ``eps``."""
        beta1, beta2 = self.betas
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        values.addcdiv_(first * step, second.sqrt().add_(eps)).clamp_(0, 1)

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
        for tensor, name in ((self.values, "values"), (self.first, "first"), (self.second, "second")):
            tensor.copy_(state[name])
        self.updates = int(state["updates"])


def rows_of_slots(slots: Int[Tensor, "rows pos"], n_slots: int) -> Int[Tensor, " tokens"]:
    """Which of the sources ``[rows · slots, C_and_deltas]`` every token uses, from the slot of its batch element."""
    first = torch.arange(len(slots), device=slots.device).unsqueeze(1) * n_slots
    return (first + slots).flatten()
