"""Muon by an independent form, what it is given, what it stores, and where it is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import ExecutionConfig, VPDConfig
from tl_vpd.forward import MaskedModel
from tl_vpd.importance import GammaConfig, build
from tl_vpd.site import Site
from tl_vpd.training import OptimizerConfig, Trainer, new_decomposition
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.optimizers import matrices_of, moments, optimizers_of
from tl_vpd.training.state import load_state, save_state

MUON = VPDConfig(
    steps=6,
    batch_size=4,
    C=5,
    gamma=GAMMA,
    optimizer={"kind": "muon", "gamma_clip": 1.0},
    coefficients={"locality": 1e-3, "schedule": {"adversarial": ((0, 1), (1, 0.5))}},
    adversary={"start": 0.3, "betas": (0.0, 0.99)},
)


def orthogonalised(m):
    """Five steps of Newton and Schulz's iteration on a matrix of norm 1, in float64."""
    x = m.double() / m.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muons_first_step_by_an_independent_form():
    V, U = (torch.nn.Parameter(torch.randn(3, 40, generator=torch.Generator().manual_seed(i))) for i in range(2))
    start = V.detach().clone()
    gamma = torch.nn.Linear(4, 3)
    muon, adamw = optimizers_of(OptimizerConfig(kind="muon", lr=0.1, gamma_lr=0.01, momentum=0.9), [V, U], gamma)
    assert [g["params"] for g in muon.param_groups] == [[V, U], [gamma.weight]]
    assert [g["params"] for g in adamw.param_groups] == [[gamma.bias]]
    assert [[g["peak"] for g in o.param_groups] for o in (muon, adamw)] == [[0.1, 0.01], [0.01]]
    V.grad = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    muon.step()
    # Nesterov: the gradient and 0.9 of a momentum that is a tenth of it point in one direction.
    step = 0.1 * 0.2 * math.sqrt(40) * orthogonalised(V.grad)
    assert_close(start - V.detach(), step.float(), rtol=0, atol=0.03 * float(step.abs().max()))  # bfloat16 inside


@pytest.mark.parametrize(
    "kind", ["shared_transformer", "chunked_transformers", "per_site_mlps", "per_subcomponent_mlps"]
)
def test_every_parameter_has_one_optimizer_and_small_mlps_are_no_matrices(kind):
    gamma = build(
        GammaConfig(kind=kind, d_ci=8, n_heads=2, n_blocks=1), [Site("a", 4, 2), Site("b", 6, 2)], {"a": 3, "b": 5}
    )
    optimizers = optimizers_of(OptimizerConfig(kind="muon"), [torch.nn.Parameter(torch.ones(4, 3))], gamma)
    names = [(id(p), name, tuple(tensors)) for p, name, tensors in moments(optimizers)]
    assert len(names) == 1 + len(list(gamma.parameters())) == len({i for i, _, _ in names})
    assert {name: keys for _, name, keys in names} == {
        "muon": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")
    }  # fmt: skip
    assert bool(matrices_of(gamma)) == (kind != "per_subcomponent_mlps")


def trainer(config=MUON, seed=0):
    model = tiny_model(dtype=torch.float32)
    masked_model = MaskedModel(new_decomposition(model, config.model_copy(update={"seed": seed})), model)
    return masked_model, lambda **more: Trainer(masked_model, config, (4, 6), **more)


def test_a_run_with_muon_goes_on_bit_for_bit(tmp_path):
    (one, first), (other, second) = trainer(), trainer(seed=1)
    with one, other:
        a, b = first(), second()
        for step in range(3):
            a.step(some_tokens(seed=step, shape=(4, 6)))
        load_state(b, save_state(a, tmp_path))
        tokens = some_tokens(seed=3, shape=(4, 6))
        assert a.step(tokens) == b.step(tokens)
        for p, q in zip(a.parameters, b.parameters, strict=True):
            assert torch.equal(p, q)
        for (_, name, x), (_, _, y) in zip(moments(a.optimizers), moments(b.optimizers), strict=True):
            assert all(torch.equal(x[key], y[key]) for key in x), name


def test_muon_is_refused_without_whole_matrices_and_without_pytorchs(monkeypatch):
    masked_model, start = trainer()
    with masked_model:
        monkeypatch.setattr("tl_vpd.training.trainer.is_sharded", lambda weights: True)
        with pytest.raises(
            ValueError, match=r"Muon needs whole matrices: sharding='full' goes with optimizer.kind='adamw'"
        ):
            start(execution=ExecutionConfig(sharding="full"))
        monkeypatch.undo()
        monkeypatch.delattr(torch.optim, "Muon")
        with pytest.raises(RuntimeError, match=r"needs a PyTorch with torch.optim.Muon, and this is 2"):
            start()


def test_before_the_adversarys_start_sources_stay_and_nothing_is_attacked(monkeypatch):
    masked_model, start = trainer()
    with masked_model:
        a = start()
        before, passes = a.sources.values.clone(), []
        attack, reconstruct = a.engine.attack, a.engine.reconstruct
        monkeypatch.setattr(a.engine, "attack", lambda *x, **k: (passes.append("attack"), attack(*x, **k)))
        monkeypatch.setattr(a.engine, "reconstruct", lambda *x, **k: (passes.append("pass"), reconstruct(*x, **k))[1])
        metrics = [a.step(some_tokens(seed=step, shape=(4, 6))) for step in range(2)]
        assert passes == ["pass"] * 2 and [m.adversarial for m in metrics] == [0, 0]
        assert torch.equal(a.sources.values, before) and a.sources.updates == 0
        assert a.step(some_tokens(seed=2, shape=(4, 6))).adversarial > 0
        assert passes == ["pass"] * 2 + ["attack"] * 2 + ["pass"] * 2 and a.sources.updates == 3


def test_a_gradient_of_gamma_that_is_not_finite_is_refused():
    masked_model, start = trainer()
    with masked_model:
        a = start()
        a.step(some_tokens(shape=(4, 6)))
        matrices, (p, *_) = [m.detach().clone() for m in a.matrices], a.gamma_parameters
        p.register_hook(lambda grad: torch.full_like(grad, float("nan")))
        with pytest.raises(FloatingPointError, match="Step 1: the gradient of Γ is not finite"):
            a.step(some_tokens(shape=(4, 6)))
        assert all(torch.equal(m, before) for m, before in zip(a.matrices, matrices, strict=True))


def test_unequal_numbers_of_attacked_rows_are_refused():
    config = VPDConfig(steps=2, batch_size=6, C=5, gamma=GAMMA, merged=0.5)
    masked_model, _ = trainer(config)
    message = r"give 2 processes different numbers of attacked rows: .* 3, an integer"
    with masked_model, pytest.raises(ValueError, match=message):
        Trainer(masked_model, config, (6, 6), world=World(0, 2))
