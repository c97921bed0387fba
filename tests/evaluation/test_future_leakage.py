from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.evaluation import evaluate, foresight


def test_last_prefix_is_the_whole_window_and_others_are_not():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(5, 8))
    table = foresight(vpd, model, tokens, positions=[2, 6])
    with torch.no_grad():
        for position in (2, 6):
            clean = F.cross_entropy(model(tokens)[:, position], tokens[:, position + 1])
            assert table.loc[position, "target_ce"] == pytest.approx(float(clean), rel=1e-5)
            with vpd.attach(model) as attached, attached.masked("rounded"):
                alone = F.cross_entropy(model(tokens[:, : position + 1])[:, -1], tokens[:, position + 1])
                whole = F.cross_entropy(model(tokens)[:, position], tokens[:, position + 1])
            assert table.loc[position, "prefix_ce"] == pytest.approx(float(alone), rel=1e-5)
            assert table.loc[position, "whole_ce"] == pytest.approx(float(whole), rel=1e-5)
    assert (table["whole_kl"] != table["prefix_kl"]).all()


def test_without_an_attending_importance_function_there_is_no_foresight():
    model = tiny_model(torch.float32)
    vpd = decomposition_of(model, gamma={"kind": "per_subcomponent_mlps", "hidden": 4})
    table = foresight(vpd, model, some_tokens(shape=(4, 8)), positions=[1, 5])
    assert list(table["whole_kl"]) == pytest.approx(list(table["prefix_kl"]), rel=1e-4, abs=1e-7)


def test_a_position_without_a_next_token_is_refused():
    model = tiny_model(torch.float32)
    with pytest.raises(IndexError, match=r"\[7\] have no next token"):
        foresight(decomposition_of(model), model, some_tokens(shape=(2, 8)), positions=[3, 7])


def test_what_is_attached_already_is_used_or_said():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(4, 8))
    expected = foresight(vpd, model, tokens, positions=[2])
    quick = dict(measures=("foresight",), budgets=(), controls=False)
    with vpd.attach(model) as attached, attached.masked("zero"):
        assert foresight(vpd, model, tokens, positions=[2]).equals(expected)
        assert "foresight" in evaluate(vpd, model, tokens, **quick).record["tables"]
    with vpd.attach(model, sites="*.mlp.*"):
        with pytest.raises(
            ValueError, match="The decomposition is attached to this model at some sites alone: detach it first"
        ):
            foresight(vpd, model, tokens, positions=[2])
        assert "at some sites alone" in evaluate(vpd, model, tokens, **quick).record["left_out"]["foresight"]


def test_figures_are_taken_in_float32():
    model = tiny_model(torch.bfloat16)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(4, 8))
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens)[:, 2].float(), tokens[:, 3])
    assert foresight(vpd, model, tokens, positions=[2]).loc[2, "target_ce"] == pytest.approx(float(expected), rel=1e-6)
