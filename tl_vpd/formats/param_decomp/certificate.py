"""A certificate of an import: the numbers that would be wrong if V, U, Γ or their order were.

On a few rows: the KL from the target's output with all masks 1, with importances as masks, with stochastic masks, and with the
importances of other subcomponents of the same site (*shuffled*, the same at every token). An order of sites other than Γ's raises
no error anywhere. So an import stops where importances are not far better than shuffled ones, or where those of another order of
sites are better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import functional_call

from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.batch import Batch, BatchStore, Rows
from tl_vpd.evaluation.modes import masks_in_row
from tl_vpd.evaluation.sample import Importances, Sample, sampled
from tl_vpd.formats.param_decomp.gamma import order_index
from tl_vpd.formats.param_decomp.names import module_of
from tl_vpd.masking import Masks
from tl_vpd.masking.modes import masks_of_mode

ROWS, LENGTH = 8, 64
NOT_FAR_BELOW = 0.6
"""Share of the shuffled KL above which importances count as little better (a small run: 0.33 to 0.53; in a wrong order 0.64)."""
BETTER = 0.9
"""Share of the KL below which another order counts as better."""
NEGLIGIBLE = 0.02
"""A KL, in nats, that says nothing about the order: nearly everything is important, or nearly nothing matters."""
COUNTED = 0.01
"""Importance above which the authors count a subcomponent in L0."""

TEXT = """The library opened at nine. By noon every table near the windows was taken, and a girl who had come to read about ships
asked whether she might sit on the stairs. "You may," said the librarian, "if you promise to leave room for others to pass." In
physics, the energy of a closed system is constant over time; it is said to be conserved. def mean(values): return sum(values) /
len(values). The committee met on Tuesday, 4 March 2014, to discuss the budget of the harbour, but no decision was reached. She
opened the letter, read it twice and put it back. Water boils at a lower temperature in the mountains, because the pressure of
the air is lower there. for (int i = 0; i < n; i++) { total += x[i]; } He had never been to Paris, and yet he knew the names of
all its bridges. Patients who received the treatment recovered after 12 days on average, compared with 15 days in the control
group."""


@dataclass(frozen=True)
class Certificate:
    """What an import was measured to be; KLs in nats per token.

    Attributes:
        tokens: where the rows come from: ``given``, ``text``, or ``model`` (sampled from the target).
        rows: number of rows.
        length: tokens in a row.
        kl_unmasked: all masks 1, Δ off.
        kl_ci: importances as masks, Δ off.
        kl_stochastic: masks between importances and 1, Δ's drawn too.
        kl_shuffled: importances of other subcomponents of the same site as masks.
        kl_other_orders: importances as masks if Γ read and wrote the sites in another order, by order: ``forward`` and, where it
            differs from the lexicographic one, ``natural`` (``h.2`` before ``h.10``).
        l0: subcomponents of importance above 0.01 per token.
        alive: subcomponents whose mean importance is above 1e-6 on these rows.
        built: all subcomponents.
        own_metrics: the run's, where it has some.
    """

    tokens: str
    rows: int
    length: int
    kl_unmasked: float
    kl_ci: float
    kl_stochastic: float
    kl_shuffled: float
    kl_other_orders: dict[str, float]
    l0: float
    alive: int
    built: int
    own_metrics: dict[str, float]

    @property
    def order_is_doubtful(self) -> bool:
        """Whether importances are not far better than shuffled ones, or worse than those of another order."""
        if self.kl_ci - self.kl_unmasked <= NEGLIGIBLE:
            return False
        return self.kl_ci > NOT_FAR_BELOW * self.kl_shuffled or any(
            kl < BETTER * self.kl_ci for kl in self.kl_other_orders.values()
        )

    def as_record(self) -> dict[str, Any]:
        """The certificate as data."""
        return asdict(self)

    def to_pandas(self) -> pd.DataFrame:
        """One row per number: what was measured here, then the run's own metrics."""
        names = ("kl_unmasked", "kl_ci", "kl_stochastic", "kl_shuffled", "l0", "alive", "built")
        measured = {name: getattr(self, name) for name in names}
        rows = [("measured", name, value) for name, value in measured.items()]
        rows += [("run's own", name, value) for name, value in self.own_metrics.items()]
        return pd.DataFrame(rows, columns=["source", "metric", "value"])


