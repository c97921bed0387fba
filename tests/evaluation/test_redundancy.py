"""Hidden twins are found where a model does everything twice, and only there; figures against hooks and edited weights."""

from __future__ import annotations

import math

import pytest
import torch

from tests.evaluation import handmade
from tests.evaluation.handmade import IN, OUT
from tests.tiny import decomposition_of, edited, some_tokens, tiny_model
from tl_vpd.evaluation import redundancy
from tl_vpd.losses import kl_divergence
from tl_vpd.masking import constant_masks
from tl_vpd.toys import train
from tl_vpd.toys.copying import Copying, first_layer_alone

TOKENS = torch.tensor([[0, 1, 2, 2], [5, 5, 5, 1], [3, 2, 1, 0]])


def probability(logit: float) -> float:
    """Of the next token with this logit, where the token itself has 4 and 22 others have 0."""
    return math.exp(logit) / (math.exp(logit) + math.exp(4) + 22)


@pytest.mark.parametrize("twin", [True, False])
def test_twins_are_found_where_there_are_any(twin: bool):
    model = handmade.twinned_model(twin=twin)
    result = redundancy(handmade.first_half(model), model, TOKENS, rows=2)
    important = [0, 1, 2, 3, 5]
    assert list(result.subcomponents) == [f"{site}:{k}" for site in (IN, OUT) for k in important]
    # By hand. The model puts 24 (12 without a twin) nats on the next token, its important half 12; ablated, none are left.
    p, one, none = (probability(logit) for logit in (24 if twin else 12, 12, 0))
    rest = math.exp(4) / (math.exp(24 if twin else 12) + math.exp(4) + 22)  # all that is not on the next token, nearly

    def kl(logit: float) -> float:
        q = probability(logit)
        others = (1 - p) * math.log((1 - p) / (1 - q)) if rest > 1e-12 else 0.0
        return p * math.log(p / q) + others

    assert result.alone.tolist() == pytest.approx([kl(0) - kl(12)] * 10, rel=1e-3)
    assert result.full.tolist() == pytest.approx([kl(12) if twin else kl(0)] * 10, rel=1e-3, abs=1e-6)
    assert kl(0) > 0.2 and none < one
    assert sorted(result.twins) == (sorted(result.subcomponents) if twin else [])
    table = result.to_pandas()
    assert table.loc[f"{IN}:2", "rows"] == 2 and table.loc[f"{IN}:5", "tokens"] == 3
    assert bool(table["has_twin"].all()) == twin and len(result.top(3)) == 3


@pytest.mark.parametrize("batch_size", [3, 16])
def test_figures_are_those_of_hooks_and_of_edited_weights(batch_size: int):
    model = tiny_model(torch.float64)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(3, 7))
    site, index = "blocks.0.attn.W_V", 2
    result = redundancy(vpd, model, tokens, [f"{site}:{index}", "blocks.1.mlp.W_out:0"], rows=3, batch_size=batch_size)
    g = vpd.causal_importances(model, tokens)
    rows = (g[site][..., index] > 0).any(1)
    n = float((g[site][..., index] > 0).sum())
    with torch.no_grad():
        target = model(tokens[rows]).log_softmax(-1)
    mask = torch.ones(vpd.counts[site], dtype=torch.float64)
    mask[index] = 0.0
    with torch.no_grad():
        cost = float(kl_divergence(target, edited(model, vpd, {site: (mask, 1.0)})(tokens[rows])))
    assert float(result.full[0]) == pytest.approx(cost * 7 * int(rows.sum()) / n)
    important = (g.concatenated[rows] > 0).double()
    without = important.clone()
    without[..., vpd.site_axis.slices[site].start + index] = 0.0
    costs = []
    with torch.no_grad(), vpd.attach(model):
        for used in (important, without):
            masks = constant_masks(used, 0.0, vpd.site_axis)
            logits = model.run_with_hooks(tokens[rows], fwd_hooks=vpd.mask_hooks(masks))
            costs.append(float(kl_divergence(target, logits)))
    assert float(result.alone[0]) == pytest.approx((costs[1] - costs[0]) * 7 * int(rows.sum()) / n)


def test_a_trained_model_with_a_spare_layer():
    """Two layers that each learned to copy: the first has twins in the second, and none once the second is gone."""
    toy = Copying(d_vocab=9, length=4, d_model=16)
    model, tokens = train(toy, steps=500), toy.batches(8, seed=-3).at(0)
    assert min(toy.quality(model).values()) > 0.95  # with all layers, and with either alone
    twins = redundancy(first_layer_alone(model), model, tokens, rows=2).twins
    assert len(twins) >= 2 and all(twin.startswith("blocks.0.") for twin in twins)
    with torch.no_grad():
        model.blocks[1].attn.W_O.zero_()
    gone = redundancy(first_layer_alone(model), model, tokens, rows=2)
    assert gone.twins == [] and (gone.alone > 0.2).any()


def test_what_is_important_nowhere_has_no_figures():
    model = handmade.twinned_model(twin=True)
    result = redundancy(handmade.first_half(model), model, TOKENS, [f"{IN}:8", f"{IN}:0"])
    assert result.tokens.tolist() == [0, 2] and result.alone[0].isnan() and result.full[0].isnan()
    assert result.twins == [f"{IN}:0"]


def test_what_it_cannot_judge_is_refused():
    model = handmade.twinned_model(twin=True)
    vpd = handmade.first_half(model)
    with pytest.raises(KeyError, match="not a decomposed site"):
        redundancy(vpd, model, TOKENS, ["blocks.0.attn.W_Q:0"])
    with pytest.raises(ValueError, match="rows=0: give an integer of at least 1"):
        redundancy(vpd, model, TOKENS, rows=0)
    with pytest.raises(TypeError, match="is a string: give names in a list"):
        redundancy(vpd, model, TOKENS, f"{IN}:0")
