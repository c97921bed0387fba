"""A targeted training step: two streams, whose gradients add up in one update (arXiv 2607.13047).

===========  ================================================  ==========================================================
stream       masks                                             losses
===========  ================================================  ==========================================================
target       as in plain training: drawn, and the adversary's  stochastic, adversarial; importance and frequency minimality
target       all 1, Δ's 0                                      unmasked
non-target   between the importance there and 1, Δ's 1         stochastic ("nontarget"); importance minimality
===========  ================================================  ==========================================================

After the update, unimportant subcomponents decay. ``tl_vpd.training.reference_targeted`` has the step on one page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from tl_vpd.forward.mask_inputs import MaskInputs
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.training.config import ExecutionConfig
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.engine import CleanForward, LossTerm
from tl_vpd.training.masked_passes import MaskedPasses, PassResult, TokenCounts
from tl_vpd.training.metrics import StepMetrics, TargetedMetrics
from tl_vpd.training.schedules import Schedule
from tl_vpd.training.step_samples import StepSampler, StepSamples
from tl_vpd.training.stream import Stream, Values, count_tokens
from tl_vpd.training.targeted.config import TargetedCoefficients, TargetedConfig
from tl_vpd.training.trainer import Trainer


class TargetPasses(MaskedPasses):
    """The masked passes of the target stream."""

    losses = (*MaskedPasses.losses, "unmasked")

    def run(
        self, clean: CleanForward, step: int, samples: StepSamples, counts: TokenCounts, grad_g: Tensor
    ) -> Iterator[PassResult]:
        """Those of a plain run, and the unmasked one."""
        yield from super().run(clean, step, samples, counts, grad_g)
        assert isinstance(self.coefficients, TargetedCoefficients)
        if self.coefficients.unmasked:
            axis = self.sampler.site_axis
            sources = clean.z.new_ones(1, axis.total + len(axis.names))  # a source of 1 makes a mask of 1, whatever g
            sources[:, axis.total :] = 0
            rows = torch.zeros(clean.z[..., 0].numel(), dtype=torch.long, device=clean.z.device)
            term = LossTerm(counts.all, self.coefficients.unmasked)
            (loss,) = self.engine.reconstruct(clean, MaskInputs(sources, rows), [term], grad_g=grad_g)
            yield PassResult({"unmasked": loss})


class NontargetSampler(StepSampler):
    """Draws for the non-target stream: Δ's sources, which are its masks, are 1, and there is no adversary."""

    def start(self) -> Float[Tensor, "attacked slots C_and_deltas"]:
        """No sources."""
        return torch.empty(0, 0, self.width, device=self.random.generator.device, dtype=self.dtype)

    def sources(self, what: str, step: int, rows: Sequence[int]) -> Float[Tensor, "rows pos C_and_deltas"]:
        """Sources of rows, other than those of the target stream."""
        sources = super().sources(f"nontarget {what}", step, rows)
        sources[..., self.site_axis.total :] = 1
        return sources

    def at(self, step: int) -> StepSamples:
        """The step's routing, other than that of the target stream."""
        routing = self._routing("nontarget routing", step, self.split.stochastic, self.config.stochastic_routing)
        return StepSamples(stochastic_routing=routing, adversarial_routing=None)


class TargetStream(Stream):
    """The stream of what is decomposed."""

    passes, notes_largest = TargetPasses, True


class NontargetStream(Stream):
    """The stream of ordinary data."""

    sampler_kind, notes_largest = NontargetSampler, True


