"""Every function that takes a decomposition and a model refuses a model of other weights."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_model
from tl_vpd.analysis import (
    ablate_nodes,
    ablation_table,
    attribution_graph,
    audit_circuit,
    dataset_graph,
    harvest,
    prune,
    repair_circuit,
)
from tl_vpd.analysis.attention import (
    attention_by_offset,
    head_alignment,
    mean_strengths,
    ov_overlap,
    score_terms,
    static_strengths,
    strongest_static,
    value_given_key,
)
from tl_vpd.analysis.pruning import PruneConfig

Q, HEAD = "blocks.1.attn.W_Q:0", "blocks.0.attn.hook_z:0"


def metric(logits):
    return logits[0, 0, 0]


CALLS = {
    "static_strengths": lambda vpd, m, t: static_strengths(vpd, m, t, 1),
    "strongest_static": lambda vpd, m, t: strongest_static(vpd, m, t, 1),
    "mean_strengths": lambda vpd, m, t: mean_strengths(vpd, m, t, 1),
    "score_terms": lambda vpd, m, t: score_terms(vpd, m, t, 1),
    "attention_by_offset": lambda vpd, m, t: attention_by_offset(vpd, m, t, 1),
    "ov_overlap": lambda vpd, m, t: ov_overlap(vpd, m, t, 1),
    "value_given_key": lambda vpd, m, t: value_given_key(vpd, m, t, 1),
    "head_alignment": lambda vpd, m, t: head_alignment(vpd, m, 1),
    "ablation_table": lambda vpd, m, t: ablation_table(vpd, m, t, metric, [Q]),
    "attribution_graph": lambda vpd, m, t: attribution_graph(vpd, m, t[:1], 1),
    "dataset_graph": lambda vpd, m, t: dataset_graph(vpd, m, t),
    "harvest": lambda vpd, m, t: harvest(vpd, m, t),
    "prune": lambda vpd, m, t: prune(vpd, m, t[:1], 1),
    "audit_circuit": lambda vpd, m, t: audit_circuit(vpd, m, t, [Q], metric),
    "audit_circuit of heads": lambda vpd, m, t: audit_circuit(vpd, m, t, [HEAD], metric),
    "repair_circuit": lambda vpd, m, t: repair_circuit(vpd, m, t, [Q], metric),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_model_of_other_weights_is_refused(vpd, tokens, name):
    with pytest.raises(ValueError, match="weights are not the decomposed ones"):
        CALLS[name](vpd, tiny_model(seed=1), tokens)


def test_nodes_are_not_ablated_in_a_model_of_other_weights(model, vpd, tokens):
    circuit = prune(vpd, model, tokens[:1], 1, config=PruneConfig(steps=1, adversary_steps=0))
    with pytest.raises(ValueError, match="weights are not the decomposed ones"):
        ablate_nodes(vpd, tiny_model(seed=1), circuit, {}, 1)
