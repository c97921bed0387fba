"""A run's yardstick against a model whose weights are edited, its checks, and what it says."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import GAMMA, decomposition_of, some_tokens, tiny_model
from tl_vpd import SavingConfig, VPDConfig, decompose
from tl_vpd.adapters import adapt
from tl_vpd.forward import MaskedModel
from tl_vpd.training.outlook import Check, Outlook, due

SITES = ("blocks.0.mlp.W_out", "blocks.1.attn.*")


def kl(target, other, real=None):
    p, q = target.log_softmax(-1), other.log_softmax(-1)
    values = (p.exp() * (p - q)).sum(-1)
    return float(values.mean() if real is None else values[real].mean())


def with_importances(vpd, value):
    """Γ gives every subcomponent this value before squashing."""
    with torch.no_grad():
        vpd.gamma.unembed.weight.zero_()
        vpd.gamma.unembed.bias.fill_(value)
    return vpd


@pytest.mark.parametrize("padded", [False, True])
def test_the_yardstick_is_what_ablating_the_sites_costs(padded):
    model, tokens = tiny_model(), some_tokens()
    vpd = with_importances(decomposition_of(model, sites=SITES).double(), -1.0)
    token_mask = torch.arange(7) >= torch.tensor([[2], [0]]) if padded else None
    attention_mask = None if token_mask is None else token_mask.long()
    with MaskedModel(vpd, model) as masked_model:
        outlook = Outlook(masked_model, VPDConfig(), tokens, token_mask)
        nothing = outlook.check(5)
    edited = copy.deepcopy(model)
    for name in vpd.sites:
        adapter = adapt(edited)
        adapter.set_weight(name, torch.zeros_like(adapter.weight(name)))
    with torch.no_grad():
        target, ablated = (m(tokens, attention_mask=attention_mask) for m in (model, edited))
    assert outlook.yardstick == pytest.approx(kl(target, ablated, token_mask), rel=1e-9)
    # Where nothing is important, rounded masks ablate everything.
    assert nothing.distance == pytest.approx(outlook.yardstick, rel=1e-9)
    assert nothing.l0 == 0


def test_a_check_is_the_distance_under_rounded_masks():
    model, tokens = tiny_model(), some_tokens()
    vpd = decomposition_of(model, sites=SITES).double()
    with MaskedModel(vpd, model) as masked_model:
        check = Outlook(masked_model, VPDConfig(), tokens).check(2_000)
    ci = vpd.causal_importances(model, tokens)
    with torch.no_grad(), vpd.attach(model) as attached:
        target = model(tokens)
        with attached.masked("rounded"):
            masked = model(tokens)
    assert check.distance == pytest.approx(kl(target, masked), rel=1e-9)
    assert_close(torch.tensor(check.l0), ci.l0.float().mean())
    assert (check.total, check.step, check.progress) == (6 * len(vpd.sites), 2_000, 0.1)  # of 20,000 steps
    assert check.share == check.distance / check.yardstick


def test_always_on_subcomponents_that_pay_for_themselves():
    model, tokens = tiny_model(), some_tokens()
    coefficients = {"stochastic": 0.5, "adversarial": 0.25, "importance": 1e-2, "frequency": 1e-3}
    with MaskedModel(decomposition_of(model).double(), model) as masked_model:
        outlook = Outlook(masked_model, VPDConfig(coefficients=coefficients), tokens)
        assert outlook.affordable(63) == pytest.approx(0.75 * outlook.yardstick / (1e-2 + 1e-3 * 6))
        reference = VPDConfig(coefficients=coefficients, minimality={"frequency_reference": 7.0})
        outlook.config = reference
        assert outlook.affordable(63) == pytest.approx(0.75 * outlook.yardstick / (1e-2 + 1e-3 * 3))
        outlook.config = VPDConfig(coefficients={"importance": 0, "frequency": 0})
        assert outlook.affordable(63) == math.inf


@pytest.mark.parametrize(
    ("distance", "l0", "progress", "message"),
    [
        (0.9, 3.0, 0.1, "explain nothing: with the others ablated the output is 90% as far"),
        (
            0.4,
            20.0,
            0.2,
            "Too little is explained: with only the important subcomponents (20.0 per token) the output is 40% as",
        ),
        (0.4, 20.0, 0.1, None),  # it may still fall
        (0.3, 20.0, 0.2, None),
        (0.1, 60.0, 0.5, "Importances are dense: 60.0 of 100"),
        (0.1, 60.0, 0.1, None),
        (0.1, 10.0, 1.0, None),
        (0.9, 3.0, 0.03, None),  # too early to say
    ],
)
def test_what_is_warned_of(distance, l0, progress, message):
    warning = Check(1, distance, l0, 100, 1.0, progress).warning(VPDConfig())
    assert (
        (warning is None) if message is None else (message in warning and "coefficients.importance (0.0002)" in warning)
    )


def test_a_run_is_checked_a_few_times():
    assert [n for n in range(1, 101) if due(n, 100)] == [1, 3, 10, 20, 35, 50, 75, 100]
    assert [n for n in range(1, 21) if due(n, 20)] == [1, 2, 4, 7, 10, 15, 20]
    assert not any(due(n, 19) for n in range(1, 20))


@pytest.fixture(scope="module")
def short():
    return dict(batch_size=2, C=4, gamma=GAMMA)


def test_first_and_last_lines_and_a_warm_up_as_long_as_the_run(short, caplog, tmp_path, monkeypatch):
    from tl_vpd.training.trainer import Trainer

    counts = []
    faithfulness = Trainer._faithfulness

    def counted(self, coefficient):
        counts.append(coefficient)
        return faithfulness(self, coefficient)

    monkeypatch.setattr(Trainer, "_faithfulness", counted)
    model, saving = tiny_model(dtype=torch.float32), SavingConfig(folder=tmp_path / "run", save_every=4)
    with caplog.at_level(logging.INFO, logger="tl_vpd"):
        decompose(model, some_tokens(shape=(4, 7)), VPDConfig(steps=8, **short), saving=saving, progress=False)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("run_report")]
    assert counts.count(1.0) == 8  # one unit of the coefficient in each step of the warm-up
    assert lines[0] == "Decomposing 12 sites into 48 subcomponents, 8 steps of 14 tokens."
    assert lines[1].startswith("Ablating these sites costs ") and lines[1].endswith(
        ": the yardstick of all losses below."
    )
    assert any(line.endswith("of memory so far.") for line in lines)
    assert lines[-1].startswith("Finished 8 steps: stochastic ") and "of 48." in lines[-1]
    caplog.clear()
    (tmp_path / "run" / "state" / "step-00000008.safetensors").unlink()
    with caplog.at_level(logging.INFO, logger="tl_vpd"):
        decompose(
            model, some_tokens(shape=(4, 7)), VPDConfig(steps=8, **short), saving=saving, resume=True, progress=False
        )
    assert any(r.getMessage().startswith("Resuming after step 4 of 8: 12 sites") for r in caplog.records)


def test_a_collapsed_run_is_warned_of_by_name(short, caplog):
    model = tiny_model(dtype=torch.float32)
    config = VPDConfig(steps=20, coefficients={"importance": 1e3}, optimizer={"lr": 0.05}, **short)
    with caplog.at_level(logging.WARNING, logger="tl_vpd"):
        run = decompose(model, some_tokens(shape=(4, 7)), config, progress=False)
    assert run.checks["step"].tolist() == [1, 2, 4, 7, 10, 15, 20]
    last = run.checks.iloc[-1]
    assert last["share"] == last["distance"] / last["yardstick"] > 0.8
    warnings = [r.getMessage() for r in caplog.records if "explain nothing" in r.getMessage()]
    assert len(warnings) == 1  # once, however often the run is checked
    assert "Lower coefficients.importance (1000)" in warnings[0]


def test_a_dense_run_is_warned_of_once(short, caplog):
    config = VPDConfig(steps=20, coefficients={"importance": 1e-9, "frequency": 0.0}, optimizer={"lr": 0.05}, **short)
    model = tiny_model(dtype=torch.float32)
    with caplog.at_level(logging.WARNING, logger="tl_vpd"):
        run = decompose(model, some_tokens(shape=(4, 7)), config, progress=False)
    dense = run.checks[(run.checks["step"] >= 10) & (run.checks["l0"] >= 24)]
    assert len(dense) > 1 and dense["l0"].nunique() > 1  # dense more than once, with other figures
    assert len([r for r in caplog.records if "Importances are dense" in r.getMessage()]) == 1


def test_lines_and_bar_are_shown(short, capfd):
    model = tiny_model(dtype=torch.float32)
    run = decompose(model, some_tokens(shape=(4, 7)), VPDConfig(steps=2, **short))
    assert not len(run.checks) and {"step", "share", "l0", "total"} <= set(run.checks)
    out, err = capfd.readouterr()
    assert out.startswith("Decomposing 12 sites into 48 subcomponents")
    assert "Finished 2 steps: stochastic " in out
    assert "decomposing: 100%" in err and "stochastic=" in err and "l0=" in err
