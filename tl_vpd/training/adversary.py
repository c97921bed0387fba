"""The adversary of training: sources that live from step to step and ascend the reconstruction loss.

One source for each attacked row, position (or slot of a pool), subcomponent and Δ (VPD paper, section 3: adversarial
reconstruction, persistent projected gradient ascent). Each step ascends a few times with V, U and Γ constant, and once more with
the gradient that the main backward gives.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.forward.mask_inputs import MaskInputs
from tl_vpd.masking import PersistentSources, rows_of_slots
from tl_vpd.masking.persistent import Rows
from tl_vpd.training.engine import CleanForward, EagerEngine
from tl_vpd.training.micro_batch import MicroBatch
from tl_vpd.training.step_samples import StepSamples, routed_share


class Adversary:
    """The sources of a process's attacked rows.

    Args:
        engine: runs the passes.
        sources: with their Adam moments.
        slots: how many of each row's sources the batch has positions for (None: all).
    """

    def __init__(self, engine: EagerEngine, sources: PersistentSources, *, slots: int | None = None) -> None:
        self.engine, self.sources, self.slots = engine, sources, slots

    def inputs(self, micro_batch: MicroBatch, samples: StepSamples) -> MaskInputs:
        """What the masks of a micro-batch's attacked rows are made from."""
        values = self.sources.values[self._rows(micro_batch)]
        slots = samples.slots
        source_rows = None if slots is None else rows_of_slots(slots[micro_batch.attacked], values.shape[1])
        routing = samples.adversarial_routing and samples.adversarial_routing.rows(micro_batch.attacked)
        return MaskInputs(values.flatten(0, 1), source_rows, routing, routed_share=routed_share(routing))

    def ascend_alone(
        self, clean: CleanForward, samples: StepSamples, total: Float[Tensor, ""], lr: float, update: int
    ) -> None:
        """One ascent on a micro-batch, with V, U and Γ constant; nothing where it has no attacked rows.

        Args:
            clean: the micro-batch.
            samples: the step's.
            total: attacked real tokens of the whole batch.
            lr: Adam's learning rate.
            update: the number of this ascent, from 1.
        """
        if clean.attacked.stop == 0:
            return
        inputs = self.inputs(clean.micro_batch, samples)
        gradient = torch.zeros_like(inputs.sources)
        self.engine.attack(clean, inputs, total, grad_sources=gradient)
        self.ascend(clean.micro_batch, gradient, lr, update)

    def ascend(
        self, micro_batch: MicroBatch, gradient: Float[Tensor, "rows C_and_deltas"], lr: float, update: int
    ) -> None:
        """Moves a micro-batch's sources along the gradient of the adversarial loss; arguments as in ``ascend_alone``."""
        rows = self._rows(micro_batch)
        self.engine.ascend(self.sources, gradient.view(self.sources.values[rows].shape), lr, rows, update)

    def _rows(self, micro_batch: MicroBatch) -> Rows:
        """A micro-batch's sources."""
        return micro_batch.attacked if self.slots is None else (micro_batch.attacked, slice(self.slots))
