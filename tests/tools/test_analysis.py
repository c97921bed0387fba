"""TransformerLens 4's ``tools.analysis`` on attached models (the plain model's numbers) and masked ones (an edited model's)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from tests.tools.conftest import case_of
from tests.tools.models import KINDS
from tl_vpd.adapters.versions import transformer_lens_version

TIGHT = dict(rtol=1e-7, atol=1e-8)
HAS_ANALYSIS = transformer_lens_version() >= (4,)
BRIDGES = [kind for kind in KINDS if HAS_ANALYSIS and kind in ("bridge", "compatible_bridge")]


def metric(logits):
    """A difference of two logits at the last position."""
    return logits[0, -1, 3] - logits[0, -1, 5]


def scores(model, case, granularity):
    from transformer_lens.tools.analysis import EdgeAttributionConfig, attribution_patch

    model.eval()
    config = EdgeAttributionConfig(granularity=granularity)
    result = attribution_patch(model, case.tokens[:1], case.other_tokens[:1], metric, config)
    measured = result.node_scores if granularity == "node" else result.edge_scores
    return torch.tensor(list(measured.values()), dtype=torch.float64), result


def recovered(model, case, circuit):
    from transformer_lens.tools.analysis import faithfulness

    model.eval()
    result = faithfulness(model, case.tokens[:1], case.other_tokens[:1], metric, circuit)
    return torch.tensor([result.recovered, result.full_metric, result.corrupt_metric], dtype=torch.float64)


def attributed(model, case, unit):
    from transformer_lens.tools.analysis import direct_logit_attribution

    model.eval()
    return direct_logit_attribution(model, case.tokens, 3, 5, unit=unit).attribution.to(torch.float64)


def read_out(model, case):
    from transformer_lens.tools.analysis import logit_lens

    model.eval()
    return logit_lens(model, case.tokens, incl_mid=True, positions=None).values.to(torch.float64)


def compared(case, compute):
    """What it computes of the plain, attached, masked and edited model."""
    plain, edited = compute(case.fresh()), compute(case.twin)
    with case.vpd.attach(case.model) as attached:
        idle = compute(case.model)
        with attached.masked(case.masks):
            masked = compute(case.model)
    assert_close(idle, plain, **TIGHT)
    assert_close(masked, edited, **TIGHT)
    assert not torch.allclose(masked, idle)


def test_the_tools_are_there_in_the_version_that_has_them():
    assert len(BRIDGES) == (2 if HAS_ANALYSIS else 0)
    assert find_spec("transformer_lens.patching") and (not HAS_ANALYSIS or find_spec("transformer_lens.tools.analysis"))


@pytest.mark.parametrize("granularity", ["node", "edge"])
@pytest.mark.parametrize("kind", BRIDGES)
def test_attribution_patching(kind, granularity):
    case = case_of(kind)
    compared(case, lambda model: scores(model, case, granularity)[0])


@pytest.mark.parametrize("kind", BRIDGES)
def test_faithfulness_of_a_circuit(kind):
    case = case_of(kind)
    circuit = scores(case.fresh(), case, "edge")[1].top_edges(k=12)
    compared(case, lambda model: recovered(model, case, circuit))


@pytest.mark.parametrize("unit", ["component", "layer"])
@pytest.mark.parametrize("kind", [kind for kind in BRIDGES if kind == "compatible_bridge"])
def test_direct_logit_attribution(kind, unit):
    case = case_of(kind)
    compared(case, lambda model: attributed(model, case, unit))


@pytest.mark.parametrize("kind", [kind for kind in BRIDGES if kind == "compatible_bridge"])
def test_direct_logit_attribution_of_heads_refuses_a_masked_w_o_unless_results_are_computed(kind):
    case = case_of(kind)
    with (
        case.vpd.attach(case.model) as attached,
        attached.masked(case.masks),
        pytest.raises(ValueError, match="set_use_attn_result"),
    ):
        attributed(case.model, case, "head")
    for model in (case.model, case.twin):
        model.set_use_attn_result(True)
    expected = attributed(case.twin, case, "head")
    with case.vpd.attach(case.model) as attached, attached.masked(case.masks):
        assert_close(attributed(case.model, case, "head"), expected, **TIGHT)


@pytest.mark.parametrize("kind", BRIDGES)
def test_the_logit_lens(kind):
    case = case_of(kind)
    compared(case, lambda model: read_out(model, case))
