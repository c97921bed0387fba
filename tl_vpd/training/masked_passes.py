"""The masked passes of a step: which there are, what their masks are made from, and which losses they give.

============  ==========================  =================================  ======================================
pass          rows                        sources                            loss
============  ==========================  =================================  ======================================
layerwise     all, one site at a time     drawn for every token              mean over sites       (SPD paper, section 2)
stochastic    all                         drawn for every token              stochastic            (VPD paper, section 3)
adversarial   all                         the adversary's                    adversarial           (VPD paper, section 3)
merged        attacked, then the others   the adversary's, then drawn        adversarial and stochastic, in place of both
============  ==========================  =================================  ======================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.forward.mask_inputs import MaskInputs
from tl_vpd.masking.routing import joined
from tl_vpd.training.adversary import Adversary
from tl_vpd.training.config_sections import Coefficients
from tl_vpd.training.engine import CleanForward, EagerEngine, LossTerm
from tl_vpd.training.step_samples import StepSampler, StepSamples, routed_share

Losses = dict[str, Float[Tensor, ""]]


class TokenCounts(NamedTuple):
    """Real tokens of the whole batch: of all rows, of the attacked rows, of those with stochastic masks.

    ``known``: those of all rows as a number (None: only the device knows it).
    """

    all: Float[Tensor, ""]
    attacked: Float[Tensor, ""]
    stochastic: Float[Tensor, ""]
    known: int | None = None


class PassResult(NamedTuple):
    """A pass's losses by name (summed, with the whole batch's denominators), and the gradient of the adversary's sources."""

    losses: Losses
    grad_sources: Tensor | None = None


class MaskedPasses:
    """Runs a micro-batch's masked passes.

    Args:
        coefficients: of the losses at this step; those that are 0 have no pass.
        engine: runs them.
        adversary: whose sources are used.
        sampler: of the other sources.
        merged: whether rows are of one kind each, and run in one pass.
    """

    losses: tuple[str, ...] = ("stochastic", "adversarial", "layerwise")
    """The names of what the passes give."""

    def __init__(
        self,
        coefficients: Coefficients,
        engine: EagerEngine,
        adversary: Adversary,
        sampler: StepSampler,
        *,
        merged: bool = False,
    ) -> None:
        self.coefficients, self.merged = coefficients, merged
        self.engine, self.adversary, self.sampler = engine, adversary, sampler

    def run(
        self, clean: CleanForward, step: int, samples: StepSamples, counts: TokenCounts, grad_g: Tensor
    ) -> Iterator[PassResult]:
        """The results pass by pass; gradients go to V, U and ``grad_g``.

        Args:
            clean: the micro-batch.
            step: the number of the step, of which sources are drawn.
            samples: the step's other random choices.
            counts: of the whole batch.
            grad_g: where the gradient of the importances is added.
        """
        c = self.coefficients
        if c.layerwise:
            yield from self._layerwise(clean, step, counts, grad_g)
        if self.merged:
            yield self._merged(clean, step, samples, counts, grad_g)
            return
        if c.stochastic:
            inputs = self._stochastic_inputs(clean, step, samples)
            term = LossTerm(counts.stochastic, c.stochastic)
            (loss,) = self.engine.reconstruct(clean, inputs, [term], grad_g=grad_g)
            yield PassResult({"stochastic": loss})
        if c.adversarial:
            inputs = self.adversary.inputs(clean.micro_batch, samples)
            gradient = torch.zeros_like(inputs.sources)
            term = LossTerm(counts.attacked, c.adversarial)
            (loss,) = self.engine.reconstruct(clean, inputs, [term], grad_g=grad_g, grad_sources=gradient)
            yield PassResult({"adversarial": loss}, gradient)

    def _layerwise(self, clean: CleanForward, step: int, counts: TokenCounts, grad_g: Tensor) -> Iterator[PassResult]:
        """One pass for each site, with masks on that site alone."""
        sampler, sites = self.sampler, self.sampler.site_axis.names
        rows = [sampler.split.rows[i] for i in clean.micro_batch.numbers]
        sources = sampler.sources("layerwise", step, rows).flatten(0, 1)
        term = LossTerm(len(sites) * counts.all, self.coefficients.layerwise)
        for name in sites:
            (loss,) = self.engine.reconstruct(clean, MaskInputs(sources, sites=(name,)), [term], grad_g=grad_g)
            yield PassResult({"layerwise": loss})

    def _merged(
        self, clean: CleanForward, step: int, samples: StepSamples, counts: TokenCounts, grad_g: Tensor
    ) -> PassResult:
        """One pass: the attacked rows, followed by the rows with stochastic masks; a micro-batch may have one kind alone."""
        attacked = self.adversary.inputs(clean.micro_batch, samples)
        stochastic = self._stochastic_inputs(clean, step, samples)
        n, m = clean.attacked.stop, len(clean.tokens) - clean.attacked.stop
        source_rows = attacked.source_rows
        if source_rows is not None:
            own_rows = torch.arange(len(stochastic.sources), device=source_rows.device)
            source_rows = torch.cat([source_rows, len(attacked.sources) + own_rows])
        inputs = MaskInputs(
            torch.cat([attacked.sources, stochastic.sources]),
            source_rows,
            joined(attacked.routing, stochastic.routing, n, m),
            attacked=n,
            routed_share=(n * attacked.routed_share + m * stochastic.routed_share) / (n + m),
        )
        c = self.coefficients
        terms = {
            "adversarial": LossTerm(counts.attacked, c.adversarial, clean.attacked),
            "stochastic": LossTerm(counts.stochastic, c.stochastic, slice(n, None)),
        }
        terms = {name: terms[name] for name, rows in (("adversarial", n), ("stochastic", m)) if rows}
        gradient = torch.zeros_like(attacked.sources) if n and c.adversarial else None
        losses = self.engine.reconstruct(clean, inputs, list(terms.values()), grad_g=grad_g, grad_sources=gradient)
        return PassResult(dict(zip(terms, losses, strict=True)), gradient)

    def _stochastic_inputs(self, clean: CleanForward, step: int, samples: StepSamples) -> MaskInputs:
        rows = clean.micro_batch.stochastic
        sources = self.sampler.sources("stochastic", step, self.sampler.split.stochastic[rows])
        routing = samples.stochastic_routing and samples.stochastic_routing.rows(rows)
        return MaskInputs(sources.flatten(0, 1), routing=routing, routed_share=routed_share(routing))
