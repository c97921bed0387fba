"""Edge attribution patching: how much the metric would change if an edge alone carried another value, to first order.

    score(w → R) = Σ (ablated_w − value_w) · ∂metric/∂input_R                                   EAP (Syed et al. 2023, eq. 2)
    score(w → R) = Σ (ablated_w − value_w) · (1/n) Σ_k ∂metric/∂input_R |_k                     EAP-IG (Hanna et al. 2024, eq. 3)

summed over prompts and positions. The k-th gradient of EAP-IG is taken on a run that starts from the embeddings
``e' + (k/n)(e − e')`` between the ablated ones, e', and the prompts', e; n = 1 is EAP. A score is of the first order: it says
nothing about edges that replace each other. ``audit_circuit`` says what a circuit of the largest scores is worth.

    >>> scores = edge_attribution(model, tokens, metric, reference_prompts=corrupted)                 # doctest: +SKIP
    >>> audit_circuit(None, model, tokens, scores.circuit(20), metric)                                # doctest: +SKIP

A score is −∂metric/∂m of the edge's factor m at 1 (``edge_ablation``), so one backward pass gives all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.analysis.audit.ablate import reference_tokens
from tl_vpd.analysis.audit.config import REFERENCES, Reference
from tl_vpd.analysis.audit.edge_ablation import EdgeAblatedModel
from tl_vpd.analysis.audit.edge_set import edge_set_of
from tl_vpd.analysis.edges import Edge
from tl_vpd.analysis.metric import Metric, check_metric, differentiable, finite_number_of
from tl_vpd.checks import check_fields, choice, config_of, integer
from tl_vpd.printing import Printed


@dataclass(frozen=True)
class EdgeAttributionConfig:
    """How edges are scored.

    Attributes:
        ig_steps: n of EAP-IG; 1 is EAP.
        reference: the value that a source is ablated to: ``corrupted`` (the reference prompt of the same row), ``resample``,
            ``mean`` or ``zero``.
        seed: of the prompts that ``resample`` draws.

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of range or unknown.
    """

    ig_steps: int = 1
    reference: Reference = "corrupted"
    seed: int = 0

    def __post_init__(self) -> None:
        choice("reference", self.reference, REFERENCES)
        check_fields(self, ig_steps=1)


@dataclass(frozen=True)
class EdgeScores(Printed):
    """Every edge's score.

    Attributes:
        edges: all edges of the model.
        scores: by how much the metric would change if the edge carried the ablated value, to first order.
        whole: the metric of the model itself.
        ablated: the metric with every edge ablated.
    """

    edges: tuple[Edge, ...]
    scores: Float[Tensor, " edge"]
    whole: float
    ablated: float

    def to_pandas(self) -> pd.DataFrame:
        """One row per edge: ``edge, source, target, reads, score``."""
        rows = [(str(edge), edge.source, edge.target, edge.reads or "") for edge in self.edges]
        return pd.DataFrame(rows, columns=["edge", "source", "target", "reads"]).assign(score=self.scores.tolist())

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` rows of the largest scores in absolute value."""
        table = self.to_pandas()
        order = table["score"].abs().sort_values(ascending=False, kind="stable").index[: integer("k", k, minimum=0)]
        return table.loc[order].reset_index(drop=True)

    def circuit(self, k: int) -> tuple[Edge, ...]:
        """The ``k`` edges of the largest scores in absolute value, without those that lie on no path from input to logits.

        Args:
            k: how many are chosen before dead ends are left out.

        Raises:
            TypeError: k is not an integer.
            ValueError: k is below 1, or no path from the input to the logits is among these edges.
        """
        order = self.scores.abs().argsort(descending=True, stable=True)[: integer("k", k, minimum=1)].tolist()
        kept = connected([self.edges[i] for i in sorted(order)])
        if not kept:
            raise ValueError(f"k={k}: these edges contain no path from the input to the logits; give a larger k.")
        return kept


def connected(edges: Sequence[Edge]) -> tuple[Edge, ...]:
    """The edges that lie on a path from the input to the logits within these edges."""
    kept = tuple(edges)
    while True:
        read, written = {edge.source for edge in kept}, {edge.target for edge in kept}
        fewer = tuple(e for e in kept if e.source in {"input", *written} and e.target in {"logits", *read})
        if len(fewer) == len(kept):
            return kept
        kept = fewer


def edge_attribution(
    model: nn.Module,
    prompts: Any,
    metric: Metric,
    *,
    reference_prompts: Any = None,
    config: EdgeAttributionConfig | None = None,
    attention_mask: Tensor | None = None,
) -> EdgeScores:
    """Scores every edge by EAP or EAP-IG, all prompts in one batch.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: a string, strings, or tokens ``[batch, pos]``.
        metric: takes the logits ``[batch, pos, vocab]``, gives one number, differentiable.
        reference_prompts: whose values edges are ablated to; for ``corrupted`` one per prompt, of the same length.
        config: EAP or EAP-IG, and the ablated values (None: EAP with ``corrupted``).
        attention_mask: 0 at padding of the prompts (None: where TransformerLens sees padding).

    Raises:
        ValueError: prompts and reference prompts do not fit, the model has no hooks for edges, or the metric gives no single
            number or none that can be differentiated.
        RuntimeError: a hook does not run in this model.
        TypeError: an argument is of another type, or the metric gives no number.
        FloatingPointError: the metric is NaN or infinite.
    """
    check_metric(metric)
    config = config_of(EdgeAttributionConfig, config)
    with torch.inference_mode(False):
        adapter = adapt(model)
        edge_set, tokens = edge_set_of(adapter), adapter.tokens(prompts)
        token_mask = adapter.padding(tokens, attention_mask)
        reference, reference_mask = reference_tokens(adapter, reference_prompts, tokens, token_mask)
        with EdgeAblatedModel(model, edge_set, tokens, token_mask) as edge_model:
            generator = torch.Generator().manual_seed(config.seed)
            ablated = edge_model.references(config.reference, reference, reference_mask, generator)
            with torch.no_grad():
                value = edge_model.values(tokens, token_mask)
                limits = [
                    finite_number_of(metric(logits), where)
                    for logits, where in (
                        (edge_model.clean(), "on the model itself"),
                        (edge_model.run(torch.zeros(1, 1, edge_set.total), ablated), "with every edge ablated"),
                    )
                ]
            scores = _scores(edge_model, metric, value, ablated, config.ig_steps)
    return EdgeScores(edge_set.edges, scores, *limits)


def _scores(
    edge_model: EdgeAblatedModel, metric: Metric, value: dict[str, Tensor], ablated: dict[str, Tensor], steps: int
) -> Float[Tensor, " edge"]:
    """``−∂metric/∂m`` at m = 1, the mean over the path of embeddings; the sources' differences are those of the prompts."""
    first = edge_model.node_set.hook_sites[0].hook
    fixed = {hook: ablated[hook].to(value[hook]) - value[hook] for hook in value}
    total = torch.zeros(edge_model.node_set.total, dtype=torch.float64)
    for k in range(1, steps + 1):
        m = torch.ones(1, 1, len(total), dtype=value[first].dtype, device=value[first].device, requires_grad=True)
        with torch.enable_grad():
            start = value[first] + (1 - k / steps) * fixed[first]
            result = differentiable(metric(edge_model.run(m, ablated, start=start, fixed=fixed)))
            finite_number_of(result, "between the prompts and the ablated values")
            (gradient,) = torch.autograd.grad(result.squeeze(), m)
        total -= gradient.flatten().double().cpu() / steps
    return total.float()
