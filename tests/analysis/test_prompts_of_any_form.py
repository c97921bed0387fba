"""Analyses read prompts of any form: integers of any type, lists, one prompt, one token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from tl_vpd import Decomposition, analysis, evaluation
from tl_vpd.adapters.versions import HookedTransformer
from tl_vpd.analysis import attention

Q, K = "blocks.1.attn.W_Q", "blocks.1.attn.W_K"
SHORT = evaluation.EvaluationConfig(budgets=(1,), batch_size=2)


def metric(logits: Tensor) -> Tensor:
    """A difference of logits."""
    return logits[:, -1, 3].mean() - logits[:, -1, 4].mean()


CALLS: dict[str, Callable[[Decomposition, Any, Any], pd.DataFrame]] = {
    "harvest": lambda v, m, t: analysis.harvest(v, m, t).to_pandas(),
    "dataset_graph": lambda v, m, t: analysis.dataset_graph(v, m, t, [f"{Q}:1", f"{K}:2"]).to_pandas(),
    "ablation_table": lambda v, m, t: analysis.ablation_table(v, m, t, metric, [f"{Q}:1"]),
    "audit_circuit": lambda v, m, t: analysis.audit_circuit(
        v, m, t, [f"{Q}:1"], metric, config=analysis.AuditConfig(ablations=("zero", "mean"), controls=0)
    ).to_pandas(),
    "score_terms": lambda v, m, t: attention.score_terms(v, m, t, 1, [(f"{Q}:1", f"{K}:2")]).to_pandas(),
    "mean_strengths": lambda v, m, t: attention.mean_strengths(v, m, t, 1).to_pandas(offset=0),
    "static_strengths": lambda v, m, t: attention.static_strengths(v, m, t, 1, length=4).to_pandas(),
    "attention_by_offset": lambda v, m, t: attention.attention_by_offset(v, m, t, 1, ablate=f"{Q}:1").to_pandas(),
    "value_given_key": lambda v, m, t: attention.value_given_key(v, m, t, 1).to_pandas(),
    "off_distribution": lambda v, m, t: evaluation.off_distribution(v, m, {"these": t}, SHORT),
    "scrambled": lambda v, m, t: pd.DataFrame(evaluation.scrambled(m, t).numpy()),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Callable[[Decomposition, Any, Any], pd.DataFrame]:
    """One of the analyses."""
    return CALLS[request.param]


def test_any_integers_and_layout_give_the_same(
    vpd: Decomposition, model: HookedTransformer, tokens: Tensor, call: Callable[..., pd.DataFrame]
):
    expected = call(vpd, model, tokens)
    for same in (tokens.int(), tokens.to(torch.uint8), tokens.T.contiguous().T, tokens.tolist(), tokens.numpy()):
        pd.testing.assert_frame_equal(call(vpd, model, same), expected, check_exact=True)


def test_one_prompt_and_one_token(
    vpd: Decomposition, model: HookedTransformer, tokens: Tensor, call: Callable[..., pd.DataFrame]
):
    pd.testing.assert_frame_equal(call(vpd, model, tokens[0]), call(vpd, model, tokens[:1]), check_exact=True)
    assert call(vpd, model, tokens[:1, :1]) is not None
