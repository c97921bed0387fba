"""What every measure reads: rows of a model's data, the target's output on them, and the importances at every token.

    >>> with sampled(vpd, model, tokens) as sample:                # doctest: +SKIP
    ...     union_test(sample), adversaries(sample), mask_transfer(sample)

A measure is a function of a sample. Controls are samples too: with other components, or with importances that were moved.
Neither the batch size nor the memory that a sample may keep changes a figure (except for rounding): random numbers
belong to rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tl_vpd.adapters import Adapter
from tl_vpd.checks import instance, integer, seed_of
from tl_vpd.components import Components
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.batch import Batch, BatchStore, Rows, ce_by_row
from tl_vpd.evaluation.importance_statistics import ImportanceStatistics
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.forward.site_taps import SitePass
from tl_vpd.losses import Reconstruction
from tl_vpd.masking import Masks
from tl_vpd.masking.row_random import RowRandom
from tl_vpd.site import ConcatenatedAxis

KEEP_BYTES = 1 << 30
"""Memory for targets and importances between passes: 1 GiB. What does not fit is computed again in each pass."""

Importances = Callable[["Sample", Rows, Mapping[str, Tensor]], Tensor]
"""(sample, rows, clean inputs of the sites) -> concatenated importances of these rows."""
MasksOf = Callable[[Batch], Masks]
"""The masks of a batch."""
Measure = TypeVar("Measure", bound=Callable[..., Any])


def measure(function: Measure) -> Measure:
    """Decorates a function of a sample: during the call the model is tapped and frozen and no gradients are recorded.

    Before and after it, the model, the user's hooks and the gradient mode are as the user left them.
    """

    @wraps(function)
    def run(sample: Sample, *args: Any, **options: Any) -> Any:
        instance("sample", sample, Sample)
        with torch.inference_mode(False), torch.no_grad(), sample.masked_model:
            return function(sample, *args, **options)

    return cast(Measure, run)


@dataclass(frozen=True)
class Outcome:
    """The distance from the target's output and, for logits, the cross-entropy of the next token, by row."""

    distance: PerRow
    ce: PerRow | None


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows that a decomposition is measured on, batch by batch, on the model's device.

    Args:
        masked_model: the model that runs with masks.
        importances: gives the importances of rows from the clean inputs of the sites.
        rows: the data.
        batch_size: how many rows run together.
        seed: of all random numbers.
        store: keeps batches between passes.
    """

    masked_model: MaskedModel
    importances: Importances = field(repr=False)
    rows: Rows = field(repr=False)
    batch_size: int
    seed: int
    store: BatchStore = field(repr=False)

    @property
    def site_axis(self) -> ConcatenatedAxis:
        """Where each site lies on the concatenated axis."""
        return self.masked_model.weights.site_axis

    @property
    def has_logits(self) -> bool:
        """Whether outputs are logits of a next token (else distances are squared errors)."""
        return self.masked_model.adapter.return_types

    @property
    def distance_name(self) -> str:
        """``kl`` (nats per token) for logits, ``mse`` for other outputs."""
        return "kl" if self.has_logits else "mse"

    def first(self, n: int | None) -> Sample:
        """The same with the first ``n`` rows only (None: all)."""
        return self if n is None or n >= len(self.rows) else replace(self, rows=self.rows.take(slice(n)))

    def regrouped(self, indices: Sequence[int], size: int) -> Sample:
        """The chosen rows in the order of ``indices``, in batches that hold whole groups of ``size`` rows; nothing is kept."""
        batch_size = max(self.batch_size // size, 1) * size
        return replace(self, rows=self.rows.take(list(indices)), batch_size=batch_size, store=BatchStore(0))

    @measure
    def clean(self, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """The target's output on rows, and every site's input."""
        return self.masked_model.clean(rows.tokens, rows.token_mask)

    @property
    def row_slices(self) -> list[slice]:
        """Which rows each batch holds."""
        return [
            slice(at, min(at + self.batch_size, len(self.rows))) for at in range(0, len(self.rows), self.batch_size)
        ]

    def batches(self) -> Iterator[Batch]:
        """All batches in turn, each kept in memory only if it fits into the store."""
        for where in self.row_slices:
            yield self.store.get(self.rows.take(where), self.batch)

    @measure
    def batch(self, rows: Rows) -> Batch:
        """Rows after a clean pass, with their importances."""
        run = SitePass(collect=True)
        output = self.masked_model.run(rows.tokens, run, rows.token_mask)
        return Batch(
            rows,
            self.importances(self, rows, run.inputs),
            Reconstruction(output, self.distance_name, rows.token_mask),  # type: ignore[arg-type]
            ce_by_row(output, rows.tokens, rows.token_mask) if self.has_logits else None,
            run.residual if self.starts_late else None,
        )

    @cached_property
    def starts_late(self) -> bool:
        """Whether masked passes start at the first decomposed block."""
        first = self.rows.take(slice(1))
        with self.masked_model:
            return self.masked_model.can_start_late(first.tokens, first.token_mask)

    def masked(self, batch: Batch, masks: Masks, *, constant_weights: bool = False) -> Tensor:
        """The masked model's output on a batch, inside a measure or with the model entered."""
        rows = batch.rows
        return self.masked_model.masked(
            rows.tokens, masks, rows.token_mask, start=batch.residual, constant_weights=constant_weights
        )

    @cached_property
    def statistics(self) -> ImportanceStatistics:
        """Statistics of the importances over all rows, from one pass."""
        return ImportanceStatistics.over(self.batches(), self.site_axis)

    @property
    def n_tokens(self) -> int:
        """Real tokens of all rows."""
        return self.statistics.n_tokens

    @cached_property
    def target_ce(self) -> PerRow | None:
        """The target's cross-entropy of the next token by row (None: the model returns no logits)."""
        return PerRow.concatenated([b.target_ce for b in self.batches() if b.target_ce]) if self.has_logits else None

    @cached_property
    def position_shape(self) -> tuple[int, ...]:
        """The shape of a row's positions: ``(pos,)``, or ``()`` for inputs without positions."""
        return tuple(next(self.batches()).g.shape[1:-1])

    def uniform(self, name: str, rows: Rows, shape: Sequence[int]) -> Shaped[Tensor, "row ..."]:
        """Uniform numbers in [0, 1) that depend on the seed, the name and each row's number alone."""
        return RowRandom(self.seed, self.masked_model.adapter.device).uniform(name, 0, rows.numbers, tuple(shape))

    def generator(self, *numbers: int) -> torch.Generator:
        """A generator for random numbers that all rows share; ``numbers`` distinguish its uses."""
        seed = self.seed
        for number in numbers:
            seed = seed * 1_000_003 + number
        return torch.Generator(self.masked_model.adapter.device).manual_seed(seed % (1 << 63))

    @measure
    def output(self, batch: Batch, masks: Masks) -> Tensor:
        """The masked model's output on a batch."""
        return self.masked(batch, masks)

    def loss(self, batch: Batch, masks: Masks) -> Float[Tensor, ""]:
        """The mean distance on a batch, with gradients to the masks where gradients are on."""
        with self.masked_model:
            output = self.masked(batch, masks, constant_weights=True)
        return batch.reconstruction(output)

    @measure
    def outcomes_of(self, outputs: Mapping[str, Callable[[Batch], Tensor]]) -> dict[str, Outcome]:
        """Distance and cross-entropy of several outputs of each batch, from one pass over the batches."""
        distances: dict[str, list[PerRow]] = {name: [] for name in outputs}
        losses: dict[str, list[PerRow]] = {name: [] for name in outputs}
        for batch in self.batches():
            for name, function in outputs.items():
                output = function(batch)
                distances[name].append(batch.distance(output))
                if self.has_logits:
                    losses[name].append(batch.ce(output))
        return {
            name: Outcome(
                PerRow.concatenated(distances[name]), PerRow.concatenated(losses[name]) if self.has_logits else None
            )
            for name in outputs
        }

    def outcomes(self, masks_of: Mapping[str, MasksOf]) -> dict[str, Outcome]:
        """The same of the outputs under several kinds of masks."""
        return self.outcomes_of(
            {name: lambda batch, masks=masks: self.output(batch, masks(batch)) for name, masks in masks_of.items()}  # type: ignore[misc]
        )

    def distances(self, masks: MasksOf) -> PerRow:
        """The distance under one kind of masks, by row."""
        return self.outcomes({"": masks})[""].distance


