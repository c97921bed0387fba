"""SPD's configuration and its squashing, by hand."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tl_vpd import VPDConfig
from tl_vpd.baselines import METHODS, SlopedSquash, SPDConfig, spd_config
from tl_vpd.importance.squash import LOWER_LEAKY
from tl_vpd.toys import TMS
from tl_vpd.training import Coefficients

Z = torch.tensor([-2.0, -0.5, 0.0, 0.25, 1.0, 1.5], dtype=torch.float64)


def test_importances_go_on_below_zero_with_the_slope():
    expected = torch.tensor([-0.2, -0.05, 0.0, 0.25, 1.0, 1.0], dtype=torch.float64)
    assert_close(SlopedSquash(0.1).importances(Z), expected)


@pytest.mark.parametrize("incoming", [2.0, -2.0])
def test_the_gradient_passes_below_zero_whatever_its_sign(incoming):
    expected = torch.tensor([0.1, 0.1, 0.1, 1.0, 1.0, 0.0], dtype=torch.float64) * incoming
    grad = torch.full_like(Z, incoming)
    assert_close(SlopedSquash(0.1).pullback(Z, grad), expected)
    assert SlopedSquash(0.1).pullback(Z, grad, out=grad) is grad
    assert_close(grad, expected)


def test_the_slope_is_spds_alone():
    assert isinstance(spd_config(forward_slope=0.01).squash, SlopedSquash)
    assert_close(spd_config().squash.importances(Z), LOWER_LEAKY.importances(Z))
    with pytest.raises(ValueError, match="forward_slope"):
        VPDConfig(forward_slope=0.01)


def test_spd_has_no_adversary_and_masks_all_sites_and_each_alone():
    config = spd_config(C=5, optimizer={"lr": 2e-3})
    c = config.coefficients
    assert isinstance(config, SPDConfig) and config.optimizer.lr == 2e-3 and config.optimizer.lr_final == 0
    assert (c.adversarial, c.frequency, c.stochastic, c.layerwise) == (0, 0, 1, 1)
    assert config.stochastic_routing == "all" and config.gamma.kind == "per_subcomponent_mlps"
    toy = TMS(3, 2)
    with pytest.raises(ValueError, match="SPD has no adversary"):
        METHODS["spd"].run(toy.build(0), toy.batches(2), spd_config(steps=3, batch_size=2, coefficients=Coefficients()))
