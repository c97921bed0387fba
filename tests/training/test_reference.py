"""Every engine against the method on one page, number by number in float64: losses, V, U, Γ and sources after three steps.

The page itself runs on a transformer written out as functions (``functional_target``), which knows nothing of the package.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import GAMMA, decomposition_of, some_tokens, tiny_model
from tests.training.functional_target import FunctionalTarget
from tl_vpd import ExecutionConfig, VPDConfig
from tl_vpd.forward import MaskedModel
from tl_vpd.training import Trainer
from tl_vpd.training.engine.recording import RECORDED
from tl_vpd.training.micro_batch import split_batch
from tl_vpd.training.reference import Reference, Samples, Site
from tl_vpd.training.step_samples import StepSampler

ROWS, POS, C = 4, 6, 5
RISING = ((0, 0), (0.4, 1))
NEWER = {
    "merged": 0.75,
    "adversary": {"pool": 2, "routing": "uniform_k", "inner_steps": 1, "betas": (0.01, 0.99)},
    "minimality": {"kind": "smooth_l0", "normalised": True, "frequency_reference": 50.0, "frequency_half_life": 3.0},
    "faithfulness": {"kind": "relative"},
    "coefficients": {"delta": 1e3, "locality": 0.1, "schedule": {"importance": RISING, "frequency": RISING}},
    "optimizer": {"kind": "muon", "gamma_lr": 2e-3, "clip": 1.0, "gamma_clip": 1e-3, "lr_decay": 0.9},
}
SETTINGS = {
    "the paper's": {},
    "the newer recipe": NEWER,
    "merged": {"merged": 0.5},
    "three of four rows attacked": {"merged": 0.75},
    "clipped Γ": {"optimizer": {"gamma_clip": 1e-3}},
    "Muon": {"optimizer": {"kind": "muon", "momentum": 0.8}},
    "locality": {"coefficients": {"locality": 0.1}, "locality": ((0, 8), (0.5, 0.25))},
    "one ascent without momentum": {"adversary": {"inner_steps": 1, "betas": (0.0, 0.99)}},
    "an adversary from the second step on": {"adversary": {"start": 0.1}},
    "knots": {
        "coefficients": {
            "schedule": {"stochastic": ((0, 2), (0.2, 1)), "adversarial": ((0.1, 1), (0.3, 0)), "delta": 2}
        },
        "minimality": {"p": ((0.1, 2), (0.2, 0.5))},
        "optimizer": {"lr_schedule": ((0, 0.5), (0.1, 1), (1, 0)), "lr_decay": 0.2, "lr_final": 0.5},
    },
    "pooled sources": {"adversary": {"pool": 2}},
    "smooth L0": {"minimality": {"kind": "smooth_l0"}},
    "smooth L0, 1 at 1": {"minimality": {"kind": "smooth_l0", "normalised": True}},
    "a reference count": {"minimality": {"frequency_reference": 50.0}},
    "a running mean": {"minimality": {"frequency_half_life": 3.0}},
    "relative faithfulness": {"faithfulness": {"kind": "relative"}, "coefficients": {"delta": 1e3}},
    "all sites for both losses": {"stochastic_routing": "all"},
    "random sites for both losses": {"adversary": {"routing": "uniform_k"}},
    "Γ on the residual stream": {"gamma": {**GAMMA, "reads": "residual"}},
    "chunks on the residual stream": {
        "gamma": {**GAMMA, "kind": "chunked_transformers", "chunk": 5, "reads": "residual"}
    },
    "layerwise": {"coefficients": {"layerwise": 1.0}},
    "squared error": {"output": "mse"},
    "the last block alone": {"sites": ("blocks.1.*",)},
    "no inner steps, no clipping": {"adversary": {"inner_steps": 0}, "optimizer": {"clip": None}},
}
MODELS = {
    "layer norm": {},
    "grouped queries, RMS norm, gated": {
        "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu", "n_heads": 4, "n_key_value_heads": 2,
    },
}  # fmt: skip
UNITS = {
    "W_Q": lambda cfg: cfg.n_heads,
    "W_K": lambda cfg: cfg.n_key_value_heads or cfg.n_heads,
    "W_V": lambda cfg: cfg.n_key_value_heads or cfg.n_heads,
    "_in": lambda cfg: cfg.d_mlp,
    "ate": lambda cfg: cfg.d_mlp,
}
"""Heads or neurons by the end of a site's name."""
PADDED = torch.ones(ROWS, POS, dtype=torch.bool)
PADDED[0, :3] = PADDED[2, 4:] = PADDED[3, :1] = False


