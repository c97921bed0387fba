"""Targeted steps against the method on one page, in float64: losses, V, U, Γ and sources, by every engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import some_tokens, tiny_model
from tests.training.functional_target import FunctionalTarget
from tests.training.test_reference import by_site
from tl_vpd import ExecutionConfig
from tl_vpd.forward import MaskedModel
from tl_vpd.training import TargetedConfig, TargetedTrainer, new_decomposition
from tl_vpd.training.engine.recording import RECORDED
from tl_vpd.training.reference import Site
from tl_vpd.training.reference_targeted import Batch, TargetedReference

ROWS, POS, OTHERS, OTHER_POS = 4, 4, 3, 6
CONFIG = {
    "steps": 10,
    "batch_size": ROWS,
    "nontarget_batch_size": OTHERS,
    "C": 5,
    "gamma": {"kind": "global_mlp", "hidden": 7},
    "coefficients": {"importance": 0.1, "frequency": 0.05, "schedule": {"importance": ((0, 0.5), (0.3, 1))}},
    "adversary": {"start": 0.1},
    "optimizer": {"lr": 2e-3, "gamma_lr": 1e-3, "clip": 0.5},
    "decay": 5.0,
}
LENGTHS = (POS, POS - 1, POS)
"""Positions of the target's rows in each step; the adversary starts in the second."""
SOME = ("*W_Q", "*W_out")
SETTINGS = {
    "all": {},
    "without the unmasked loss": {"coefficients": CONFIG["coefficients"] | {"unmasked": 0.0}},
    "without decay": {"decay": 0.0},
    "attacked from the start": {"adversary": {}},
    "never attacked": {"coefficients": CONFIG["coefficients"] | {"adversarial": 0.0}},
    "all sites": {"stochastic_routing": "all"},
    "a reference count, a transformer": {
        "minimality": {"p": 1.5, "frequency_reference": 50.0},
        "gamma": {"d_ci": 8, "n_blocks": 1, "n_heads": 2},
    },
}


def decomposition_of(model, config):
    """Untrained; importances of 0, of 1 and between are all common."""
    vpd = new_decomposition(model, config).double()
    with torch.no_grad():
        vpd.gamma.unembed.weight.mul_(8)
        vpd.gamma.unembed.bias.add_(0.3)
    return vpd


def batch_of(stream, vpd, tokens, real, step):
    sampler = stream.sampler.of_length(tokens.shape[1])
    routing = sampler.at(step).stochastic_routing
    return Batch(tokens, real, by_site(sampler.sources("stochastic", step, range(len(tokens))), vpd), routing)


def compare(settings, execution, padded=False, steps=3, **flags):
    """Raises where any number of the trainer differs by more than 1e-6 from the page's."""
    model, config = tiny_model(**flags), TargetedConfig(**CONFIG | settings)
    vpd = decomposition_of(model, config)
    target = FunctionalTarget(model, vpd.sites)
    other_mask = torch.ones(OTHERS, OTHER_POS, dtype=torch.bool)
    if padded:
        other_mask[0, :3] = other_mask[2, 5:] = False
    with MaskedModel(vpd, model) as masked_model:
        shapes = (ROWS, POS), (OTHERS, OTHER_POS)
        trainer = TargetedTrainer(masked_model, config, shapes, execution=ExecutionConfig(**execution))
        sites = {
            name: Site(
                target.W[name],
                target.b[name],
                *(t.detach().clone().requires_grad_() for t in (vpd.V[name], vpd.U[name], r)),
            )
            for name, r in by_site(trainer.sources.values, vpd).items()
        }
        reference = TargetedReference(config, target, sites, copy.deepcopy(vpd.gamma))
        for step in range(steps):
            tokens = some_tokens(seed=step, shape=(ROWS, LENGTHS[step]))
            others = some_tokens(seed=step + 9, shape=(OTHERS, OTHER_POS))
            metrics = trainer.step(tokens, None, others, other_mask if padded else None)
            here = batch_of(trainer.stream, vpd, tokens, torch.ones_like(tokens, dtype=torch.bool), step)
            losses = reference.step(here, batch_of(trainer.nontarget, vpd, others, other_mask, step))
            for name, loss in losses.items():
                assert getattr(metrics, name) == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-12), (step, name)
    exact = {"rtol": 1e-6, "atol": 1e-7}
    for name, site in reference.sites.items():
        assert_close(vpd.V[name].detach(), site.V.detach(), **exact, msg=lambda m, n=name: f"V of {n}: {m}")
        assert_close(vpd.U[name].detach(), site.U.detach(), **exact, msg=lambda m, n=name: f"U of {n}: {m}")
        sources = by_site(trainer.sources.values, vpd)[name]
        assert_close(sources, site.r.detach(), **exact, msg=lambda m, n=name: f"sources of {n}: {m}")
    for (name, p), q in zip(vpd.gamma.named_parameters(), reference.gamma.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), **exact, msg=lambda m, n=name: f"{n} of Γ: {m}")
    return trainer, metrics


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting(name):
    _, metrics = compare(SETTINGS[name], {}, padded=name != "without decay")
    assert (metrics.adversarial > 0) == (name != "never attacked")
    assert (metrics.unmasked > 0) == (name != "without the unmasked loss")


def test_micro_batches():
    compare({"sites": ("blocks.1.*",)}, {"micro_batch": 3, "checkpoint": True}, padded=True)


def test_every_graph_recorded():
    compare({"sites": SOME}, {"compile": RECORDED}, steps=2, n_layers=1)


def test_passes_start_at_the_first_decomposed_block():
    trainer, _ = compare({"sites": ("blocks.1.*",)}, {})
    assert trainer.engine.starts_late


def test_the_streams_draw_other_numbers_and_deltas_are_on_off_target():
    model, config = tiny_model(), TargetedConfig(**CONFIG)
    with MaskedModel(new_decomposition(model, config).double(), model) as masked_model:
        trainer = TargetedTrainer(masked_model, config, ((ROWS, POS), (ROWS, POS)))
        here, there = trainer.stream.sampler, trainer.nontarget.sampler
        one, other = (sampler.sources("stochastic", 0, range(2)) for sampler in (here, there))
        total = trainer.decomposition.site_axis.total
        assert not bool((one[..., :total] == other[..., :total]).any())
        assert bool((other[..., total:] == 1).all()) and bool((one[..., total:] < 1).all())
        routed = [sampler.at(0).stochastic_routing["blocks.0.attn.W_Q"] for sampler in (here, there)]
        assert not torch.equal(*(torch.stack([sampler.at(s).stochastic_routing["blocks.0.attn.W_Q"][:2] for s in range(9)])
                                 for sampler in (here, there))) and routed[0].shape == (ROWS, POS)  # fmt: skip