def learned(decomposition: Decomposition) -> Importances:
    """The importances that Γ gives, 0 at padding."""
    return lambda _, rows, inputs: decomposition.importances(inputs, rows.token_mask)


@contextmanager
def sampled(
    decomposition: Decomposition | Components,
    model: nn.Module,
    tokens: Any,
    *,
    importances: Importances | None = None,
    batch_size: int = 16,
    seed: int = 0,
    keep_bytes: int = KEEP_BYTES,
) -> Iterator[Sample]:
    """Rows of a model's data as a sample. Rows of padding only are left out.

    The model, its hooks and the gradient mode are changed only while a measure runs. What the sample keeps is freed on leaving.

    Args:
        decomposition: of the model (bare Components need ``importances``).
        model: the target.
        tokens: a string, strings, rows ``[n, pos]``, or the input of a custom model.
        importances: replaces Γ's.
        batch_size: how many rows run together.
        seed: of all random numbers.
        keep_bytes: how much memory targets and importances may take between passes; what does not fit is computed again.

    Raises:
        ValueError: the tokens or the decomposition do not fit the model, all tokens are padding, or a number is out of its range.
        TypeError: bare Components have no importances, or an argument is of another type.
    """
    batch_size, seed = integer("batch_size", batch_size, minimum=1), seed_of(seed)
    keep_bytes = integer("keep_bytes", keep_bytes, minimum=0)
    masked_model = MaskedModel(decomposition, model)
    if importances is None:
        if not isinstance(decomposition, Decomposition):
            raise TypeError(f"A {type(decomposition).__name__} has no Γ: pass importances=.")
        importances = learned(decomposition)
    rows = all_rows(masked_model.adapter, tokens)
    store = BatchStore(keep_bytes)
    try:
        yield Sample(masked_model, importances, rows, batch_size, seed, store)
    finally:
        store.clear()


def all_rows(adapter: Adapter, tokens: Any) -> Rows:
    """Prompts or inputs as rows, without rows of padding only."""
    rows = adapter.tokens(tokens)
    token_mask = adapter.padding(rows, None)
    every = Rows(rows, token_mask, list(range(len(rows))))
    if token_mask is None or bool(token_mask.any(1).all()):
        return every
    real = token_mask.any(1).nonzero()[:, 0].tolist()
    if not real:
        raise ValueError(f"All {len(rows)} rows are padding: there is nothing to measure.")
    return every.take(real)
