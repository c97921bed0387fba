"""Nulls: untrained Γ, shuffled weights, and what a report says of a null that looks as good."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import GAMMA, decomposition_of, matrix_of, some_tokens, tiny_model
from tl_vpd import EvaluationConfig, VPDConfig, evaluate
from tl_vpd.evaluation import decompose_shuffled, shuffled_model, untrained
from tl_vpd.evaluation.nulls import check_nulls

TOKENS = some_tokens(shape=(4, 7))
CHEAP = EvaluationConfig(budgets=(), controls=False, measures=())


def test_an_untrained_gamma_of_the_same_shape_on_the_same_pieces():
    model = tiny_model(torch.float32)
    vpd = decomposition_of(model, seed=0)
    null = untrained(vpd, seed=0)
    assert null.components is vpd.components and null.gamma_config == vpd.gamma_config
    mine, its = vpd.gamma.state_dict(), null.gamma.state_dict()
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in its.items()}
    # A Γ that was trained with this seed did not start there: its first layers are untouched in this decomposition.
    assert not torch.equal(mine["blocks.0.q.weight"], its["blocks.0.q.weight"])
    assert torch.equal(untrained(vpd, seed=0).gamma.state_dict()["blocks.0.q.weight"], its["blocks.0.q.weight"])


def test_shuffled_weights_have_the_same_entries_in_another_order():
    model = tiny_model(torch.float32)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    other = shuffled_model(model, sites="*.mlp.*", seed=1)
    for site in ("blocks.0.mlp.W_in", "blocks.1.mlp.W_out"):
        W, moved = matrix_of(model, site), matrix_of(other, site)
        assert not torch.equal(W, moved)
        assert torch.equal(W.flatten().sort().values, moved.flatten().sort().values)
    assert torch.equal(matrix_of(model, "blocks.0.attn.W_Q"), matrix_of(other, "blocks.0.attn.W_Q"))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert not torch.equal(matrix_of(shuffled_model(model), "blocks.0.attn.W_Q"), matrix_of(model, "blocks.0.attn.W_Q"))


def test_a_null_that_looks_as_good_is_said():
    model = tiny_model(torch.float32)
    vpd = decomposition_of(model)
    same = evaluate(vpd, model, TOKENS, CHEAP, nulls={"itself": (model, vpd)})
    table = same.to_pandas("nulls").set_index("decomposition")
    assert list(table.index) == ["this", "itself"]
    record = same.record
    for name in table.index:
        assert table.loc[name, "l0"] == pytest.approx(record["l0"])
        assert table.loc[name, "share_of_zero"] == pytest.approx(record["kl"]["rounded"] / record["kl"]["zero"])
    assert same.checks().loc["nulls", "fault"]
    assert same.checks().loc["nulls", "sentence"].startswith("A null looks as good: under rounded masks")
    # A null that needs far more pieces, or is far further off, is none.
    for change in ({"l0": 2 * record["l0"]}, {"share_of_zero": 3 * record["kl"]["rounded"] / record["kl"]["zero"]}):
        rows = [record["tables"]["nulls"][0], {**record["tables"]["nulls"][1], **change}]
        better = type(same)({**record, "tables": {"nulls": rows}})
        assert not better.checks().loc["nulls", "fault"]


def test_a_decomposition_of_shuffled_weights_as_a_null():
    model = tiny_model(torch.float32)
    config = VPDConfig(steps=2, batch_size=2, C=4, gamma=GAMMA, faithfulness={"warm_up_steps": 0}, sites="*.mlp.*")
    null = decompose_shuffled(model, TOKENS, config, seed=2, progress=False)
    assert torch.equal(
        matrix_of(null[0], "blocks.0.mlp.W_in"),
        matrix_of(shuffled_model(model, sites="*.mlp.*", seed=2), "blocks.0.mlp.W_in"),
    )
    report = evaluate(decomposition_of(model), model, TOKENS, CHEAP, nulls={"shuffled weights": null})
    assert list(report.to_pandas("nulls")["decomposition"]) == ["this", "shuffled weights"]
    with pytest.raises(TypeError, match=r"Null 'x' is a Decomposition: give a pair \(model, decomposition\)"):
        check_nulls({"x": null[1]}, TOKENS)
    with pytest.raises(ValueError, match=r"Null 'x': .*outside the vocabulary"):
        check_nulls({"x": null}, TOKENS + 100)


def test_a_shuffled_model_can_be_trained_on_whatever_the_caller_has_set():
    with torch.inference_mode():
        other = shuffled_model(tiny_model())
    assert not any(parameter.is_inference() for parameter in other.parameters())
