"""Sites that are one matrix used twice: their gradients are summed, their subcomponents stay each other's transposes."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tl_vpd import Decomposition, VPDConfig, decompose
from tl_vpd.components import Components
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.site import Site
from tl_vpd.toys import TMS
from tl_vpd.training import Coefficients, ExecutionConfig, SavingConfig, Trainer, new_decomposition
from tl_vpd.training.ties import Ties

from .a_run import TIED
from .test_processes import finish, start

TOY = TMS(4, 3)
PAIR = (("embed", "unembed"),)


def config(**settings) -> VPDConfig:
    gamma = dict(kind="per_subcomponent_mlps", hidden=4, output_bias=0.5)
    given = dict(steps=6, batch_size=2, C=5, gamma=gamma, output="mse", tied=PAIR)
    given |= dict(faithfulness={"warm_up_steps": 3}, optimizer={"lr": 1e-2})
    return VPDConfig(**{**given, **settings})


def tied(vpd) -> bool:
    return torch.equal(vpd.V["unembed"], vpd.U["embed"].T) and torch.equal(vpd.U["unembed"], vpd.V["embed"].T)


def test_the_gradient_is_that_of_a_function_of_the_first_sites_matrices_alone():
    torch.manual_seed(0)
    parts = Components([Site("a", 4, 3), Site("b", 3, 4)], {"a": 5, "b": 5}).double()
    ties = Ties(parts, [("a", "b")])
    ties.follow()
    w = [torch.randn(*shape, dtype=torch.float64) for shape in ((4, 5), (5, 3), (3, 5), (5, 4))]

    def value(V1, U1, V2, U2):
        return (
            sum((m * weight).sin().sum() for m, weight in zip((V1, U1, V2, U2), w, strict=True))
            + (V1 @ U1 @ V2 @ U2).sum()
        )

    V, U = (matrices["a"].detach().clone().requires_grad_() for matrices in (parts.V, parts.U))
    expected = torch.autograd.grad(value(V, U, U.T, V.T), (V, U))
    value(parts.V["a"], parts.U["a"], parts.V["b"], parts.U["b"]).backward()
    ties.collect()
    assert_close((parts.V["a"].grad, parts.U["a"].grad), expected)
    assert parts.V["b"].grad is None and parts.U["b"].grad is None


def test_a_follower_alone_gives_its_gradient_to_what_it_follows():
    parts = Components([Site("a", 4, 3), Site("b", 3, 4)], {"a": 2, "b": 2})
    ties = Ties(parts, [("a", "b")])
    (parts.V["b"] * torch.arange(6.0).view(3, 2)).sum().backward()
    ties.collect()
    assert torch.equal(parts.U["a"].grad, torch.arange(6.0).view(3, 2).T) and parts.V["a"].grad is None


@pytest.mark.parametrize("compile", [False, "recorded"])
@pytest.mark.parametrize("init", ["normal", "channels"])
def test_training_moves_both_and_keeps_them_tied(compile, init):
    model, settings = TOY.build(0), config(init=init, init_scale=0.5)
    before = new_decomposition(model, settings)
    run = decompose(model, TOY.batches(2, seed=1), settings, execution=ExecutionConfig(compile=compile), progress=False)
    assert tied(before) and tied(run.decomposition)
    assert not torch.allclose(before.V["embed"], run.decomposition.V["embed"], atol=1e-3)
    apart = decompose(model, TOY.batches(2, seed=1), config(tied=(), init=init), progress=False).decomposition
    assert not tied(apart)


def test_parts_of_a_batch_give_the_step_of_the_whole():
    found = []
    for micro_batch in (None, 1):
        model = TOY.build(0)
        with MaskedModel(vpd := new_decomposition(model, config()), model) as masked_model:
            trainer = Trainer(masked_model, config(), (2, 64), execution=ExecutionConfig(micro_batch=micro_batch))
            metrics = trainer.step(TOY.batches(2, seed=1).at(0))
        found.append((metrics.grad_norm, vpd.V["unembed"].detach().clone()))
        assert tied(vpd)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert_close(found[0][1], found[1][1], atol=2e-3, rtol=0)


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    data = TOY.batches(2, seed=1)
    whole = decompose(TOY.build(0), data, config(), progress=False).decomposition
    saving = SavingConfig(folder=tmp_path, save_every=4, keep_states=9)
    decompose(TOY.build(0), data, config(), saving=saving, progress=False)
    for path in (tmp_path / "state").glob("step-00000006*"):
        path.unlink()
    again = decompose(TOY.build(0), data, config(), saving=saving, resume=True, progress=False).decomposition
    assert tied(again) and all(torch.equal(whole.V[site], again.V[site]) for site in whole.sites)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_what_cannot_be_tied_is_refused():
    model = TOY.build(0)
    with pytest.raises(
        KeyError, match=r"tied names blocks\.0, which is not decomposed; decomposed sites: embed, unembed"
    ):
        new_decomposition(model, config(tied=(("embed", "blocks.0"),)))
    with pytest.raises(ValueError, match="embed and unembed are tied and need the same C; it is 5 and 6"):
        new_decomposition(model, config(C={"embed": 5, "unembed": 6}))
    with pytest.raises(ValueError, match="tied names embed twice"):
        new_decomposition(model, config(tied=(("embed", "unembed"), ("embed", "identity"))))
    with torch.no_grad():
        model.unembed.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="embed and unembed cannot be tied: one's weight is not exactly the transpose"):
        new_decomposition(model, config())


def test_shares_of_tied_sites_are_refused():
    model = TOY.build(0)
    refused = pytest.raises(ValueError, match="sharding='optimizer' needs tied=")
    with MaskedModel(new_decomposition(model, config()), model) as masked_model, refused:
        Trainer(masked_model, config(), (2, 64), execution=ExecutionConfig(sharding="optimizer"))


def test_two_processes_keep_sites_tied_and_give_what_one_gives(tmp_path):
    for processes in (1, 2):
        finish(start(tmp_path / str(processes), "tied", processes=processes))
    one, two = (Decomposition.load(tmp_path / str(n) / "decomposition") for n in (1, 2))
    first, second = TIED
    for components in (one, two):
        assert torch.equal(components.V[second], components.U[first].T) and torch.equal(
            components.U[second], components.V[first].T
        )
    for name in one.sites:
        # Adam gives an entry whose gradient is rounding noise a full-length step.
        assert float((one.V[name] - two.V[name]).abs().gt(1e-4).float().mean()) < 0.05, name


def test_a_refused_step_leaves_no_gradient_behind():
    model, settings = TOY.build(0), config(coefficients=Coefficients(adversarial=0.0))
    good = TOY.batches(2, seed=1).at(0)
    bad = good.clone()
    bad[0, 0, 0] = float("nan")
    norms = []
    for refused in (False, True):
        with MaskedModel(vpd := new_decomposition(model, settings), model) as masked_model:
            trainer = Trainer(masked_model, settings, (2, 64))
            if refused:
                with pytest.raises(FloatingPointError, match="not finite"):
                    trainer.step(bad)
            norms.append(trainer.step(good).grad_norm)
        assert bool(vpd.V["embed"].isfinite().all()) and tied(vpd)
    assert norms[0] == norms[1]
