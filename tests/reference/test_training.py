"""Losses, their gradients, the evaluation adversary and three whole training steps, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.losses.penalty_sums import penalty_sums
from tests.reference.conftest import Reference, by_site, pack, pack_sources, read
from tl_vpd.forward import MaskedModel
from tl_vpd.importance import lower_leaky
from tl_vpd.losses import (
    Penalty,
    Reconstruction,
    faithfulness,
    frequency_minimality,
    importance_minimality,
)
from tl_vpd.masking import fresh_pgd, masks_from_sources
from tl_vpd.masking.routing import Routing
from tl_vpd.training import AdversaryConfig, Coefficients, Trainer, VPDConfig
from tl_vpd.training.step_samples import StepSampler, StepSamples


class Losses:
    """Every loss of the reference on its inputs, from one Γ forward, and the leaves gradients are asked for."""

    def __init__(self, reference: Reference, masked_model: MaskedModel):
        self.reference, self.masked_model = reference, masked_model
        tokens, inputs = reference.tokens, reference.inputs
        logits, site_inputs = masked_model.clean(tokens)
        self.distance = Reconstruction(logits)
        self.z = reference.decomposition.pre_sigmoid(site_inputs)
        self.z.retain_grad()
        self.g = lower_leaky(self.z)
        deltas = [by_site(inputs, "src_delta")[n][..., None] for n in reference.site_axis.names]
        self.drawn = torch.cat([pack(inputs, "src"), *deltas], -1)
        self.sources = pack_sources(inputs, "ppgd_src").requires_grad_()

    def kl(self, sources: Tensor, routing=None) -> Tensor:
        masks = masks_from_sources(self.g, sources, self.reference.site_axis, routing)
        return self.distance(self.masked_model.masked(self.reference.tokens, masks))

    def minimality(self, p: float, beta: float = 0.5) -> Tensor:
        s, n = penalty_sums(self.z, Penalty("power", p))
        return importance_minimality(s, n) + beta * frequency_minimality(s, n)

    def of(self, name: str) -> Tensor:
        parts = self.reference.decomposition.components
        routing = by_site(self.reference.inputs, "routing")
        match name:
            case "faith":
                return faithfulness(parts, {n: self.masked_model.adapter.weight(n) for n in parts.sites})
            case "imp_p1.0" | "imp_p0.4":
                return self.minimality(float(name[5:]))
            case "kl_d_stoch_allrouted":
                return self.kl(self.drawn)
            case "kl_e_stoch_routed":
                return self.kl(self.drawn, routing)
            case "kl_f_ppgd_allrouted":
                return self.kl(self.sources)
            case "recon":
                return 0.5 * self.of("kl_e_stoch_routed") + 0.5 * self.of("kl_f_ppgd_allrouted")
            case "total_p1.2":
                return 1e7 * self.of("faith") + 2e-4 * self.minimality(1.2) + self.of("recon")
        raise KeyError(name)


@pytest.fixture
def losses(reference: Reference):
    with MaskedModel(reference.decomposition, reference.model) as masked_model:
        yield Losses(reference, masked_model)


@pytest.mark.parametrize(
    "name",
    ["faith", "imp_p1.0", "imp_p0.4", "kl_d_stoch_allrouted", "kl_e_stoch_routed", "kl_f_ppgd_allrouted", "total_p1.2"],
)
def test_loss_values(losses: Losses, name: str):
    assert_close(losses.of(name).detach(), torch.tensor(losses.reference.scalars[f"lossval_{name}"]), rtol=2e-5, atol=0)


@pytest.mark.parametrize("p", [2.0, 1.0, 0.4])
def test_minimality_without_the_logarithm(losses: Losses, p: float):
    expected = torch.tensor(losses.reference.scalars[f"loss_imp_p{p}_beta0"])
    assert_close(losses.minimality(p, beta=0.0).detach(), expected, rtol=2e-5, atol=0)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("faith", 1e-5),
        ("imp_p1.0", 1e-4),
        ("kl_d_stoch_allrouted", 1e-4),
        ("kl_e_stoch_routed", 1e-4),
        ("kl_f_ppgd_allrouted", 1e-4),
        ("total_p1.2", 1e-4),
    ],
)
def test_gradients(losses: Losses, name: str, tolerance: float):
    stored = read(f"grads/{name}")
    losses.of(name).backward()
    pairs = losses.reference.parameters(stored)
    assert len(pairs) == sum(k[:2] in ("V/", "U/", "ci") and not k.startswith("ci_pre") for k in stored)
    for key, (parameter, expected) in pairs.items():
        assert relative_error(parameter.grad, expected) < tolerance, key
    if "ci_pre/h.1.mlp.c_fc" in stored:
        gradient = losses.reference.site_axis.split_sites(losses.z.grad)["blocks.1.mlp.W_in"]
        assert relative_error(gradient, stored["ci_pre/h.1.mlp.c_fc"]) < tolerance
    if name == "kl_f_ppgd_allrouted":
        assert relative_error(losses.sources.grad, pack_sources(stored, "ppgd_src")) < tolerance


def test_minimality_gradient_at_a_small_exponent(losses: Losses):
    """At p = 0.4 the slope is steep near 0: it is compared where the pre-sigmoid value exceeds 1e-3.

    Float32 powers differ between processors by more than the other gradients do.
    """
    stored = read("grads/imp_p0.4")["ci_pre/h.1.mlp.c_fc"]
    losses.of("imp_p0.4").backward()
    gradient = losses.reference.site_axis.split_sites(losses.z.grad)["blocks.1.mlp.W_in"]
    above = losses.reference.site_axis.split_sites(losses.z.detach())["blocks.1.mlp.W_in"] > 1e-3
    assert relative_error(gradient[above], stored[above]) < 5e-4


def test_reconstruction_gradients_without_faithfulness(losses: Losses):
    """V's and U's gradient of half the routed plus half the adversarial KL is the stored sum of the two."""
    stored = {k: 0.5 * v for k, v in read("grads/kl_e_stoch_routed").items() if k[:2] in ("V/", "U/")}
    for k, v in read("grads/kl_f_ppgd_allrouted").items():
        if k in stored:
            stored[k] += 0.5 * v
    losses.of("recon").backward()
    for key, (parameter, expected) in losses.reference.parameters(stored).items():
        assert relative_error(parameter.grad, expected) < 1e-4, key


def test_fresh_pgd(reference: Reference, losses: Losses):
    stored = read("pgd_eval")
    start = pack_sources(reference.inputs, "pgd_init")
    gradients = []
    g = losses.g.detach()

    def loss(sources: Tensor) -> Tensor:
        if sources.requires_grad:
            sources.register_hook(gradients.append)
        masks = masks_from_sources(g, sources, reference.site_axis)
        return losses.distance(losses.masked_model.masked(reference.tokens, masks, constant_weights=True))

    found = fresh_pgd(loss, start, steps=20, step_size=0.1)
    assert relative_error(gradients[0], pack_sources(stored, "grad0")) < 1e-4
    expected = torch.tensor([*reference.scalars["pgd_eval_loss_per_step"], reference.scalars["pgd_eval_final"]])
    assert_close(torch.tensor(found.losses[:3]), expected[:3], rtol=1e-3, atol=0)
    assert_close(torch.tensor(found.losses), expected, rtol=3e-2, atol=0)
    assert relative_error(found.sources, pack_sources(stored, "final")) < 0.15


class Given(StepSampler):
    """The reference's random choices."""

    tensors: dict[str, Tensor]

    def at(self, step: int) -> StepSamples:
        routing = by_site(self.tensors, f"step{step - 500}/routing")
        return StepSamples(Routing(list(routing), torch.stack(list(routing.values()), 1)), None)

    def sources(self, what: str, step: int, rows: list[int]) -> Tensor:
        prefix = f"step{step - 500}"
        deltas = [by_site(self.tensors, f"{prefix}/src_delta")[n][..., None] for n in self.site_axis.names]
        return torch.cat([pack(self.tensors, f"{prefix}/src"), *deltas], -1)


