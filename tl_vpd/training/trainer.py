"""One training step of VPD, and what lives from step to step.

``Trainer.step`` goes through the sections of ``tl_vpd.training.reference``, the whole method on one page: A clean forward, B
importances, C the adversary's first ascents, D faithfulness, E minimality, F stochastic and G adversarial reconstruction, H one
update of V, U and Γ, I the adversary's last ascent. Those that need the batch are in ``tl_vpd.training.stream``. Unlike there,
rows may run in micro-batches and be split over processes (``tl_vpd.training.distributed``).

    >>> trainer = Trainer(masked_model, config, shape=(32, 64))        # doctest: +SKIP
    >>> trainer.step(tokens)                                          # doctest: +SKIP
    StepMetrics(...)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.losses import check_relative, check_units
from tl_vpd.training.config import ExecutionConfig, VPDConfig
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.distributed.sharding import after_update, clip_gradients, is_sharded
from tl_vpd.training.engine import engine_of
from tl_vpd.training.metrics import StepMetrics
from tl_vpd.training.optimizers import optimizers_of
from tl_vpd.training.schedules import Schedule
from tl_vpd.training.stream import Stream, Values, count_tokens
from tl_vpd.training.ties import Ties

MATRICES = "V and U"


class Trainer:
    """V, U and Γ of a decomposition under training, with their optimizers, the adversary and the random state.

    Args:
        masked_model: an entered ``MaskedModel`` of the decomposition, sharded or not, and its target.
        config: what is learned.
        shape: (batch, pos) of every batch, over all processes; pos is 1 for inputs ``[batch, d]``.
        execution: how it runs (None: ``ExecutionConfig()``).
        world: the processes that split the batch (None: one).

    Raises:
        ValueError: the batch cannot be split, tied sites or Muon's matrices are sharded, V, U and Γ are in less than float32, a
            weight to which faithfulness is relative is zero, or locality has no site that writes to heads or neurons.
        RuntimeError: this PyTorch has no Muon.
        Unsupported: a target in float16, ``checkpoint`` with a model that is not a stack of layers, ``blocked_logits`` with one
            whose logits are more than a product (raised by the first step), or ``compile`` with another dtype than V and U have.
    """

    metrics_kind: type[StepMetrics] = StepMetrics

    def __init__(
        self,
        masked_model: MaskedModel,
        config: VPDConfig,
        shape: tuple[int, int],
        *,
        execution: ExecutionConfig | None = None,
        world: World | None = None,
    ) -> None:
        self.masked_model, self.config, self.world = masked_model, config, world or World()
        self.execution = execution or ExecutionConfig()
        self.engine = engine_of(masked_model, config, self.execution)
        self.decomposition = self.engine.decomposition
        self.weights = {name: masked_model.adapter.weight(name) for name in self.decomposition.sites}
        if config.faithfulness.kind == "relative":
            check_relative(self.weights)
        if config.coefficients.locality:
            check_units(self.decomposition.components)
        self.how = {
            **self.execution.model_dump(include={"compile", "micro_batch", "blocked_logits"}),
            "processes": self.world.size,
            "sharded": is_sharded(self.decomposition),
        }
        """What changes results to rounding only."""

        self.sharded = is_sharded(self.decomposition)
        if config.tied and self.execution.sharding != "none":
            raise ValueError(f"Tied sites cannot be sharded: sharding={self.execution.sharding!r} needs tied=().")
        if config.optimizer.kind == "muon" and self.sharded:
            raise ValueError(
                f"Muon needs whole matrices: sharding={self.execution.sharding!r} goes with optimizer.kind='adamw', and "
                "sharding='none' with both."
            )
        self.ties = Ties(self.decomposition.components, config.tied)
        self.matrices = self.ties.free(self.decomposition.components.matrices())
        self.gamma_parameters = list(self.decomposition.gamma.parameters())
        self.parameters = [*self.matrices, *self.gamma_parameters]
        self.optimizers = optimizers_of(config.optimizer, self.matrices, self.decomposition.gamma)

        self.stream = self._stream(shape)
        self.split, self.sources, self.minimality = self.stream.split, self.stream.sources, self.stream.minimality
        self.done = 0

    def warm_up(self, *, progress: bool = False) -> float:
        """Faithfulness alone, on V and U, with a separate AdamW; returns the last loss.

        Args:
            progress: show a bar.
        """
        faithfulness = self.config.faithfulness
        optimizer = torch.optim.AdamW(self.matrices, lr=faithfulness.warm_up_lr, weight_decay=0.0, fused=True)
        steps = faithfulness.warm_up_steps
        if "warm_up_steps" not in faithfulness.model_fields_set:
            steps = min(steps, self.config.steps)
        for _ in tqdm(range(steps), disable=not progress, desc="faithfulness warm-up", unit="step", leave=False):
            optimizer.zero_grad(set_to_none=True)
            self._faithfulness(1 / self.world.size)
            self._add_gradients(self.matrices)
            optimizer.step()
            self.after_update()
        optimizer.zero_grad(set_to_none=True)
        return float(self._faithfulness(0.0))

    def step(
        self, tokens: Shaped[Tensor, "batch ..."], token_mask: Bool[Tensor, "batch pos"] | None = None
    ) -> StepMetrics:
        """One update of V, U, Γ and the adversary on this process's rows.

        Args:
            tokens: ``[batch, pos]``; custom models may take vectors, ``[batch, pos, d]`` or ``[batch, d]``.
            token_mask: False at padding (None: no padding).

        Raises:
            ValueError: there are more or fewer rows than the trainer was made for, or all is padding.
            FloatingPointError: a loss or gradient is not finite (V, U and Γ have not been updated then, the adversary may have
                been).
        """
        now = Schedule.at(self.done, self.config)
        # Everything, also followers of tied sites and what a refused step has left.
        self.decomposition.zero_grad(set_to_none=True)
        batch = self.stream.batch(tokens, token_mask, self.done)
        (n,) = count_tokens([batch])
        values = self._of_weights(now)
        gradients = self.stream.backward(batch, n, now)
        metrics = self._update(values | gradients.values, now)
        gradients.ascend(now)
        self.done += 1
        return metrics

    def after_update(self) -> None:
        """Copies what has changed to tied sites, and discards what processes have gathered of it."""
        after_update(self.decomposition)
        self.ties.follow()

    # -- inside a step ---------------------------------------------------------------------------------------------

    def _stream(self, shape: tuple[int, int]) -> Stream:
        return Stream(self.config, self.engine, shape, self.world, self.execution.micro_batch)

    def _of_weights(self, now: Schedule) -> Values:
        """D. Faithfulness, and locality, with their gradients."""
        c = now.coefficients
        values = {"faithfulness": self._faithfulness(c.delta / self.world.size)}
        if c.locality:
            values["locality"] = self.engine.locality(now.locality, c.locality / self.world.size)
        return values

    def _faithfulness(self, coefficient: float) -> Float[Tensor, ""]:
        """The loss; its gradients, times the coefficient, go to V and U."""
        return self.engine.faithfulness(self.weights, coefficient, relative=self.config.faithfulness.kind == "relative")

    def _update(self, values: Values, now: Schedule) -> StepMetrics:
        """Clips gradients, checks losses and norms, updates V, U and Γ."""
        self._add_gradients(self.parameters)
        norms = self._clip()
        both = torch.stack([v.double() for v in (*values.values(), *norms.values())]).tolist()  # waits for the device
        numbers, norm = dict(zip(values, both, strict=False)), dict(zip(norms, both[len(values) :], strict=True))
        total = self._total(numbers, now)
        if not math.isfinite(total):
            wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
            raise FloatingPointError(f"Step {self.done}: not finite: {', '.join(wrong) or 'total'} ({numbers}).")
        for whose, value in norm.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"Step {self.done}: the gradient of {whose} is not finite ({numbers}).")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * now.rate
            optimizer.step()
        self.after_update()
        lr = self.config.optimizer.lr * now.rate
        return self.metrics_kind(step=self.done, total=total, p=now.p, lr=lr, grad_norm=norm[MATRICES], **numbers)

    def _clip(self) -> dict[str, Float[Tensor, ""]]:
        """Clips gradients; their norms before, by whose they are."""
        optimizer = self.config.optimizer
        return {
            MATRICES: clip_gradients(self.matrices, optimizer.clip),
            "Γ": clip_gradients(self.gamma_parameters, optimizer.gamma_clip),
        }

    def _total(self, values: Mapping[str, float], now: Schedule) -> float:
        c = now.coefficients
        return (
            c.delta * values["faithfulness"]
            + (c.importance * values["importance"] + c.frequency * values["frequency"])
            + sum(getattr(c, name) * values[name] for name in self.stream.passes.losses)
            + c.locality * values.get("locality", 0.0)
        )

    def _add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Adds gradients of tied sites, and over processes (sharded ones have been added by backward)."""
        self.ties.collect()
        if not self.sharded:
            self.world.add_gradients(parameters)
