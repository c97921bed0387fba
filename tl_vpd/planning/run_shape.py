"""The sizes of a run, as the counts of bytes and FLOPs read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tl_vpd.importance import GammaConfig
from tl_vpd.importance import build as build_gamma
from tl_vpd.importance.build import Gamma
from tl_vpd.importance.inputs import inputs_of
from tl_vpd.masking.routing import uniform_k_share
from tl_vpd.planning.target import Target
from tl_vpd.site import Site
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.distributed.sharding import gamma_units
from tl_vpd.training.engine import left_out_logits
from tl_vpd.training.fits import FLOAT, run_numbers
from tl_vpd.training.micro_batch import attacked_among_first
from tl_vpd.training.optimizers import matrices_of


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
    def attacked_rows(self) -> int:
        """Rows with adversarial masks: those with persistent sources, unless the loss has no weight."""
        rows = attacked_among_first(self.rows, self.config.merged or 1.0)
        return rows if self.config.coefficients.adversarial else 0

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

    def gamma_widths(self) -> list[int]:
        """The width of what each of Γ's transformers reads."""
        sites, n = list(self.sites.values()), len(self.sites)
        chunk = self.gamma.chunk if self.gamma.kind == "chunked_transformers" else n
        return [sum(inputs_of(self.gamma.reads, sites[i : i + chunk]).values()) for i in range(0, n, chunk)]

    def muon_matrices(self) -> list[tuple[int, int]]:
        """The sizes of the matrices that Muon updates."""
        if self.config.optimizer.kind != "muon":
            return []
        components = [
            size for name, s in self.sites.items() for size in ((s.d_in, self.C[name]), (self.C[name], s.d_out))
        ]
        return components + [(p.shape[0], p.shape[1]) for p in matrices_of(self._gamma())]

    def gamma_parameters(self) -> list[int]:
        """Numbers in each of Γ's modules that sharding gathers at once."""
        return [sum(p.numel() for p in unit.parameters()) for unit in gamma_units(self._gamma())]

    def _gamma(self) -> Gamma:
        """Γ without numbers."""
        with torch.device("meta"):
            return build_gamma(self.gamma, list(self.sites.values()), self.C)

    def counts(self) -> dict[str, int]:
        """Numbers in V and U (``components``), Γ (``gamma``) and the persistent sources (``sources``)."""
        return run_numbers(self.config, self.sites, self.gamma, rows=self.rows, pos=self.context)