def sampler_of(config, vpd):
    split = split_batch(range(ROWS), None, merged=config.merged)
    return StepSampler(config, split, pos=POS, site_axis=vpd.site_axis, device="cpu", dtype=torch.float64)


def by_site(concatenated, vpd):
    """Sources ``[... C+1]`` by site, Δ's last, of sources of all sites and then all Δs."""
    axis = vpd.site_axis
    return {
        name: torch.cat([concatenated[..., columns], concatenated[..., [axis.total + i]]], dim=-1)
        for i, (name, columns) in enumerate(axis.slices.items())
    }


def reference_of(config, model, vpd):
    """The page for a decomposition's V, U and Γ, and a function that gives the samples of a step."""
    target, sampler = FunctionalTarget(model, vpd.sites), sampler_of(config, vpd)
    sources = by_site(sampler.start(), vpd)
    sites = {
        name: Site(
            target.W[name],
            target.b[name],
            *(t.detach().clone().requires_grad_() for t in (vpd.V[name], vpd.U[name], r)),
            units=UNITS.get(name[-3:], lambda cfg: 0)(model.cfg),
        )
        for name, r in sources.items()
    }

    def samples(step):
        choices, split = sampler.at(step), sampler.split
        slots = torch.arange(POS).expand(len(split.attacked), POS) if choices.slots is None else choices.slots
        stochastic = by_site(sampler.sources("stochastic", step, split.stochastic), vpd)
        layerwise = by_site(sampler.sources("layerwise", step, split.rows), vpd)
        layerwise = layerwise if config.coefficients.layerwise else None
        return Samples(
            (split.attacked, split.stochastic),
            stochastic,
            slots,
            choices.stochastic_routing,
            choices.adversarial_routing,
            layerwise,
        )

    gamma = copy.deepcopy(vpd.gamma)
    return Reference(
        config, target, sites, OnStreams(gamma, target) if config.gamma.reads == "residual" else gamma
    ), samples


class OnStreams(torch.nn.Module):
    """Γ on the residual streams of the target's last call in place of the sites' inputs."""

    def __init__(self, gamma, target):
        super().__init__()
        self.gamma, self.target = gamma, target

    def forward(self, inputs, real):
        return self.gamma(self.target.streams, real)


def compare(settings, execution, padded=False, steps=3, **flags):
    """Runs some steps of a trainer and of the page, and raises where any number differs by more than 1e-6."""
    model = tiny_model(**flags)
    config = VPDConfig(**{"steps": 10, "batch_size": ROWS, "C": C, "gamma": GAMMA, **settings})
    vpd = decomposition_of(model, **config.model_dump(exclude={"steps", "batch_size"})).double()
    reference, samples = reference_of(config, model, vpd)
    token_mask = PADDED if padded else None
    real = torch.ones(ROWS, POS, dtype=torch.bool) if token_mask is None else token_mask
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(masked_model, config, (ROWS, POS), execution=ExecutionConfig(**execution))
        for step in range(steps):
            tokens = some_tokens(seed=step, shape=(ROWS, POS))
            metrics = trainer.step(tokens, token_mask)
            losses = reference.step(tokens, real, samples(step))
            if not config.coefficients.locality:
                losses.pop("locality")  # which the page computes in any case
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
    return trainer


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_the_functional_target_is_the_model(name, padded):
    model, tokens = tiny_model(**MODELS[name]), some_tokens(shape=(ROWS, POS))
    real = PADDED if padded else torch.ones(ROWS, POS, dtype=torch.bool)
    target = FunctionalTarget(model)
    logits = model(tokens, attention_mask=PADDED.long() if padded else None)
    assert_close(target(tokens, real, target.clean), logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting(name, padded):
    compare(SETTINGS[name], {}, padded)


SOME = {"sites": ("*W_Q", "*W_out")}  # graphs are recorded site by site, which takes seconds
SAME_GRAPHS = {
    "merged", "a reference count", "a running mean", "relative faithfulness", "no inner steps, no clipping", "clipped Γ", "Muon",
    "locality", "one ascent without momentum", "an adversary from the second step on", "chunks on the residual stream",
}  # fmt: skip
"""Settings whose graphs others have too."""


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in SAME_GRAPHS])
def test_every_graph_recorded(name):
    compare(SOME | SETTINGS[name], {"compile": RECORDED}, padded=True, steps=2)


