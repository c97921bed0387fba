"""Adversaries of different freedom: who may choose how the unimportant is masked, and from what.

    m = g + (1 − g) · r,      r ← clamp(r + step · sign(∇_r distance), 0, 1)

==========  ==================================================================================================
shared      one source a subcomponent and Δ for all rows and positions (the standard: it finds systematic faults)
position    one for every position, shared over rows
token       one for every token: it fits the noise of each token, and bounds what any mask can do
span        r is a union of what *other* tokens need, ``r_c = 1 − Π_k (1 − w_k [g_kc > 0])``: the adversary chooses the
            weight w_k in [0, 1] of each of K explanations drawn from the sample; Δ, which no explanation holds, stays out
==========  ==================================================================================================

A number means little without its budget: steps, starts, momentum, and on how many tokens the sources had to be bad together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.evaluation.sample import Sample
from tl_vpd.masking import AttackResult, Masks, masks_from_sources, restarted_pgd

Scope = Literal["shared", "position", "token"]
EXPLANATIONS = 32


@dataclass(frozen=True)
class Adversary:
    """An adversary and its budget.

    Args:
        scope: over what one source is shared. steps, step_size: of the ascent (None: ``2 / steps``).
        momentum: of the ascent. starts: random starts, of which the worst counts.
        explanations: how many tokens' important sets it may combine (None: it chooses every mask and Δ freely).

    Raises:
        ValueError: there are no starts, or fewer than one explanation.
    """

    scope: Scope | str = "shared"
    steps: int = 20
    step_size: float | None = None
    momentum: float = 0.0
    starts: int = 1
    explanations: int | None = None

    def __post_init__(self) -> None:
        if self.starts < 1:
            raise ValueError(f"An adversary of {self.starts} starts has nowhere to start: give 1 or more.")
        if self.explanations is not None and self.explanations < 1:
            raise ValueError(f"{self.explanations} explanations span nothing: give 1 or more, or None.")
        if self.scope not in ("shared", "position", "token"):
            raise ValueError(f"The scope is {self.scope!r}: choose shared, position or token.")

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
class Attacked:
    """What an adversary found: the attacks of all starts, the worst first, and the distance of every row under the worst."""

    adversary: Adversary
    results: list[AttackResult]
    by_row: PerRow
    tokens: int

    @property
    def kl(self) -> float:
        """The distance under the worst sources found."""
        return self.results[0].loss

    def record(self, *, seed: int = 0) -> dict[str, Any]:
        """One row of the table: the adversary, its budget, what it found."""
        own = self.adversary
        size = own.step_size if own.step_size is not None else 2.0 / own.steps if own.steps else 0.0
        low, high = self.by_row.interval(seed=seed)
        return {
            "adversary": own.name,
            "steps": own.steps,
            "step_size": size,
            "starts": own.starts,
            "tokens": self.tokens,
            "kl": self.kl,
            "kl_low": low,
            "kl_high": high,
            "kl_weakest_start": self.results[-1].loss,
        }


def union_of(weights: Float[Tensor, "*batch K"], sets: Bool[Tensor, "K C_total"]) -> Float[Tensor, "*batch C_total"]:
    """The weighted union of sets ``1 − Π_k (1 − w_k s_kc)``: with weights of 0 and 1 the union of those that are chosen."""
    return 1 - (1 - weights.unsqueeze(-1) * sets.to(weights.dtype)).prod(dim=-2)


@torch.no_grad()
def explanations(sample: Sample, n: int, *, threshold: float = 0.0) -> Bool[Tensor, "_ C_total"]:
    """The important sets of n real tokens drawn from a sample (of all, if it has fewer)."""
    real = torch.cat(
        [g.flatten(0, -2) if k is None else g[k] for g, k in zip(sample.g, sample.token_mask, strict=True)]
    )
    chosen = torch.randperm(len(real), generator=sample.generator(7), device=real.device)[:n]
    return real[chosen] > threshold


@torch.no_grad()
def attack(sample: Sample, adversary: Adversary, *, span: Bool[Tensor, "K C_total"] | None = None) -> Attacked:
    """Runs an adversary against all rows of a sample together, batch by batch, so that memory does not grow with the rows.

    Args:
        span: important sets to combine (None: drawn from the sample, where the adversary has ``explanations``).

    Raises:
        ValueError: sources by position are asked for on inputs without positions.
    """
    lead = list(sample.g[0].shape[:-1])
    if adversary.scope == "position" and len(lead) < 2:
        raise ValueError("These inputs have no positions: choose the scope shared or token.")
    if adversary.explanations is not None and span is None:
        span = explanations(sample, adversary.explanations)
    rows = sum(len(t) for t in sample.tokens)
    own_rows = adversary.scope == "token"
    shape = [rows if own_rows else 1, *[1 if adversary.scope == "shared" else n for n in lead[1:]]]
    width = sample.site_axis.total + len(sample.site_axis.names) if span is None else len(span)
    like = sample.g[0]

    def start(number: int) -> Tensor:
        generator = sample.generator(500_000 + number)
        return torch.rand(*shape, width, generator=generator, device=like.device).to(like.dtype)

    def masks(i: int, sources: Tensor) -> Masks:
        if span is None:
            return masks_from_sources(sample.g[i], sources, sample.site_axis)
        union = union_of(sources, span)
        no_delta = union.new_zeros(*union.shape[:-1], len(sample.site_axis.names))
        return masks_from_sources(sample.g[i], torch.cat([union, no_delta], dim=-1), sample.site_axis)

    def loss(sources: Tensor) -> Tensor:
        value = torch.zeros(())
        if own_rows and torch.is_grad_enabled():
            sources.grad = torch.zeros_like(sources)
        for i, where in enumerate(batches(sample)):
            part = sources.detach()[where].requires_grad_(torch.is_grad_enabled()) if own_rows else sources
            share = sample.positions[i] / sample.tokens_total
            found = share * sample.loss(i, masks(i, part))
            if found.requires_grad:
                found.backward()
                if own_rows and part.grad is not None:
                    sources.grad[where] = part.grad  # type: ignore[index]
            value += found.detach().to(value.device)
        return value

    results = restarted_pgd(
        loss,
        [start(number) for number in range(adversary.starts)],
        steps=adversary.steps,
        step_size=adversary.step_size,
        momentum=adversary.momentum,
    )
    worst = results[0].sources
    at = batches(sample)
    by_row = sample.distances(lambda i: masks(i, worst[at[i]] if own_rows else worst))
    return Attacked(adversary, results, by_row, sample.tokens_total)


def batches(sample: Sample) -> list[slice]:
    """Which rows each batch of a sample holds."""
    found, first = [], 0
    for t in sample.tokens:
        found.append(slice(first, first + len(t)))
        first += len(t)
    return found


def adversaries(
    sample: Sample,
    kinds: Sequence[Adversary] | None = None,
    *,
    budgets: Sequence[int] = (20,),
    rows: int | None = None,
) -> pd.DataFrame:
    """A row an adversary and budget: steps, starts, tokens attacked together, KL with its interval over rows.

    Args:
        kinds: adversaries (None: ``STANDARD``). budgets: steps, in the place of each one's own.
        rows: attack the first rows alone (None: all); the span is drawn from all.
    """
    own = sample.first(rows)
    found = []
    has_positions = sample.g[0].ndim > 2
    for kind in STANDARD.values() if kinds is None else kinds:
        if kinds is None and kind.scope == "position" and not has_positions:
            continue
        span = None if kind.explanations is None else explanations(sample, kind.explanations)
        for steps in budgets:
            found.append(attack(own, replace(kind, steps=steps), span=span).record(seed=sample.seed))
    return pd.DataFrame(found)
