"""Steps in parts and in several processes are the undivided step; the newer recipe's choices do what they say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import GAMMA, decomposition_of, draw, some_tokens, tiny_model
from tl_vpd import VPDConfig
from tl_vpd.adapters import Unsupported
from tl_vpd.baselines import SPDConfig
from tl_vpd.forward import BlockedMasks, MaskedModel, MaskInputs
from tl_vpd.training import Trainer, new_decomposition
from tl_vpd.training.config import AdversaryConfig, Coefficients, ExecutionConfig

SETTINGS = {
    "paper": {},
    "merged": {"merged": 0.5},
    "pooled": {"adversary": AdversaryConfig(pool=2)},
    "smooth, running frequency": {
        "minimality": {"kind": "smooth_l0", "frequency_reference": 50.0, "frequency_half_life": 3.0},
        "faithfulness": {"kind": "relative", "warm_up_steps": 1},
        "coefficients": Coefficients(delta=1e3),
    },
    "adversary routed": {"adversary": AdversaryConfig(routing="uniform_k"), "merged": 0.5},
    "stochastic alone": {"coefficients": Coefficients(adversarial=0.0)},
}


def run(steps=3, micro_batch=None, token_mask=None, **settings):
    """A few steps in float64; gives metrics, parameters and sources."""
    model = tiny_model()
    config = VPDConfig(
        **{"steps": 10, "batch_size": 4, "C": 5, "gamma": GAMMA, "faithfulness": {"warm_up_steps": 1}, **settings}
    )
    vpd = new_decomposition(model, config).double()
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(masked_model, config, (4, 6), execution=ExecutionConfig(micro_batch=micro_batch))
        trainer.warm_up()
        metrics = [trainer.step(some_tokens(seed=i, shape=(4, 6)), token_mask) for i in range(steps)]
    return metrics, {k: p.detach() for k, p in vpd.named_parameters()}, trainer.sources.values


@pytest.mark.parametrize("token_mask", [None, "some"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_in_parts_gives_the_losses_and_weights_of_the_whole(name, token_mask):
    real = None
    if token_mask:
        real = torch.ones(4, 6, dtype=torch.bool)
        real[0, :3] = real[3, :1] = False
    whole, weights, sources = run(token_mask=real, **SETTINGS[name])
    others = [{"micro_batch": 2}]
    if not SETTINGS[name].get("merged"):
        others += [{"micro_batch": 3}]
    for how in others:
        parts, split, own_sources = run(token_mask=real, **how, **SETTINGS[name])
        for a, b in zip(parts, whole, strict=True):
            for field in ("total", "stochastic", "adversarial", "importance", "frequency", "faithfulness", "l0"):
                assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-9), field
        for k in weights:
            assert_close(split[k], weights[k], rtol=1e-7, atol=1e-8, msg=k)
        assert_close(own_sources, sources, rtol=1e-6, atol=1e-6)


def test_a_merged_step_attacks_even_rows_and_draws_the_others():
    model = tiny_model(dtype=torch.float32)
    config = VPDConfig(steps=10, batch_size=4, C=5, gamma=GAMMA, merged=0.5, stochastic_routing="all")
    vpd = new_decomposition(model, config)
    tokens = some_tokens(shape=(4, 6))
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(masked_model, config, (4, 6))
        assert trainer.sources.values.shape == (2, 6, 5 * 12 + 12)
        engine = []
        masked = masked_model.masked

        def recorded(tokens, masks, token_mask=None, **how):
            engine.append((tokens, {n: masks.mask(n)[0].detach().clone() for n in vpd.site_axis.names}, how))
            return masked(tokens, masks, token_mask, **how)

        masked_model.masked = recorded
        trainer.step(tokens)
    *inner, (both, masks, _) = engine
    assert len(inner) == 2 and all(torch.equal(t, tokens[[0, 2]]) for t, _, _ in inner)
    assert torch.equal(both, tokens[[0, 2, 1, 3]])
    drawn = trainer.stream.sampler.sources("stochastic", 0, [1, 3])
    g = vpd.causal_importances(tiny_model(dtype=torch.float32), tokens)
    name = "blocks.0.attn.W_Q"
    assert masks[name].shape == (4, 6, 5)
    fresh = new_decomposition(tiny_model(dtype=torch.float32), config)
    first = fresh.causal_importances(tiny_model(dtype=torch.float32), tokens)[name][[1, 3]]
    assert_close(masks[name][2:], first + (1 - first) * drawn[..., :5], rtol=1e-5, atol=1e-5)
    assert len(g) == 12


def test_pooled_sources_are_shared_by_positions_and_cost_a_pool():
    config = VPDConfig(steps=10, batch_size=4, C=5, gamma=GAMMA, adversary=AdversaryConfig(pool=2))
    model = tiny_model(dtype=torch.float32)
    with MaskedModel(new_decomposition(model, config), model) as masked_model:
        trainer = Trainer(masked_model, config, (4, 6))
        before = trainer.sources.values.clone()
        assert before.shape == (4, 2, 72)
        slots = trainer.stream.sampler.at(0).slots
        assert slots.shape == (4, 6) and set(slots.flatten().tolist()) == {0, 1}
        trainer.done = 5
        trainer.step(some_tokens(shape=(4, 6)))
    assert trainer.sources.updates == 3 and not torch.equal(before, trainer.sources.values)


def test_random_numbers_of_a_row_do_not_depend_on_the_others():
    model = tiny_model(dtype=torch.float32)
    config = VPDConfig(steps=10, batch_size=4, C=5, gamma=GAMMA)
    with MaskedModel(new_decomposition(model, config), model) as masked_model:
        whole = Trainer(masked_model, config, (4, 6))
    draws = whole.stream.sampler
    a = draws.sources("stochastic", 7, [0, 1, 2, 3])
    assert torch.equal(a[[3, 1]], draws.sources("stochastic", 7, [3, 1]))
    assert len({float(x) for x in a.flatten()}) > 0.99 * a.numel()
    for other in (("stochastic", 8), ("layerwise", 7)):
        assert not torch.equal(a, draws.sources(*other, [0, 1, 2, 3]))
    large = draws.random.uniform("x", 0, range(64), (500,))
    assert abs(float(large.mean()) - 0.5) < 0.01 and abs(float(large.var()) - 1 / 12) < 0.002


@pytest.mark.parametrize("merged", [0.0, 0.5])
def test_what_cannot_be_shared_out_is_said(merged):
    model = tiny_model(dtype=torch.float32)
    config = VPDConfig(steps=10, batch_size=3, C=5, gamma=GAMMA, merged=merged)
    with MaskedModel(new_decomposition(model, config), model) as masked_model:
        if merged:
            with pytest.raises(ValueError, match="rows of both kinds"):
                Trainer(masked_model, config, (1, 6))
        else:
            assert (
                len(Trainer(masked_model, config, (3, 6), execution=ExecutionConfig(micro_batch=2)).split.micro_batches)
                == 2
            )


def test_copies_of_a_trainer_draw_alike():
    first, second = run(steps=2), run(steps=2)
    assert first[0] == second[0] and all(torch.equal(first[1][k], second[1][k]) for k in first[1])
    assert copy.deepcopy(first[0]) == first[0]


def some_steps(steps=3, dtype=torch.float32, **how):
    """Metrics and V of a few steps of a float32 run."""
    model = tiny_model(dtype=dtype)
    config = VPDConfig(
        steps=10,
        batch_size=4,
        C=5,
        gamma=GAMMA,
        faithfulness={"warm_up_steps": 200},
        merged=how.pop("merged", 0.0),
    )
    vpd = new_decomposition(model, config)
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(masked_model, config, (4, 6), execution=ExecutionConfig(**how))
        trainer.warm_up()
        metrics = [trainer.step(some_tokens(seed=i, shape=(4, 6))) for i in range(steps)]
    assert "forward" not in model.blocks[0].__dict__
    return metrics, vpd, trainer


def test_a_forward_slope_makes_masks_negative_and_moves_values_below_zero_both_ways(monkeypatch):
    model = tiny_model(dtype=torch.float32)
    config = SPDConfig(steps=10, batch_size=4, C=5, gamma={**GAMMA, "output_bias": -0.5}, forward_slope=0.1)
    vpd, name = new_decomposition(model, config), "blocks.0.attn.W_Q"
    cleans, masks, gradients = [], [], []
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(masked_model, config, (4, 6))
        clean, masked, sources = trainer.engine.clean, masked_model.masked, trainer.sources.values.clone()
        monkeypatch.setattr(trainer.engine, "clean", lambda *a: cleans.append(clean(*a)) or cleans[-1])
        monkeypatch.setattr(
            masked_model,
            "masked",
            lambda t, m, *a, **k: masks.append(m.mask(name)[0].detach()) or masked(t, m, *a, **k),
        )
        monkeypatch.setattr(
            trainer.engine, "backward_into_gamma", lambda _, grad_g, *rest: gradients.extend([grad_g.clone(), *rest])
        )
        metrics = trainer.step(some_tokens(shape=(4, 6)))
    grad_g, grad_sums, penalty = gradients
    z = cleans[0].z.detach()
    assert bool((z < 0).any()) and bool((z > 0).any())
    g = torch.where(z < 0, 0.1 * z, z.clamp(0, 1))[..., :5]
    assert_close(masks[0], g + (1 - g) * sources[..., :5])  # the adversary's first ascent
    assert bool((masks[0] < 0).any())
    assert metrics.l0 == pytest.approx(float((z > 0).sum()) / 24)
    below = z < -1e-3
    assert bool((grad_g[below] > 0).any()) and bool((grad_g[below] < 0).any())
    moved = penalty.pullback(z.flatten(0, 1), grad_sums, grad_g=grad_g.clone().flatten(0, 1), squash=config.squash)
    assert_close(moved.view_as(grad_g)[below], 0.1 * grad_g[below])


@pytest.mark.parametrize("merged", [0.0, 0.5])
def test_activations_computed_again_change_nothing(merged):
    plain, vpd, _ = some_steps(merged=merged)
    again, other, _ = some_steps(merged=merged, checkpoint=True)
    assert plain == again
    assert all(torch.equal(a, b) for a, b in zip(vpd.parameters(), other.parameters(), strict=True))


def test_activations_computed_again_take_less_memory_until_backward():
    kept = {}
    for checkpoint in (False, True):
        model, saved = tiny_model(dtype=torch.float32), []
        vpd = decomposition_of(model)
        g, sources = draw(4, 6, 72, seed=1).float(), draw(24, 84, seed=2).float()
        with MaskedModel(vpd, model) as masked_model:
            run = BlockedMasks(g, MaskInputs(sources), vpd.site_axis, grad_g=torch.zeros_like(g))
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
            )
            with hooks:
                masked_model.masked(some_tokens(shape=(4, 6)), run, checkpoint=checkpoint)
        kept[checkpoint] = sum(saved)
    assert kept[True] < kept[False] / 4


def test_a_model_that_is_no_stack_of_layers_cannot_compute_its_activations_again():
    from tests.adapters.custom_models import TwoLayers

    model = TwoLayers().float()
    config = VPDConfig(steps=10, batch_size=4, C=5, gamma=GAMMA, output="mse")
    with (
        MaskedModel(new_decomposition(model, config), model) as masked_model,
        pytest.raises(Unsupported, match="checkpoint=False"),
    ):
        Trainer(masked_model, config, (4, 1), execution=ExecutionConfig(checkpoint=True))


@pytest.mark.parametrize("merged", [0.0, 0.5])
def test_bfloat16_products_stay_near_float32_and_everything_kept_is_float32(merged):
    plain, vpd, _ = some_steps(merged=merged)
    lower, other, trainer = some_steps(merged=merged, precision="bfloat16")
    for a, b in zip(plain, lower, strict=True):
        assert a.stochastic != b.stochastic
        for name in ("stochastic", "adversarial", "importance", "l0"):
            assert getattr(b, name) == pytest.approx(getattr(a, name), rel=0.1, abs=5e-3), name
    state = [v for o in trainer.optimizers for s in o.state.values() for v in s.values()]
    assert {t.dtype for t in (*other.parameters(), trainer.sources.values, *state)} == {torch.float32}
    grads = [
        (a.detach() - b.detach()).norm() / a.detach().norm()
        for a, b in zip(vpd.parameters(), other.parameters(), strict=True)
    ]
    assert max(float(g) for g in grads) < 0.05


def test_a_step_with_another_number_of_rows_is_refused():
    model = tiny_model()
    config = VPDConfig(steps=10, batch_size=4, C=5, gamma=GAMMA, faithfulness={"warm_up_steps": 1})
    with MaskedModel(new_decomposition(model, config), model) as masked_model:
        trainer = Trainer(masked_model, config, (4, 6))
        with pytest.raises(
            ValueError, match="takes 4 rows per step, of at most 6 positions, and this batch has 3 rows"
        ):
            trainer.step(some_tokens(shape=(3, 6)))
        assert trainer.done == 0