def certify(
    decomposition: Decomposition,
    model: nn.Module,
    tokens: Any | None = None,
    *,
    own_metrics: Mapping[str, float] | None = None,
) -> Certificate:
    """Measures an imported decomposition.

    Args:
        decomposition: of the model.
        model: the target.
        tokens: rows ``[n, pos]`` (None: text where the model has a tokenizer, else rows sampled from the model).
        own_metrics: the run's.

    Raises:
        ValueError: the tokens do not fit the model.
    """
    source = "given" if tokens is not None else "text" if getattr(model, "tokenizer", None) is not None else "model"
    if tokens is None:
        tokens = text_rows(model) if source == "text" else sampled_rows(model)
    with sampled(decomposition, model, tokens, batch_size=ROWS) as sample:
        masks = {row: masks_in_row(sample, row) for row in ("unmasked", "ci", "stochastic")}
        kl = {k: o.distance.mean for k, o in sample.outcomes({**masks, "shuffled": _shuffled(sample)}).items()}
        return Certificate(
            tokens=source,
            rows=len(sample.rows),
            length=sample.rows.tokens.shape[1],
            kl_unmasked=kl["unmasked"],
            kl_ci=kl["ci"],
            kl_stochastic=kl["stochastic"],
            kl_shuffled=kl["shuffled"],
            kl_other_orders={
                name: replace(sample, importances=importances, store=BatchStore(0)).distances(masks["ci"]).mean
                for name, importances in _other_orders(decomposition).items()
            },
            l0=sum(float((batch.g > COUNTED).sum()) for batch in sample.batches()) / sample.n_tokens,
            alive=int(sample.statistics.alive.sum()),
            built=sample.site_axis.total,
            own_metrics=dict(own_metrics or {}),
        )


def text_rows(model: Any) -> Int[Tensor, "row pos"]:
    """Rows of a text of several kinds, without BOS."""
    ids = model.to_tokens(TEXT, prepend_bos=False, truncate=False)[0]
    length = min(LENGTH, model.cfg.n_ctx, len(ids))
    return ids[: len(ids) // length * length].view(-1, length)[:ROWS]


@torch.no_grad()
def sampled_rows(model: Any) -> Int[Tensor, "row pos"]:
    """Rows that the model itself writes, each from another first token; the same in every call."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, model.cfg.d_vocab, (ROWS, 1), generator=generator).to(device)
    for _ in range(min(LENGTH, model.cfg.n_ctx) - 1):
        p = model(rows)[:, -1].float().softmax(-1).cpu()
        rows = torch.cat([rows, torch.multinomial(p, 1, generator=generator).to(device)], dim=1)
    return rows


def _shuffled(sample: Sample) -> Any:
    generator = torch.Generator().manual_seed(0)
    slices = sample.site_axis.slices.values()
    order = torch.cat([s.start + torch.randperm(s.stop - s.start, generator=generator) for s in slices])

    def masks(batch: Batch) -> Masks:
        return masks_of_mode("ci", batch.g[..., order.to(batch.g.device)], sample.site_axis)

    return masks


def _other_orders(decomposition: Decomposition) -> dict[str, Importances]:
    """The importances that Γ would give if its file had the sites in another order than the lexicographic one."""
    modules = [module_of(site) or "" for site in decomposition.sites]
    if decomposition.gamma_config.kind != "shared_transformer" or "" in modules:
        return {}
    orders = {
        "forward": modules,
        "natural": sorted(modules, key=lambda m: [int(p) if p.isdigit() else p for p in m.split(".")]),
    }
    different = {name: order for name, order in orders.items() if order != sorted(modules)}
    return {name: partial(_importances_in_order, decomposition, order) for name, order in different.items()}


def _importances_in_order(
    decomposition: Decomposition, order: Sequence[str], sample: Sample, rows: Rows, inputs: Mapping[str, Tensor]
) -> Tensor:
    modules = [module_of(site) or "" for site in decomposition.sites]
    d_in = {module: site.d_in for module, site in zip(modules, decomposition.sites.values(), strict=True)}
    counts = dict(zip(modules, decomposition.counts.values(), strict=True))
    reads, writes = (
        order_index(widths, modules).argsort()[order_index(widths, modules, order)].to(decomposition.device)
        for widths in (d_in, counts)
    )
    gamma: Any = decomposition.gamma
    changed = {"embed.weight": gamma.embed.weight[:, reads]}
    z = functional_call(gamma, changed, ({name: inputs[name] for name in decomposition.sites}, rows.token_mask))
    g = z[..., writes].clamp(0, 1)  # the same as rows of the last matrix in that order
    return g if rows.token_mask is None else g * rows.token_mask[..., None]
