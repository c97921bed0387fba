"""What trainer and engine pass to each other in a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.losses import Reconstruction
from tl_vpd.training.micro_batch import MicroBatch

ALL = slice(None)


@dataclass(frozen=True)
class CleanForward:
    """A micro-batch after its clean forward and Γ.

    Attributes:
        micro_batch: its rows.
        tokens: of these rows.
        token_mask: False at padding (None: no padding).
        distance: from the target's output.
        z: Γ's pre-sigmoid values, of which each masked pass makes the importances that it needs.
        sums: ``s_c``, the penalty on importances summed over tokens.
        l0: the number of importances above 0.
        residual: what masked passes start from (None: they run every block).
    """

    micro_batch: MicroBatch
    tokens: Tensor
    token_mask: Bool[Tensor, "batch pos"] | None
    distance: Reconstruction
    z: Float[Tensor, "batch *pos C_total"]
    sums: Float[Tensor, " C_total"]
    l0: Float[Tensor, ""]
    residual: Float[Tensor, "batch pos d_model"] | None = None

    @property
    def attacked(self) -> slice:
        """The rows that the adversary attacks: the first ones."""
        return slice(0, self.micro_batch.attacked.stop - self.micro_batch.attacked.start)


@dataclass(frozen=True)
class LossTerm:
    """One reconstruction loss of a masked pass: a mean over real tokens of the batch, of which these rows are a part.

    Attributes:
        total: real tokens of the whole batch that the loss is a mean over.
        weight: of the loss.
        rows: of the micro-batch.
    """

    total: Float[Tensor, ""]
    weight: float
    rows: slice = field(default_factory=lambda: ALL)
