"""Three methods, one interface."""

from __future__ import annotations

import pytest
import torch

from tl_vpd import VPDConfig
from tl_vpd.baselines import METHODS, APDConfig, spd_config
from tl_vpd.evaluation.ground_truth import ground_truth
from tl_vpd.toys import TMS

TOY = TMS(3, 2)
SHORT = dict(steps=3, batch_size=2, C=4, seed=1)
CONFIGS = {
    "vpd": VPDConfig(
        **SHORT, gamma=dict(kind="per_subcomponent_mlps", hidden=4), output="mse", faithfulness={"warm_up_steps": 2}
    ),
    "spd": spd_config(**SHORT),
    "apd": APDConfig(**SHORT),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_pieces_importances_and_masked_outputs(name):
    model = TOY.build(0)
    assert type(CONFIGS[name]) is METHODS[name].config
    result = METHODS[name].run(model, TOY.batches(2, seed=1), CONFIGS[name])
    x = TOY.batches(5, seed=2).at(0)
    assert result.pieces("embed").shape == (4, 3, 2) and result.pieces("unembed").shape == (4, 2, 3)
    g = result.importances(x)
    assert list(g) == ["embed", "unembed"] and all(values.shape == (5, 64, 4) for values in g.values())
    assert all(bool(((values >= 0) & (values <= 1)).all()) for values in g.values())
    ones = {site: torch.ones_like(values) for site, values in g.items()}
    hidden = x @ result.pieces("embed").sum(0)
    expected = (hidden @ result.pieces("unembed").sum(0) + model.unembed.bias).relu()
    torch.testing.assert_close(result.output(x, ones), expected, atol=1e-5, rtol=1e-4)
    measured = ground_truth(result, model, x, TOY.truth(model))
    assert measured.sites["site"].tolist() == ["embed", "unembed"]


def test_a_run_of_vpd_goes_on_where_it_was_interrupted(tmp_path):
    whole = METHODS["vpd"].run(TOY.build(0), TOY.batches(2), CONFIGS["vpd"])
    first = METHODS["vpd"].run(TOY.build(0), TOY.batches(2), CONFIGS["vpd"], folder=tmp_path)
    second = METHODS["vpd"].run(TOY.build(0), TOY.batches(2), CONFIGS["vpd"], folder=tmp_path)
    assert torch.equal(whole.pieces("embed"), first.pieces("embed"))
    assert torch.equal(second.pieces("embed"), first.pieces("embed"))