def test_three_training_steps(reference: Reference):
    config = VPDConfig(
        steps=1000,
        batch_size=3,
        optimizer={"lr": 5e-5, "clip": 0.01},
        coefficients=Coefficients(delta=1e7, stochastic=0.5, adversarial=0.5, importance=2e-4, frequency=1e-4),
        adversary=AdversaryConfig(inner_steps=2, lr=0.01, warm_up=0.025),
    )
    draws = read("train_draws")
    with MaskedModel(reference.decomposition, reference.model) as masked_model:
        trainer = Trainer(masked_model, config, (3, 12))
        sampler = trainer.stream.sampler
        trainer.stream.sampler = Given(config, sampler.split, pos=12, site_axis=sampler.site_axis, device="cpu")
        trainer.stream.sampler.tensors, trainer.done = draws, 500
        trainer.sources.values = pack_sources(reference.inputs, "ppgd_src")
        ascents = []
        ascend = trainer.sources.ascend

        def recorded(gradient: Tensor, lr: float, *where, **which) -> None:
            ascend(gradient, lr, *where, **which)
            ascents.append(trainer.sources.values.clone())

        trainer.sources.ascend = recorded
        for i, expected in enumerate(reference.scalars["train_steps"]):
            found = trainer.step(draws[f"step{i}/tokens"])
            if i == 0:
                assert_close(
                    ascents[1], pack_sources(read("ppgd_after_warmup_step0"), "after_warmup"), rtol=0, atol=1e-4
                )
            minimality = found.importance + 0.5 * found.frequency
            for name, value, wanted in (
                ("lr", found.lr, expected["main_lr"]),
                ("p", found.p, expected["p"]),
                ("faithfulness", found.faithfulness, expected["loss_faith"]),
                ("minimality", minimality, expected["loss_imp"]),
                ("stochastic", found.stochastic, expected["loss_stoch"]),
                ("adversarial", found.adversarial, expected["loss_ppgd"]),
                ("total", found.total, expected["total"]),
                ("norm", found.grad_norm, expected["comp_grad_norm"]),
            ):
                assert value == pytest.approx(wanted, rel=1e-4), (i, name)
            after = read(f"after_train_step{i}")
            for key, (parameter, value) in reference.parameters(after).items():
                assert_close(
                    parameter.detach(), value, rtol=0, atol=2e-6, msg=lambda m, k=key, i=i: f"step {i}, {k}: {m}"
                )
            # A handful of sources sit where the gradient is rounding noise, and Adam gives noise a full-length step.
            error = (trainer.sources.values - pack_sources(after, "ppgd_src")).abs()
            assert (error > 1e-3).float().mean() < 2e-3
