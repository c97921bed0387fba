"""``compare``: figures of perfect replacements, counts by hand, the same distances as other measures, refusals."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from tests.baselines.test_transcoders import exact_transcoders, random_transcoders
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.baselines import Comparison, ComparisonConfig, TrainingCost, compare, transcoder_consistency
from tl_vpd.baselines.comparison.measured import entropy_bits
from tl_vpd.baselines.comparison.replacement import replacement_of
from tl_vpd.baselines.transcoders.transcoders import Transcoder, Transcoders
from tl_vpd.evaluation import mask_transfer, sampled
from tl_vpd.evaluation.batch import Rows
from tl_vpd.viz import comparison_page

MLPS = ("*.mlp.*",)
NO_ATTACK = ComparisonConfig(budgets=())


@pytest.fixture(scope="module")
def relu():
    """A model whose MLPs are ReLUs between two matrices, without a norm."""
    return tiny_model(normalization_type=None, act_fn="relu")


@pytest.fixture(scope="module")
def vpd(relu):
    return decomposition_of(relu).to(torch.float64)


@pytest.fixture(scope="module")
def tokens():
    return some_tokens(shape=(5, 7))


@pytest.fixture(scope="module")
def result(relu, vpd, tokens):
    transcoders = {
        "exact": exact_transcoders(relu),
        "plt": random_transcoders(skip=True),
        "clt": random_transcoders(cross_layer=True),
    }
    config = ComparisonConfig(thresholds=(0.0, 0.5), budgets=(3,), attack_rows=2)
    costs = {"vpd": TrainingCost(flops=1e9)}
    return compare(relu, tokens, {"vpd": vpd, **transcoders}, config, costs=costs)


def test_every_way_costs_nothing_where_latents_are_neurons(result):
    table = result.to_pandas("replacement").set_index("artefact").loc["exact"]
    assert list(table["replaced"]) == [
        "error-propagating",
        "clean-input",
        "single-layer",
        "single-layer, 0",
        "single-layer, 1",
    ]
    assert table[["kl", "kl_low", "kl_high", "ce_increase"]].abs().max(axis=None) < 1e-12
    row = result.to_pandas().set_index("artefact").loc["exact"]
    assert row["pgd_3"] == pytest.approx(0, abs=1e-12)  # nothing is active below a ReLU's threshold
    assert result.zero["kl"] > 0.01


def test_decompositions_have_the_distances_of_mask_transfer(relu, result, tokens):
    mlps = decomposition_of(relu, sites=MLPS).to(torch.float64)
    summary = compare(relu, tokens, {"mlps": mlps}, NO_ATTACK).to_pandas().iloc[0]
    with sampled(mlps, relu, tokens) as sample:
        expected = mask_transfer(sample, single_sites=False)
    for way, prefix in (("error-propagating", ""), ("clean-input", "clean_input_")):
        assert summary[f"{prefix}kl"] == pytest.approx(expected.loc[way, "kl"], rel=1e-9)
        assert summary[f"{prefix}kl_low"] == pytest.approx(expected.loc[way, "kl_low"], rel=1e-9)
    increase = expected.loc["error-propagating", "ce"] - result.target_ce
    assert summary["ce_increase"] == pytest.approx(increase, rel=1e-9)


def test_of_a_whole_decomposition_the_mlps_alone_are_masked(relu, vpd, result, tokens):
    kls = []
    with sampled(vpd, relu, tokens) as sample:
        masks = {name: (g > 0.5).double() for name, g in sample.site_axis.split_sites(next(sample.batches()).g).items()}
        hooks = {name: m for name, m in masks.items() if ".mlp." in name}
    clean = relu(tokens).log_softmax(-1)
    with vpd.attach(relu), torch.no_grad():
        hooked = relu.run_with_hooks(
            tokens, fwd_hooks=vpd.mask_hooks(hooks) + vpd.delta_hooks(0.0, sites=MLPS)
        ).log_softmax(-1)
    kls = (clean.exp() * (clean - hooked)).sum(-1).mean()
    row = result.to_pandas().set_index(["artefact", "threshold"]).loc[("vpd", 0.5)]
    assert row["kl"] == pytest.approx(float(kls.detach()), rel=1e-9)


def test_counts_by_hand(relu, vpd, result, tokens):
    summary = result.to_pandas()
    with sampled(vpd, relu, tokens) as sample:
        by_site = sample.site_axis.split_sites(next(sample.batches()).g)
    on = torch.cat([g for name, g in by_site.items() if ".mlp." in name], dim=-1) > 0.5
    row = summary[(summary["artefact"] == "vpd") & (summary["threshold"] == 0.5)].iloc[0]
    l0 = float(on.sum(-1).double().mean())
    alive = int(on.flatten(0, 1).any(0).sum())
    f = on.flatten(0, 1).double().mean(0)
    entropy = sum(-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in f.tolist() if 0 < p < 1)
    assert (row["built"], row["alive"], row["dead"]) == (24, alive, 24 - alive)
    assert row["l0"] == pytest.approx(l0) and row["per_module"] == pytest.approx(l0 / 4)
    assert row["per_mlp"] == pytest.approx(l0 / 2) and row["parameters"] == pytest.approx(l0 * (8 + 12))
    assert row["index_bits"] == pytest.approx(l0 * math.log2(alive))
    assert row["entropy_bits"] == pytest.approx(entropy) == pytest.approx(entropy_bits(f))
    assert row["flops"] == 1e9 and math.isnan(row["seconds"])
    modules = result.to_pandas("modules").set_index(["artefact", "module"])
    first, second = (float(modules.loc[("clt", f"blocks.{i}.mlp"), "l0"]) for i in (0, 1))
    clt = summary.set_index("artefact").loc["clt"]
    assert clt["per_mlp"] == pytest.approx((first + first + second) / 2)  # layer 0's latents write to both MLPs
    assert clt["parameters"] == pytest.approx(first * (8 + 2 * 8) + second * (8 + 8))
    plt = summary.set_index("artefact").loc["plt"]
    assert plt["parameters"] == pytest.approx(plt["l0"] * 16 + 2 * 64)
    assert list(summary["kind"]) == [
        "parameter decomposition",
        "parameter decomposition",
        "per-layer transcoders",
        "per-layer transcoders",
        "cross-layer transcoders",
    ]


@pytest.mark.parametrize("kind", ["vpd", "transcoders"])
def test_attacks_start_at_the_plain_output_and_end_at_everything_on(relu, vpd, tokens, kind):
    artefact = vpd if kind == "vpd" else random_transcoders()
    rows = Rows(tokens, None, list(range(5)))
    with replacement_of(artefact, relu, rows, 0.0, batch_size=5, seed=0) as on:
        batch = on.batch(rows)
        zeros = torch.zeros(1, 1, on.n_sources)
        assert torch.equal(on.attacked(batch, zeros), on.output(batch, clean_input=False))
        everything = on.attacked(batch, zeros + 1)
        if kind == "vpd":  # with Δ: the model itself
            torch.testing.assert_close(everything, relu(tokens))
        else:
            relus = copy.deepcopy(artefact)
            for layer in (0, 1):
                relus[layer].threshold.zero_()
            torch.testing.assert_close(everything, on.replaced.error_propagating(relus, tokens))


def doubled(one):
    """A transcoder with each latent twice, each with half of its decoder."""
    W_enc, W_dec = torch.cat([one.W_enc] * 2, dim=1), torch.cat([one.W_dec / 2] * 2, dim=1)
    return Transcoder(W_enc, one.b_enc.repeat(2), W_dec, one.b_dec, one.threshold.repeat(2))


def test_seeds_and_sizes_of_a_method_are_measured_together(relu, vpd, tokens):
    plts = {f"plt {seed}": random_transcoders(seed=seed) for seed in range(3)}
    double = Transcoders({layer: doubled(plts["plt 0"][layer]) for layer in (0, 1)})
    artefacts = {"vpd": vpd, **plts, "twice": double}
    names = {"twice": "plt", **dict.fromkeys(plts, "plt")}
    result = compare(relu, tokens, artefacts, ComparisonConfig(budgets=(2,)), methods=names)
    summary, table = (result.to_pandas(name).set_index("method") for name in ("summary", "methods"))
    assert list(table.index) == ["parameter decomposition", "plt", "plt"]
    small, large = table.loc["plt"].iloc[0], table.loc["plt"].iloc[1]
    of_seeds = summary.loc["plt"].iloc[:3]
    assert (small["artefacts"], large["artefacts"]) == (3, 1) and large["built"] == 2 * small["built"]
    for column in ("kl", "pgd_2", "alive", "index_bits"):
        values = of_seeds[column].astype(float)
        expected = [values.mean(), values.min(), values.max()]
        assert list(small[[column, f"{column}_low", f"{column}_high"]]) == pytest.approx(expected)
    assert small["alive_growth"] == 1 and large["alive"] == 2 * int(summary.loc["plt"].iloc[0]["alive"])
    assert large["alive_growth"] == pytest.approx(large["alive"] / small["alive"])
    alive = []
    for plt in plts.values():
        rows = Rows(tokens, None, list(range(5)))
        with replacement_of(plt, relu, rows, float("nan"), batch_size=5, seed=0) as on:
            fires = on.axis.split_sites(on.batch(rows).g.flatten(0, 1).any(0))
            alive.append({layer: fires[f"blocks.{layer}.mlp"] for layer in (0, 1)})
    pairs = [
        transcoder_consistency(plts[f"plt {i}"], plts[f"plt {j}"], alive=(alive[i], alive[j])).loc["mean"]
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    for name in ("V", "U", "rank_one", "V_random"):
        assert small[name] == pytest.approx(sum(pair[name] for pair in pairs) / 3)
    assert math.isnan(large["V"]) and math.isnan(table.loc["parameter decomposition", "U"])


def test_what_was_trained_in_one_way_is_measured_against_the_others(relu, vpd, tokens):
    cascading = random_transcoders()
    cascading.record["config"] = {"loss": "cascading"}
    summary = compare(relu, tokens, {"vpd": vpd, "e2e": cascading, "raw": random_transcoders()}, NO_ATTACK).to_pandas()
    assert list(summary["trained_in"]) == ["error-propagating", "error-propagating", "unknown"]
    assert list(summary["method"])[1:] == ["per-layer transcoders, error-propagating", "per-layer transcoders"]
    others = summary[["clean_input_kl", "single_layer_kl"]].max(axis=1)
    assert summary["mismatch"][:2].tolist() == pytest.approx((others / summary["kl"])[:2].tolist())
    assert math.isnan(summary["mismatch"][2])


def test_attacks_do_more_harm_than_nothing(result):
    summary = result.to_pandas()
    attacks = result.to_pandas("attacks")
    assert list(attacks["tokens"]) == [14] * 5 and set(attacks["step_size"]) == {2 / 3}
    random = summary["artefact"].isin(["plt", "clt"])
    assert (summary["pgd_3"][random] > 0).all() and (summary["pgd_3_low"] <= summary["pgd_3"]).all()


def test_figures_do_not_depend_on_the_batch_size_or_on_padding(relu, vpd, tokens):
    artefacts = {"vpd": vpd, "clt": random_transcoders(cross_layer=True)}
    config = ComparisonConfig(budgets=(2,))
    one = compare(relu, tokens, artefacts, config).to_pandas()
    other = compare(relu, tokens, artefacts, replace(config, batch_size=2)).to_pandas()
    numbers = [c for c in one.select_dtypes("number") if c not in ("flops", "seconds")]
    assert ((one[numbers] - other[numbers]).abs().fillna(0) < 1e-8).all(axis=None)


def test_the_model_is_left_as_it_was(relu, vpd, tokens):
    before, grads = {n: id(m) for n, m in relu.named_modules()}, [p.requires_grad for p in relu.parameters()]
    transcoders = random_transcoders().requires_grad_(True)
    compare(relu, tokens, {"vpd": vpd, "t": transcoders}, ComparisonConfig(budgets=(1,)))
    assert {n: id(m) for n, m in relu.named_modules()} == before
    assert [p.requires_grad for p in relu.parameters()] == grads and all(p.grad is None for p in relu.parameters())
    assert all(p.grad is None for p in (*vpd.parameters(), *transcoders.parameters()))


def test_results_are_saved_and_loaded_and_shown(result, tmp_path):
    loaded = Comparison.load(result.save(tmp_path / "comparison.json"))
    assert loaded.target_ce == result.target_ce and loaded.layers == (0, 1) and loaded.tokens == 35
    for name in ("summary", "methods", "replacement", "modules", "attacks"):
        one, other = result.to_pandas(name), loaded.to_pandas(name)
        assert list(one.columns) == list(other.columns) and len(one) == len(other)
    assert loaded.top(1)["artefact"].tolist() == ["exact"]
    page = comparison_page(loaded, tmp_path / "page.html").read_text()
    assert page.count("<svg") >= 1 and "cross-layer transcoders" in page
    with pytest.raises(ValueError, match="choose from"):
        result.to_pandas("modes")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a comparison"):
        Comparison.load(tmp_path / "other.json")


def test_what_cannot_be_compared_is_refused(relu, vpd, tokens):
    with pytest.raises(ValueError, match=r"'a' replaces the MLPs of layers \[0, 1\] and 'b' those of \[1\]"):
        compare(relu, tokens, {"a": vpd, "b": random_transcoders(layers=(1,))})
    with pytest.raises(ValueError, match=r"artefacts=\{\}: give at least one by name\."):
        compare(relu, tokens, {})
    with pytest.raises(ValueError, match="replaces no MLP"):
        compare(relu, tokens, {"a": decomposition_of(relu, sites=("*.attn.*",))})
    with pytest.raises(ValueError, match=r"'a' does not decompose blocks\.0\.mlp\.W_out, and artefacts"):
        compare(relu, tokens, {"a": decomposition_of(relu, sites=("*.W_in", "blocks.1.mlp.W_out"))})
    with pytest.raises(KeyError, match="costs names 'b', which is not among the artefacts: a"):
        compare(relu, tokens, {"a": vpd}, costs={"b": TrainingCost(flops=1.0)})
    with pytest.raises(KeyError, match="methods names 'b', which is not among the artefacts: a"):
        compare(relu, tokens, {"a": vpd}, methods={"b": "plt"})
    with pytest.raises(ValueError, match=r"thresholds=\(\): give at least one\."):
        ComparisonConfig(thresholds=())
    with pytest.raises(ValueError, match="flops=-1"):
        TrainingCost(flops=-1.0)
