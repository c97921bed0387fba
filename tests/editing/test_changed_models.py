"""Changes that the editing benchmark trains are those that it measures, and the model is left as it was."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from benchmarks.changed_models import Tail, Text, factor_to, train
from tests.matrix.families import FAMILIES
from tests.matrix.models import plain, tokens
from tl_vpd.adapters.plain import PlainWeights


def tail_of(family: str) -> tuple[Tail, torch.Tensor]:
    """The last block of a model, and the whole model's logits."""
    model = plain(FAMILIES[family], "HookedTransformer", torch.float64).eval()
    with torch.no_grad():
        logits = model(tokens()).logits
    last = max(name.split(".")[1] for name in PlainWeights(model).places)
    return Tail(model, [name for name in PlainWeights(model).places if name.split(".")[1] == last]), logits


@pytest.mark.parametrize(
    "rank", [None, pytest.param(2, marks=pytest.mark.skipif(not find_spec("peft"), reason="no peft"))]
)
@pytest.mark.parametrize("family", ["GPT-NeoX", "Llama"])
def test_a_trained_change_is_the_one_that_is_put_on(family, rank):
    tail, logits = tail_of(family)
    states = tail.states(tokens())
    with torch.no_grad():
        assert_close(tail.logits(states), logits, rtol=1e-10, atol=1e-10)
    assert tail.first > 0 or family == "GPT-NeoX"
    before = {name: p.clone() for name, p in tail.model.named_parameters()}
    outputs = []

    def step(run):
        outputs.append(run(states))
        return outputs[-1][:, 3].mean(), False

    sites = list(tail.names)
    trained = train(tail, sites, rank, step, steps=3, lr=0.1)
    assert set(trained.change) == set(sites) and trained.steps == 3
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in tail.model.named_parameters())
    assert float((outputs[-1] - outputs[0]).detach().abs().max()) > 1e-2
    with torch.no_grad(), tail.changed(trained.change):
        assert_close(tail.logits(states, last=True), outputs[-1].detach(), rtol=1e-6, atol=1e-6)
    text = Text.of(tail, tokens(), {"all": torch.ones_like(tokens(), dtype=torch.bool)})
    assert text.kl(tail)["all_kl"] == pytest.approx(0.0, abs=1e-12)
    with tail.changed(trained.change, 0.5):
        log_q = tail.logits(states).log_softmax(-1)
        kl = text.kl(tail)["all_kl"]
    log_p = logits.log_softmax(-1)
    assert kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in tail.model.named_parameters())


def test_the_smallest_factor_that_is_enough():
    assert factor_to(lambda factor: factor >= 0.3) == pytest.approx(0.3, abs=0.01)
    assert factor_to(lambda factor: factor >= 5.0) == pytest.approx(5.0, abs=0.05)
    assert factor_to(lambda factor: False) is None
