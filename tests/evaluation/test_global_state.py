"""Public functions that draw or differentiate leave PyTorch's global generator and gradient mode alone, and give the same results
where gradients are switched off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import tl_vpd
from tl_vpd import Decomposition, analysis, evaluation, toys, viz
from tl_vpd.adapters.versions import HookedTransformer
from tl_vpd.analysis import attention

Q, K = "blocks.1.attn.W_Q", "blocks.1.attn.W_K"
SHORT = evaluation.EvaluationConfig(budgets=(1,), adversary_budgets=(1,), control_budgets=(1,))


def metric(logits: Tensor) -> Tensor:
    """A difference of logits."""
    return logits[:, -1, 3].mean() - logits[:, -1, 4].mean()


def audited(vpd: Decomposition, model: Any, tokens: Tensor) -> pd.DataFrame:
    """An audit with every ablation."""
    config = analysis.AuditConfig(budgets=(1,), draws=1, controls=1)
    return analysis.audit_circuit(vpd, model, tokens, [f"{Q}:1"], metric, config=config).to_pandas()


def repaired(vpd: Decomposition, model: Any, tokens: Tensor) -> pd.DataFrame:
    """A repair of one round."""
    config = analysis.RepairConfig(steps=1, max_added=1, candidates=1)
    return analysis.repair_circuit(vpd, model, tokens, [f"{Q}:1"], metric, config=config).rows


def pruned(vpd: Decomposition, model: Any, tokens: Tensor) -> pd.DataFrame:
    """A circuit of two steps."""
    return analysis.prune(vpd, model, tokens[:1], 3, config=analysis.PruneConfig(steps=2)).to_pandas()


def evaluated(vpd: Decomposition, model: Any, tokens: Tensor) -> pd.DataFrame:
    """An evaluation with all controls and tables."""
    report = tl_vpd.evaluate(vpd, model, tokens, SHORT, others={"same": vpd})
    tables = [report.to_pandas(name) for name in sorted(report.record["tables"])]
    return pd.concat([report.table().reset_index(), report.checks().reset_index(), *tables])


CALLS: dict[str, Callable[[Decomposition, Any, Tensor], pd.DataFrame]] = {
    "evaluate": evaluated,
    "audit_circuit": audited,
    "repair_circuit": repaired,
    "prune": pruned,
    "attribution_graph": lambda v, m, t: analysis.attribution_graph(v, m, t[:1], 3).to_pandas(),
    "dataset_graph": lambda v, m, t: analysis.dataset_graph(v, m, t).to_pandas(),
    "harvest": lambda v, m, t: analysis.harvest(v, m, t).to_pandas(),
    "ablation_table": lambda v, m, t: analysis.ablation_table(v, m, t, metric),
    "score_terms": lambda v, m, t: attention.score_terms(v, m, t, 1, [(f"{Q}:1", f"{K}:2")]).to_pandas(),
    "mean_strengths": lambda v, m, t: attention.mean_strengths(v, m, t, 1).to_pandas(offset=1),
    "static_strengths": lambda v, m, t: attention.static_strengths(v, m, t, 1).to_pandas(),
    "strongest_static": lambda v, m, t: attention.strongest_static(v, m, t, 1),
    "ov_overlap": lambda v, m, t: attention.ov_overlap(v, m, t, 1).to_pandas(),
    "attention_by_offset": lambda v, m, t: attention.attention_by_offset(
        v, m, t, 1, ablate=[f"{Q}:1", (f"{Q}:2", f"{K}:3")]
    ).to_pandas(),
    "value_given_key": lambda v, m, t: attention.value_given_key(v, m, t, 1).to_pandas(),
    "consistency": lambda v, m, t: evaluation.consistency(v, v),
    "off_distribution": lambda v, m, t: evaluation.off_distribution(v, m, {"these": t}, SHORT),
    "scrambled": lambda v, m, t: pd.DataFrame(evaluation.scrambled(m, t).numpy()),
    "viz.importances": lambda v, m, t: pd.DataFrame({"html": [viz.importances(v, m, t[:1]).body]}),
    "TMS": lambda v, m, t: pd.DataFrame(toys.TMS(5, 2, identity=True).build().embed.weight.detach().numpy()),
    "Compressed": lambda v, m, t: pd.DataFrame(toys.Compressed(5, 7, 3).build().W_E.numpy()),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_generator_and_the_gradient_mode_are_left_alone(
    vpd: Decomposition, model: HookedTransformer, tokens: Tensor, name: str
):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with_gradients = CALLS[name](vpd, model, tokens)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        without = CALLS[name](vpd, model, tokens)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert len(with_gradients) and torch.equal(torch.random.get_rng_state(), before)
    pd.testing.assert_frame_equal(without, with_gradients, check_exact=True)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
