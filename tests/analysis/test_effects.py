"""Sweeps of single ablations: every number is that of a run with this subcomponent alone ablated."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import draw, edited, some_tokens
from tl_vpd.analysis import AblationTableConfig, ablation_table
from tl_vpd.site import Subcomponent

SOME = ["blocks.0.attn.W_Q:1", "blocks.1.mlp.W_out:5", "blocks.1.mlp.W_out:0", "blocks.0.attn.W_O:3"]


def metric(logits):
    return (logits[:, -1, 3].sum() - logits[0, 2].square().mean()).detach()


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_each_row_is_the_model_with_the_weight_edited(model, vpd, tokens, rows):
    table = ablation_table(vpd, model, tokens, metric, SOME, config=AblationTableConfig(rows=rows))
    clean = float(metric(model(tokens)))
    assert table.subcomponent.tolist() == SOME and list(table["index"]) == [1, 5, 0, 3]
    for row in table.itertuples():
        mask = torch.ones(6, dtype=torch.float64)
        mask[row.index] = 0
        expected = float(metric(edited(model, vpd, {row.site: (mask, 1.0)})(tokens)))
        assert row.metric == pytest.approx(expected, rel=1e-9)
        assert row.change == pytest.approx(expected - clean, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("pos", [None, 3, [0, -1], slice(2, 5)])
@pytest.mark.parametrize("values", ["none", "means", "by position", "other prompts"])
def test_positions_amounts_and_values_are_those_of_single_hooks(model, vpd, tokens, pos, values):
    other = vpd.component_acts(model, some_tokens(seed=9))
    given = {"none": None, "means": other.mean(), "by position": other.mean(by_position=True), "other prompts": other}[
        values
    ]
    table = ablation_table(
        vpd, model, tokens, metric, SOME, config=AblationTableConfig(pos=pos, amount=0.7, values=given)
    )
    with torch.no_grad(), vpd.attach(model):
        for row in table.itertuples():
            hooks = vpd.ablation_hooks(row.subcomponent, pos=pos, amount=0.7, values=given)
            assert row.metric == pytest.approx(float(metric(model.run_with_hooks(tokens, fwd_hooks=hooks))), rel=1e-9)


def test_without_a_choice_those_that_are_important_are_ablated(model, vpd, tokens):
    table = ablation_table(vpd, model, tokens, metric, config=AblationTableConfig(threshold=0.6))
    g = vpd.causal_importances(model, tokens).concatenated
    expected = [str(vpd.site_axis.at(i)) for i in (g > 0.6).any(0).any(0).nonzero().flatten().tolist()]
    assert table.subcomponent.tolist() == expected and 0 < len(expected) < vpd.site_axis.total


def test_it_composes_with_modes_and_leaves_an_attached_model_as_it_was(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.masked("unmasked", delta=0.5):
            table = ablation_table(vpd, model, tokens, metric, SOME[:2])
            hooks = vpd.ablation_hooks(SOME[0])
            assert table.metric[0] == pytest.approx(float(metric(model.run_with_hooks(tokens, fwd_hooks=hooks))))
        half = vpd.mask_hooks(vpd.causal_importances(model, tokens).masks("ci"))
        assert_close(model.run_with_hooks(tokens, fwd_hooks=half), model.run_with_hooks(tokens, fwd_hooks=half))
    assert "hook_q_mask" not in model.blocks[0]._modules


def test_padding_is_told_to_the_model(model, vpd):
    token_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    tokens = some_tokens(shape=(2, 5))
    table = ablation_table(vpd, model, tokens, metric, [Subcomponent.parse(SOME[1])], attention_mask=token_mask)
    with torch.no_grad(), vpd.attach(model):
        hooks = vpd.ablation_hooks(SOME[1])
        expected = float(metric(model.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=token_mask)))
    assert table.metric[0] == pytest.approx(expected)


def test_mistakes_are_said(model, vpd, tokens):
    with pytest.raises(KeyError, match=r"did you mean 'blocks\.0\.attn\.W_Q'"):
        ablation_table(vpd, model, tokens, metric, ["blocks.0.attn.W_q:1"])
    with pytest.raises(IndexError, match="has 6 subcomponents"):
        ablation_table(vpd, model, tokens, metric, ["blocks.0.attn.W_Q:6"])
    with pytest.raises(ValueError, match=r"a tensor of shape \(2,\); one number"):
        ablation_table(vpd, model, tokens, lambda logits: logits[:, 0, 0], SOME)
    with pytest.raises(ValueError, match=r"threshold=0\.5 does nothing"):
        ablation_table(vpd, model, tokens, metric, SOME, config=AblationTableConfig(threshold=0.5))
    with pytest.raises(IndexError, match="outside the 7 positions"):
        ablation_table(vpd, model, tokens, metric, SOME, config=AblationTableConfig(pos=9))
    with pytest.raises(KeyError, match=r"values has nothing for blocks\.0\.attn\.W_Q"):
        ablation_table(
            vpd, model, tokens, metric, SOME, config=AblationTableConfig(values={"blocks.0.attn.W_q": draw(6)})
        )
