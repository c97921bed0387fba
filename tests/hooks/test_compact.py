"""``compact``: what is never important is dropped, and what agrees afterwards, to what precision."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from typer.testing import CliRunner

from tests.marks import needs_bridge
from tests.tiny import decomposition_of, draw, edited, some_tokens, tiny_model
from tl_vpd import Decomposition, bundled
from tl_vpd.cli import app
from tl_vpd.masking import SiteMask

TOKENS = some_tokens(seed=3, shape=(5, 7))
SITES = ["blocks.0.attn.W_V", "blocks.0.mlp.W_in", "blocks.1.attn.W_O", "blocks.1.mlp.W_out"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def vpd(model):
    vpd = decomposition_of(model, 9, sites=SITES).double()
    with torch.no_grad():  # a third are never important; of W_O all, of which number 4 is nearest to it
        vpd.gamma.unembed.bias[::3] -= 1000
        bias = vpd.site_axis.split_sites(vpd.gamma.unembed.bias)["blocks.1.attn.W_O"]
        bias -= 2000
        bias[4] += 500
    return vpd


@pytest.fixture(scope="module")
def small(model, vpd):
    with pytest.warns(
        UserWarning, match=r"No subcomponent of blocks\.1\.attn\.W_O has an importance above 0 on these 35"
    ):
        return vpd.compact(model, TOKENS, batch_size=2)


@pytest.fixture(scope="module")
def indices(small):
    return {name: torch.tensor(index) for name, index in small.record["compact"][0]["indices"].items()}


def test_those_never_important_are_dropped(model, vpd, small):
    g = vpd.causal_importances(model, TOKENS)
    (entry,) = small.record["compact"]
    for name in SITES:
        alive = (g[name].flatten(0, 1).amax(0) > 0).nonzero()[:, 0].tolist()
        assert entry["indices"][name] == (alive or [4])
    assert 0 < small.counts["blocks.0.mlp.W_in"] < 9 and small.counts["blocks.1.attn.W_O"] == 1
    assert (entry["threshold"], entry["rows"], entry["tokens"]) == (0.0, 5, 35)
    assert (entry["before"], entry["after"], entry["below"]) == (vpd.counts, small.counts, ["blocks.1.attn.W_O"])
    assert "compact" not in vpd.record


def test_the_clean_output_is_the_same_to_the_bit(model, small):
    clean = model(TOKENS)
    with torch.no_grad(), small.attach(model):
        logits, cache = model.run_with_cache(TOKENS)
        assert torch.equal(logits, clean) and cache["in_ci", 0].shape[-1] == small.counts["blocks.0.mlp.W_in"]


def test_importances_and_activations_are_the_same(model, vpd, small, indices):
    other = some_tokens(seed=8)
    for results in (
        (vpd.causal_importances(model, other), small.causal_importances(model, other)),
        (vpd.component_acts(model, other), small.component_acts(model, other)),
    ):
        for name in SITES:
            assert_close(results[1][name], results[0][name][..., indices[name]], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["rounded", "ci", "zero"])
def test_masks_of_0_with_delta_off_are_the_same_on_these_prompts(model, vpd, small, mode):
    options = {"threshold": 0.2} if mode == "rounded" else {}
    outputs = []
    for decomposition in (vpd, small):
        with torch.no_grad(), decomposition.attach(model) as attached, attached.masked(mode, delta=0, **options):
            outputs.append(model(TOKENS))
    assert_close(outputs[1], outputs[0], rtol=0, atol=1e-10)
    assert not torch.allclose(outputs[0], model(TOKENS), atol=0.1)


def test_dropped_ones_have_the_factor_of_delta(model, vpd, small, indices):
    """Any masks, with Δ's factor for the dropped ones, on any prompt; also against a model whose weights were edited."""
    other, factor = some_tokens(seed=8), 0.3
    few = {name: draw(small.counts[name], seed=i) for i, name in enumerate(SITES)}
    all_ = {
        name: torch.full((9,), factor, dtype=torch.float64).index_copy(0, indices[name], few[name]) for name in SITES
    }
    expected = edited(model, vpd, {name: (mask, factor) for name, mask in all_.items()})(other)
    for decomposition, masks in ((vpd, all_), (small, few)):
        given = {
            n: SiteMask(m.expand(2, 7, -1), torch.full((2, 7), factor, dtype=torch.float64)) for n, m in masks.items()
        }
        with torch.no_grad(), decomposition.attach(model):
            logits = model.run_with_hooks(other, fwd_hooks=decomposition.mask_hooks(given))
        assert_close(logits, expected, rtol=0, atol=1e-10)


