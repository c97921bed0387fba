"""The sizes of a run, as the counts of bytes and FLOPs read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tl_vpd.importance import GammaConfig
from tl_vpd.importance import build as build_gamma
from tl_vpd.masking.routing import uniform_k_share
from tl_vpd.planning.target import Target
from tl_vpd.site import Site
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.distributed.sharding import gamma_units
from tl_vpd.training.engine import left_out_logits
from tl_vpd.training.micro_batch import attacked_among_first

FLOAT = 4
"""Bytes of a number in V, U, Γ, moments, importances and sources."""


@dataclass(frozen=True)
class RunShape:
    """One process's part of a run.

    ``sites``, ``C``: of the decomposed sites. ``rows``: of the batch, of which ``rows_at_once`` go through the model together.
    """

    target: Target
    sites: Mapping[str, Site]
    C: Mapping[str, int]
    gamma: GammaConfig
    config: VPDConfig
    rows: int
    context: int
    rows_at_once: int

    @property
    def C_total(self) -> int:
        """Subcomponents of all sites."""
        return sum(self.C.values())

    @property
    def width(self) -> int:
        """Entries of a token's source: one per subcomponent and one per Δ."""
        return self.C_total + len(self.C)

    @property
    def adversarial_rows(self) -> int:
        """Rows with persistent sources."""
        return attacked_among_first(self.rows, self.config.merged or 1.0)

    @property
    def attacked_rows(self) -> int:
        """Rows with adversarial masks: those with sources, unless the loss has no weight."""
        return self.adversarial_rows if self.config.coefficients.adversarial else 0

    @property
    def tokens_at_once(self) -> int:
        """Tokens that go through the model together."""
        return self.rows_at_once * self.context

    @property
    def micro_batches(self) -> bool:
        """Whether the rows go through the model in several micro-batches."""
        return self.rows_at_once < self.rows

    @property
    def blocked_logits(self) -> bool:
        """Whether logits are made in blocks: where there are many of them (``tl_vpd.training.engine.left_out_logits``)."""
        size = self.tokens_at_once * self.target.vocabulary * FLOAT
        return self.config.output == "kl" and size > left_out_logits.LARGE

    @property
    def routed_share(self) -> float:
        """The expected fraction of sites that uniform-k routing masks at a token."""
        return uniform_k_share(len(self.sites))

    def gamma_parameters(self) -> list[int]:
        """Numbers in each of Γ's modules that sharding gathers at once."""
        with torch.device("meta"):
            gamma = build_gamma(self.gamma, {name: s.d_in for name, s in self.sites.items()}, self.C)
        return [sum(p.numel() for p in unit.parameters()) for unit in gamma_units(gamma)]

    def counts(self) -> dict[str, int]:
        """Numbers in V and U (``components``), Γ (``gamma``) and the persistent sources (``sources``)."""
        slots = self.config.adversary.pool or self.context
        return {
            "components": sum((s.d_in + s.d_out) * self.C[name] for name, s in self.sites.items()),
            "gamma": sum(self.gamma_parameters()),
            "sources": self.adversarial_rows * slots * self.width,
        }
