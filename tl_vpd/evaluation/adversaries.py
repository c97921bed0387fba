"""Adversaries of different freedom: who may choose how the unimportant is masked, and from what.

    m = g + (1 − g) · r,      r ← clamp(r + step · sign(∇_r distance), 0, 1)        (VPD paper, section 3: losses)

==========  ==================================================================================================
shared      one source per subcomponent and Δ for all rows and positions (the standard: it finds systematic faults)
position    one per position, shared by the rows
token       one per token: the freest, it fits the noise of each token
span        r is a union of what *other* tokens need, ``r_c = 1 − Π_k (1 − w_k [g_kc > 0])``: the adversary chooses the
            weight w_k in [0, 1] of each of K explanations from the sample; Δ, which is part of no explanation, stays out
==========  ==================================================================================================

A figure means little without its budget: steps, starts, momentum, and the number of tokens for which the sources had to be bad
together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.checks import check_fields, check_threshold, choice, instance, integer, number, sequence
from tl_vpd.evaluation.batch import Batch
from tl_vpd.evaluation.intervals import PerRow, interval_of_largest
from tl_vpd.evaluation.sample import Sample, measure
from tl_vpd.masking import Masks, fresh_pgd, masks_from_sources
from tl_vpd.printing import Printed

Scope = Literal["shared", "position", "token"]
EXPLANATIONS = 32


@dataclass(frozen=True)
class Adversary:
    """An adversary and its budget.

    Args:
        scope: over what one source is shared.
        steps: of the ascent.
        step_size: of the ascent (None: ``2 / steps``).
        momentum: of the ascent.
        starts: random starts, of which the worst counts.
        explanations: how many tokens' important sets it may combine (None: it chooses every mask and Δ freely).

    Raises:
        TypeError: a value is of another type.
        ValueError: a number is out of its range (an adversary without steps or starts is none), or there is no such scope.
    """

    scope: Scope | str = "shared"
    steps: int = 20
    step_size: float | None = None
    momentum: float = 0.0
    starts: int = 1
    explanations: int | None = None

    def __post_init__(self) -> None:
        choice("scope", self.scope, ("shared", "position", "token"))
        check_fields(self, steps=1, momentum=0, starts=1, explanations=1)
        if self.step_size is not None:
            number("step_size", self.step_size, above=0)
        if self.momentum >= 1:
            raise ValueError(f"momentum={self.momentum}: give a number of at least 0 and below 1.")

    @property
    def name(self) -> str:
        """``shared``, ``position``, ``token``, with ``span`` and ``momentum`` where they are used."""
        span = "" if self.explanations is None else "span"
        scope = span if span and self.scope == "shared" else f"{self.scope} {span}".strip()
        return f"{scope}, momentum" if self.momentum else scope


STANDARD: dict[str, Adversary] = {
    "shared": Adversary(),
    "momentum": Adversary(momentum=0.9),
    "position": Adversary("position"),
    "token": Adversary("token"),
    "span": Adversary(explanations=EXPLANATIONS),
}
"""Adversaries that ``evaluate`` runs: ``shared`` at ``budgets``, the others at ``adversary_budgets``."""


@dataclass(frozen=True)
class Attack(Printed):
    """An adversary's results from all starts, the worst first.

    Attributes:
        adversary: who attacked.
        losses: the distance after the last step.
        by_row: the same of every row.
        sources: of the worst start (None where each token has its own, which are never in memory together).
        tokens: attacked.
    """

    adversary: Adversary
    losses: list[float]
    by_row: list[PerRow]
    sources: Float[Tensor, "..."] | None
    tokens: int

    @property
    def kl(self) -> float:
        """The distance under the worst sources."""
        return self.losses[0]

    def interval(self, *, seed: int = 0) -> tuple[float, float]:
        """The interval of ``kl`` over rows, the worst start chosen anew in every resample."""
        return interval_of_largest(self.by_row, seed=seed)

    def record(self, *, seed: int = 0) -> dict[str, Any]:
        """One row of the table: the adversary, its budget, its result."""
        adversary = self.adversary
        step_size = 2.0 / adversary.steps if adversary.step_size is None else adversary.step_size
        low, high = self.interval(seed=seed)
        return {
            "adversary": adversary.name,
            "steps": adversary.steps,
            "step_size": step_size,
            "starts": adversary.starts,
            "tokens": self.tokens,
            "kl": self.kl,
            "kl_low": low,
            "kl_high": high,
            "kl_weakest_start": self.losses[-1],
        }


def union_of(weights: Float[Tensor, "*batch K"], sets: Bool[Tensor, "K C_total"]) -> Float[Tensor, "*batch C_total"]:
    """The weighted union of sets ``1 − Π_k (1 − w_k s_kc)``: with weights of 0 and 1 the union of the chosen sets."""
    return 1 - (1 - weights.unsqueeze(-1) * sets.to(weights.dtype)).prod(dim=-2)


@measure
def explanations(sample: Sample, n: int, *, threshold: float = 0.0) -> Bool[Tensor, "_ C_total"]:
    """The important sets of n random real tokens of a sample (of all, if it has fewer)."""
    n, threshold = integer("n", n, minimum=1), check_threshold(threshold)
    device = sample.masked_model.adapter.device
    chosen = torch.randperm(sample.n_tokens, generator=sample.generator(7), device=device)[:n]
    sets = torch.empty(len(chosen), sample.site_axis.total, dtype=torch.bool, device=device)
    first = 0
    for batch in sample.batches():
        inside = (chosen >= first) & (chosen < first + batch.n_tokens)
        sets[inside] = batch.g[batch.real][chosen[inside] - first] > threshold
        first += batch.n_tokens
    return sets


class _SourceLoss:
    """The distance as a function of sources, batch by batch, so that memory does not grow with the rows.

    Args:
        sample: the attacked rows.
        scope: over what one source is shared.
        span: important sets that the sources combine (None: sources are masks).
        only: the batch of the sample that is attacked (None: all).
    """

    def __init__(
        self, sample: Sample, scope: str, span: Bool[Tensor, "K C_total"] | None, only: Batch | None = None
    ) -> None:
        self.sample, self.span, self.only = sample, span, only
        self.n_sites = len(sample.site_axis.names)
        self.n_tokens = sample.n_tokens if only is None else only.n_tokens
        width = sample.site_axis.total + self.n_sites if span is None else len(span)
        positions = [1] * len(sample.position_shape) if scope == "shared" else sample.position_shape
        self.shape = (1 if only is None else len(only.rows), *positions, width)

    def batches(self) -> Iterable[Batch]:
        """What is attacked."""
        return self.sample.batches() if self.only is None else [self.only]

    def start(self, number: int) -> Tensor:
        """Random sources: one start. Those of a batch's rows are of the rows, whatever the batch."""
        if self.only is not None:
            return self.sample.uniform(f"attack {number}", self.only.rows, self.shape[1:])
        generator = self.sample.generator(500_000 + number)
        return torch.rand(*self.shape, generator=generator, device=generator.device)

    def masks(self, batch: Batch, sources: Tensor) -> Masks:
        """The masks of a batch under its sources."""
        if self.span is not None:
            union = union_of(sources, self.span)
            sources = torch.cat([union, union.new_zeros(*union.shape[:-1], self.n_sites)], dim=-1)
        return masks_from_sources(batch.g, sources.to(batch.g), self.sample.site_axis)

    def __call__(self, sources: Tensor) -> Tensor:
        """The mean distance; with gradients on, each batch's backward pass runs at once and ``sources.grad`` collects the sum."""
        total = torch.zeros(())
        for batch in self.batches():
            loss = self.sample.loss(batch, self.masks(batch, sources)) * (batch.n_tokens / self.n_tokens)
            if loss.requires_grad:
                loss.backward()
            total += loss.detach().to(total)
        return total

    def by_row(self, sources: Tensor) -> PerRow:
        """The distance of every row under sources."""
        return PerRow.concatenated([b.distance(self.sample.output(b, self.masks(b, sources))) for b in self.batches()])