def test_ablations_are_the_same_by_old_and_new_address(model, vpd, small):
    table = small.original_addresses()
    rows = [table[table.subcomponent.str.startswith(site)].iloc[0] for site in SITES]
    outputs = []
    for decomposition, column in ((vpd, "original"), (small, "subcomponent")):
        with torch.no_grad(), decomposition.attach(model):
            hooks = decomposition.ablation_hooks([row[column] for row in rows], pos=[2])
            outputs.append(model.run_with_hooks(TOKENS, fwd_hooks=hooks))
    assert_close(outputs[1], outputs[0], rtol=0, atol=1e-10)
    assert not torch.allclose(outputs[0], model(TOKENS), atol=1e-3)


def test_twice_leads_back_to_the_first_addresses_also_from_disk(model, vpd, small, tmp_path):
    with pytest.warns(UserWarning, match="No subcomponent of"):
        twice = small.compact(model, TOKENS[:1], threshold=0.5)
    assert sum(twice.counts.values()) < sum(small.counts.values())
    again = Decomposition.load(twice.save(tmp_path / "vpd"), dtype=torch.float64)
    table = again.original_addresses()
    for new, old in table.itertuples(index=False):
        site, index = new.rsplit(":", 1)
        first = int(old.rsplit(":", 1)[1])
        assert old.startswith(f"{site}:") and torch.equal(again.V[site][:, int(index)], vpd.V[site][:, first])
    assert len(table) == again.site_axis.total and [e["threshold"] for e in again.record["compact"]] == [0, 0.5]
    again.record["compact"][0]["indices"]["blocks.0.mlp.W_in"] = []
    with pytest.raises(
        ValueError, match=r"does not have the former index of every subcomponent of blocks\.0\.mlp\.W_in"
    ):
        again.original_addresses()
    assert vpd.original_addresses().eval("subcomponent == original").all()


def test_padding_does_not_make_a_subcomponent_important(model, vpd):
    mask = torch.ones_like(TOKENS)
    mask[0, 4:] = 0
    rows = [TOKENS[:1, :4], TOKENS[1:]]
    with pytest.warns(UserWarning, match="on these 32 tokens"):
        padded = vpd.compact(model, TOKENS, attention_mask=mask)
    largest = torch.stack([vpd.causal_importances(model, r).concatenated.flatten(0, 1).amax(0) for r in rows]).amax(0)
    for name, g in vpd.site_axis.split_sites(largest).items():
        assert padded.record["compact"][0]["indices"][name] == ((g > 0).nonzero()[:, 0].tolist() or [4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold=1\.5: importances are in \[0, 1\]"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"attention_mask": torch.zeros(5, 7)}, "no real token"),
    ],
)
def test_bad_input(model, vpd, options, message):
    with pytest.raises(ValueError, match=message):
        vpd.compact(model, TOKENS, **options)


def test_values_that_are_undefined_are_refused(model):
    vpd = decomposition_of(model, 3, sites=SITES)
    with torch.no_grad():
        vpd.gamma.unembed.bias[4] = float("nan")
    with pytest.raises(
        ValueError, match=r"NaN or infinite values for 1 of 12 subcomponents, the first is blocks\.0\.mlp"
    ):
        vpd.compact(model, TOKENS)


def test_the_bundled_one_keeps_its_behaviour():
    model, vpd, tokens = bundled.model(), bundled.decomposition(), bundled.tokens("validation")[:16]
    small = vpd.compact(model, tokens)
    assert small.site_axis.total < vpd.site_axis.total
    outputs = []
    for decomposition in (vpd, small):
        with torch.no_grad(), decomposition.attach(model) as attached, attached.masked("ci"):
            outputs.append(model(tokens).log_softmax(-1))
    assert_close(outputs[1], outputs[0], rtol=0, atol=1e-4)


@needs_bridge
def test_a_bridge_drops_the_same():
    vpd, tokens = bundled.decomposition(), bundled.tokens("validation")[:8]
    counts = [vpd.compact(bundled.model(kind=kind), tokens).record["compact"] for kind in ("bridge", None)]
    assert counts[0] == counts[1]


def test_the_command_writes_a_new_folder(tmp_path):
    arguments = ["compact", "bundled", "--rows", "16", "--key", "validation", "--out", str(tmp_path / "small")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    small = Decomposition.load(tmp_path / "small")
    assert small.counts == small.record["compact"][0]["after"] and small.record["compact"][0]["rows"] == 16
    before = bundled.decomposition().site_axis.total
    assert f"{before} -> {small.site_axis.total} subcomponents.  Written: {tmp_path / 'small'}" in result.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "small is not an empty folder: give the path of a new one." in again.output
