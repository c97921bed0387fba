"""The config: refusals, and how C is found for every site."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tests.tiny import tiny_model
from tl_vpd import VPDConfig
from tl_vpd.adapters import adapt
from tl_vpd.site import Site
from tl_vpd.training.config import AdversaryConfig, Coefficients, counts_for, default_count


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 3}, "step\n.*Extra inputs"),
        ({"coefficients": {"freq": 1}}, "coefficients.freq\n.*Extra inputs"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"C": 0}, "C of every site is 0"),
        ({"C": {"*.W_Q": 0}}, r"C of \*\.W_Q is 0"),
        ({"lr": 0.0}, "greater than 0"),
        ({"lr_final": 2.0}, "less than or equal to 1"),
        ({"stochastic_routing": "some"}, "'all' or 'uniform_k'"),
        ({"gamma": {"kind": "oracle"}}, "shared_transformer"),
        ({"sites": ()}, "sites"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValidationError, match=message):
        VPDConfig(**fields)


def test_configs_are_frozen_and_come_back_from_json():
    config = VPDConfig(C={"*.attn.*": 3, "*": 5}, sites="*.attn.*", adversary=AdversaryConfig(routing="uniform_k"))
    assert config.sites == ("*.attn.*",)
    assert VPDConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3
    assert Coefficients() == Coefficients(delta=1e7, stochastic=0.5, adversarial=0.5, importance=2e-4, frequency=1e-4)


def test_counts_by_number_pattern_and_proportion():
    sites = adapt(tiny_model()).sites
    assert set(counts_for(VPDConfig(C=7), sites).values()) == {7}
    by_pattern = counts_for(VPDConfig(C={"*.attn.*": 3, "*.mlp.*": 5, "blocks.1.mlp.W_in": 9}), sites)
    assert by_pattern["blocks.0.attn.W_O"] == 3 and by_pattern["blocks.0.mlp.W_in"] == 5
    assert by_pattern["blocks.1.mlp.W_in"] == 9
    assert counts_for(VPDConfig(), sites)["blocks.0.mlp.W_in"] == 12


@pytest.mark.parametrize(
    ("weight", "d_in", "d_out", "expected"),
    [
        ("attn.W_Q", 768, 768, 512),
        ("attn.W_V", 768, 768, 1024),
        ("mlp.W_in", 768, 3072, 3072),
        ("mlp.W_out", 3072, 768, 3584),
    ],
)
def test_default_counts_are_the_papers(weight, d_in, d_out, expected):
    assert default_count(Site(f"blocks.0.{weight}", d_in, d_out)) == expected