@measure
def attack(sample: Sample, adversary: Adversary, *, span: Bool[Tensor, "K C_total"] | None = None) -> Attack:
    """Runs an adversary against all rows of a sample together.

    Args:
        sample: the attacked rows.
        adversary: who attacks, with which budget.
        span: important sets to combine (None: of random tokens of the sample, where the adversary has ``explanations``).

    Raises:
        ValueError: there is no position to choose for in these inputs.
    """
    instance("adversary", adversary, Adversary)
    if adversary.scope == "position" and not sample.position_shape:
        raise ValueError("These inputs have no positions: choose the scope shared or token.")
    if adversary.explanations is not None and span is None:
        span = explanations(sample, adversary.explanations)
    options: dict[str, Any] = {
        "steps": adversary.steps,
        "step_size": adversary.step_size,
        "momentum": adversary.momentum,
    }
    # A token's sources act on its row alone, so rows are attacked batch by batch: for all rows they would not fit in memory.
    whole = adversary.scope != "token"
    losses = [0.0] * adversary.starts
    sources: list[Tensor | None] = [None] * adversary.starts
    by_row: list[list[PerRow]] = [[] for _ in range(adversary.starts)]
    for only in [None] if whole else sample.batches():
        loss = _SourceLoss(sample, adversary.scope, span, only)
        for i in range(adversary.starts):
            result = fresh_pgd(loss, loss.start(i), **options)
            losses[i] += result.loss * (loss.n_tokens / sample.n_tokens)
            by_row[i].append(loss.by_row(result.sources))
            sources[i] = result.sources if whole else None
    order = sorted(range(len(losses)), key=lambda i: losses[i], reverse=True)
    rows = [PerRow.concatenated(by_row[i]) for i in order]
    return Attack(adversary, [losses[i] for i in order], rows, sources[order[0]], sample.n_tokens)


def adversaries(
    sample: Sample,
    kinds: Sequence[Adversary] | None = None,
    *,
    budgets: Sequence[int] = (20,),
    rows: int | None = None,
) -> pd.DataFrame:
    """A row for each adversary and budget: steps, starts, tokens attacked together, KL with its interval over rows.

    Args:
        sample: what is attacked.
        kinds: adversaries (None: ``STANDARD``, without ``position`` for inputs without positions).
        budgets: steps, in the place of those that each adversary has.
        rows: attack only the first rows (None: all); the span comes from all.
    """
    instance("sample", sample, Sample)
    if kinds is not None:
        kinds = [instance(f"kinds[{i}]", kind, Adversary) for i, kind in enumerate(sequence("kinds", kinds))]
    rows = None if rows is None else integer("rows", rows, minimum=1)
    budgets = [integer(f"budgets[{i}]", steps, minimum=1) for i, steps in enumerate(sequence("budgets", budgets))]
    if kinds is None:
        kinds = [kind for kind in STANDARD.values() if kind.scope != "position" or sample.position_shape]
    attacked = sample.first(rows)
    records = []
    for kind in kinds:
        span = None if kind.explanations is None else explanations(sample, kind.explanations)
        for steps in budgets:
            records.append(attack(attacked, replace(kind, steps=steps), span=span).record(seed=sample.seed))
    return pd.DataFrame(records)