@pytest.mark.parametrize("execution", [{}, {"micro_batch": 2, "checkpoint": True}, {"compile": RECORDED}], ids=str)
def test_passes_start_at_the_first_decomposed_block(execution):
    """Three blocks, the last one decomposed: equal to the page, which runs all of them."""
    trainer = compare({"sites": ("blocks.2.attn.W_Q", "blocks.2.mlp.*")}, execution, padded=True, steps=2, n_layers=3)
    assert trainer.engine.starts_late
    trainer = compare({"sites": ("blocks.0.mlp.*", "blocks.2.mlp.*")}, execution, steps=1, n_layers=3)
    assert not trainer.engine.starts_late


def test_recorded_graphs_of_all_sites_without_padding():
    compare({}, {"compile": RECORDED}, steps=2, **MODELS["grouped queries, RMS norm, gated"])


@pytest.mark.parametrize("settings", ["the paper's", "the newer recipe"])
def test_another_architecture(settings):
    compare(SETTINGS[settings], {}, **MODELS["grouped queries, RMS norm, gated"])


WAYS = {
    "micro-batches": {"micro_batch": 2},
    "checkpointed": {"checkpoint": True},
    "blocked logits": {"blocked_logits": True},
    "all that saves memory": {"micro_batch": 2, "checkpoint": True, "blocked_logits": True},
    "recorded, in micro-batches, with blocked logits": {"micro_batch": 2, "blocked_logits": True, "compile": RECORDED},
}


@pytest.mark.parametrize("settings", ["the paper's", "the newer recipe"])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_run_it(name, settings, monkeypatch):
    monkeypatch.setattr("tl_vpd.losses.unembedding.LOGITS_AT_ONCE", 4 * 22)  # logits of two tokens
    sites = SOME if WAYS[name].get("compile") else {}
    trainer = compare(SETTINGS[settings] | sites, WAYS[name], padded=True)
    assert (trainer.engine.unembedding is not None) == bool(WAYS[name].get("blocked_logits"))


@pytest.mark.parametrize("settings", ["layerwise", "a running mean"])
def test_micro_batches_of_unequal_size(settings):
    compare(SETTINGS[settings], {"micro_batch": 3}, padded=True)


def test_compiled_with_inductor():
    compare(SOME, {"compile": True}, steps=2, n_layers=1)


def test_the_warm_up_is_adamw_on_faithfulness_alone():
    model = tiny_model()
    config = VPDConfig(C=C, batch_size=ROWS, gamma=GAMMA, faithfulness={"warm_up_steps": 5, "warm_up_lr": 2e-3})
    vpd = decomposition_of(model, C=C).double()
    target = FunctionalTarget(model)
    pairs = {name: tuple(m.detach().clone().requires_grad_() for m in (vpd.V[name], vpd.U[name])) for name in vpd.sites}
    optimizer = torch.optim.AdamW([m for pair in pairs.values() for m in pair], lr=2e-3, weight_decay=0.0)
    for _ in range(5):
        errors = [(target.W[name] - V @ U).square().sum() for name, (V, U) in pairs.items()]
        optimizer.zero_grad()
        (torch.stack(errors).sum() / sum(W.numel() for W in target.W.values())).backward()
        optimizer.step()
    with MaskedModel(vpd, model) as masked_model:
        Trainer(masked_model, config, (ROWS, POS)).warm_up()
    for name, (V, U) in pairs.items():
        assert_close(vpd.V[name].detach(), V.detach(), rtol=1e-6, atol=1e-8)
        assert_close(vpd.U[name].detach(), U.detach(), rtol=1e-6, atol=1e-8)