class TargetedTrainer(Trainer):
    """V, U and Γ of a targeted decomposition under training.

    Args:
        masked_model: as for ``Trainer``.
        config: what is learned.
        shapes: (rows, positions) of the target's batches and of the non-target ones; rows have at most so many positions.
        execution: as for ``Trainer``.
        world: as for ``Trainer``.

    Raises:
        ValueError, RuntimeError, Unsupported: as ``Trainer``.
    """

    metrics_kind = TargetedMetrics

    def __init__(
        self,
        masked_model: MaskedModel,
        config: TargetedConfig,
        shapes: tuple[tuple[int, int], tuple[int, int]],
        *,
        execution: ExecutionConfig | None = None,
        world: World | None = None,
    ) -> None:
        super().__init__(masked_model, config, shapes[0], execution=execution, world=world)
        rest = shapes[1], self.world, self.execution.micro_batch
        self.start: Callable[[], None] | None = None
        """Sets V and U before the first step (None: they stay as they are)."""
        self.decay, self.nontarget = config.decay, NontargetStream(config.off_target(), self.engine, *rest)

    def warm_up(self, *, progress: bool = False) -> float:
        """Sets V and U where they do not start at random; there is no faithfulness, and so no bar.

        Args:
            progress: not used.
        """
        if self.start is not None:
            self.start()
        return 0.0

    def step(  # type: ignore[override]
        self,
        tokens: Shaped[Tensor, "batch ..."],
        token_mask: Bool[Tensor, "batch pos"] | None,
        nontarget: Shaped[Tensor, "others ..."],
        nontarget_mask: Bool[Tensor, "others other_pos"] | None = None,
    ) -> StepMetrics:
        """One update of V, U, Γ and the adversary on this process's rows of both batches.

        Args:
            tokens: of the target, ``[batch, pos]``, or vectors.
            token_mask: False at padding (None: no padding).
            nontarget: rows of the non-target stream.
            nontarget_mask: of these.

        Raises:
            ValueError, FloatingPointError: as ``Trainer.step``.
        """
        now = Schedule.at(self.done, self.config)
        assert isinstance(now.coefficients, TargetedCoefficients)
        self.decomposition.zero_grad(set_to_none=True)
        batch = self.stream.batch(tokens, token_mask, self.done)
        other_batch = self.nontarget.batch(nontarget, nontarget_mask, self.done)
        n, n_other = count_tokens([batch, other_batch])
        values = self._of_weights(now)
        target = self.stream.backward(batch, n, now)
        elsewhere = replace(now, coefficients=now.coefficients.off_target())
        other = self.nontarget.backward(other_batch, n_other, elsewhere)
        renamed = {"nontarget": "stochastic", "nontarget_importance": "importance", "nontarget_l0": "l0"}
        values |= target.values | {name: other.values[plain] for name, plain in renamed.items()}
        metrics = self._update(values, now)
        if self.decay:
            both = [stream.largest for stream in (target, other) if stream.largest is not None]
            self._decay(self.world.largest(torch.stack(both).amax(0)), metrics.lr)
        target.ascend(now)
        self.done += 1
        return metrics

    def _stream(self, shape: tuple[int, int]) -> Stream:
        return TargetStream(self.config, self.engine, shape, self.world, self.execution.micro_batch)

    def _of_weights(self, now: Schedule) -> Values:
        """Locality; Δ has no loss, and is not formed."""
        values = {"faithfulness": torch.zeros((), device=self.decomposition.device)}
        if now.coefficients.locality:
            locality = self.engine.locality(now.locality, now.coefficients.locality / self.world.size)
            values["locality"] = locality
        return values

    def _total(self, values: dict[str, float], now: Schedule) -> float:  # type: ignore[override]
        assert isinstance(now.coefficients, TargetedCoefficients)
        c = now.coefficients.off_target()
        nontarget = c.stochastic * values["nontarget"] + c.importance * values["nontarget_importance"]
        return super()._total(values, now) + nontarget

    @torch.no_grad()
    def _decay(self, largest: Float[Tensor, " C_total"], lr: float) -> None:
        """Multiplies V's columns and U's rows by ``1 − lr · decay · (1 − g)``."""
        components = self.decomposition.components
        for name, factor in components.site_axis.split_sites(1 - lr * self.decay * (1 - largest)).items():
            for matrix, by in ((components.V[name], factor), (components.U[name], factor[:, None])):
                matrix.mul_(_like(by.to(matrix.dtype), matrix))
        self.after_update()


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor, which every process has, in the way in which the parameter is stored."""
    if not isinstance(parameter, DTensor):
        return tensor
    everywhere = [Replicate()] * parameter.device_mesh.ndim
    return DTensor.from_local(tensor, parameter.device_mesh, everywhere, run_check=False)
