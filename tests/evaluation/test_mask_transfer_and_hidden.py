"""Replacement one way and another, and what it does inside, against models with edited weights; on both classes of model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.evaluation import handmade
from tests.marks import needs_bridge, needs_hooked_transformer
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import bundled
from tl_vpd.adapters import adapt
from tl_vpd.evaluation import hidden_errors, mask_transfer, sampled, sparsity_sweep
from tl_vpd.evaluation.hidden import Unexplained, pattern_kl
from tl_vpd.evaluation.sample import Sample
from tl_vpd.losses import kl_divergence


def always_on(vpd: Any, kept: torch.Tensor) -> Any:
    """The same subcomponents important at every token, so that replacing is editing the weights."""
    return lambda sample, rows, inputs: kept.expand(*next(iter(inputs.values())).shape[:2], -1).clone()


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    model = tiny_model(torch.float32)
    vpd = decomposition_of(model, C=10)
    kept = (torch.rand(vpd.site_axis.total, generator=torch.Generator().manual_seed(4)) > 0.3).float()
    return model, vpd, some_tokens(shape=(3, 7)), kept


def edited(model: Any, vpd: Any, kept: torch.Tensor, sites: list[str]) -> Any:
    other = copy.deepcopy(model)
    for name in sites:
        mask = vpd.site_axis.split_sites(kept)[name]
        adapt(other).set_weight(name, (vpd.V[name] * mask) @ vpd.U[name])
    return other


def test_error_propagating_and_single_sites_are_edited_models(setting):
    model, vpd, tokens, kept = setting
    with sampled(vpd, model, tokens, importances=always_on(vpd, kept), batch_size=2) as sample:
        table = mask_transfer(sample)
    with torch.no_grad():
        target = model(tokens).log_softmax(-1)
        whole = kl_divergence(target, edited(model, vpd, kept, list(vpd.sites))(tokens))
        assert table.loc["error-propagating", "kl"] == pytest.approx(float(whole), rel=1e-3)
        single = []
        for name in vpd.sites:
            single.append(float(kl_divergence(target, edited(model, vpd, kept, [name])(tokens))))
            assert table.loc[f"single-site, {name}", "kl"] == pytest.approx(single[-1], rel=1e-3)
    assert table.loc["single-site, mean", "kl"] == pytest.approx(sum(single) / len(single), rel=1e-3)


def test_clean_input_is_every_layer_on_the_targets_residual_stream(setting):
    model, vpd, tokens, kept = setting
    with sampled(vpd, model, tokens, importances=always_on(vpd, kept), batch_size=2) as sample:
        result = mask_transfer(sample, single_sites=False)
    assert list(result.index) == ["error-propagating", "clean-input"]
    other = edited(model, vpd, kept, list(vpd.sites))
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        residual = cache["hook_embed"]  # rotary positions: nothing is added at the start
        for layer, block in enumerate(other.blocks):
            normed = model.blocks[layer].ln1(cache["resid_pre", layer])
            residual = residual + block.attn(normed, normed, normed)
            residual = residual + block.mlp(model.blocks[layer].ln2(cache["resid_mid", layer]))
        expected = kl_divergence(logits.log_softmax(-1), model.unembed(model.ln_final(residual)))
    assert result.loc["clean-input", "kl"] == pytest.approx(float(expected), rel=1e-3)


def test_hidden_errors_are_those_of_the_edited_model(setting):
    model, vpd, tokens, kept = setting
    with sampled(vpd, model, tokens, importances=always_on(vpd, kept), batch_size=2) as sample:
        table = hidden_errors(sample)
    other = edited(model, vpd, kept, list(vpd.sites))
    with torch.no_grad():
        (_, clean), (_, masked) = model.run_with_cache(tokens), other.run_with_cache(tokens)

    def share(name: str, layer: int) -> float:
        y, masked_y = (c[name, layer].double().flatten(0, 1).flatten(1) for c in (clean, masked))
        return float((masked_y - y).square().sum() / (y - y.mean(0)).square().sum())

    for layer in (0, 1):
        assert table.loc[f"blocks.{layer}.attn.W_Q", "error"] == pytest.approx(share("q", layer), rel=1e-3)
        assert table.loc[f"blocks.{layer}.mlp.W_out", "error"] == pytest.approx(share("mlp_out", layer), rel=1e-3)
        assert table.loc[f"blocks.{layer}.hook_resid_post", "error"] == pytest.approx(
            share("resid_post", layer), rel=1e-3
        )
        p, q = (c["pattern", layer].double() for c in (clean, masked))
        kl = torch.where(p > 0, p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log()), 0.0).sum(-1).mean()
        assert table.loc[f"blocks.{layer}.attn.hook_pattern", "error"] == pytest.approx(float(kl), rel=1e-3)
    assert set(table["kind"]) == {"site", "residual", "pattern"}


def test_unexplained_share_and_pattern_kl_by_hand():
    result = Unexplained()
    result.add(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    result.add(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]]))
    assert result.fraction == pytest.approx(0.5)  # error 1, variance 1 + 1 around (1, 1)
    p = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    q = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    half = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    assert_close(pattern_kl(p, q), half.double()[None] / 2, atol=1e-6, rtol=0)
    real = torch.tensor([[False, True]])
    assert_close(pattern_kl(p, q, real), half.double()[None], atol=1e-6, rtol=0)


def test_a_sparsity_sweep_trades_l0_for_distance():
    model = handmade.known_model()
    # Neurons that are on have importance 1 or 0.5 in turn: above 0.5 half of them are lost.
    steps = torch.tensor([1.0, 0.5]).repeat(handmade.NEURONS // 2)
    vpd = handmade.with_importances(model, lambda on: on * steps)
    with sampled(vpd, model, handmade.rows()) as sample:
        table = sparsity_sweep(sample, thresholds=(0.0, 0.5, 0.99))
    assert table.loc[0.0, "kl"] < 1e-5 < table.loc[0.5, "kl"]
    assert table.loc[0.5, "l0"] == table.loc[0.99, "l0"] < table.loc[0.0, "l0"]
    assert table.loc[0.5, "kl"] == pytest.approx(table.loc[0.99, "kl"])
    assert {"ce", "kl_low", "kl_high"} <= set(table.columns)


@needs_bridge
@needs_hooked_transformer
def test_both_classes_of_model_say_the_same():
    vpd, tokens = bundled.decomposition(), bundled.tokens("validation")[:2, :24]
    results = []
    for kind in ("hooked_transformer", "bridge"):
        model = bundled.model(kind=kind)  # type: ignore[arg-type]
        with sampled(vpd, model, tokens) as sample:
            assert isinstance(sample, Sample)
            results.append((mask_transfer(sample, single_sites=False)["kl"], hidden_errors(sample)["error"]))
    for one, other in zip(*results, strict=True):
        assert list(one.index) == list(other.index)
        assert list(one) == pytest.approx(list(other), rel=1e-3, abs=1e-6)
