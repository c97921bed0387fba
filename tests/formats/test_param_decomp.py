"""A run of the authors' own code against its answers, as either class; and everything that can be done with it then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import tl_vpd
from tests.marks import needs_bridge, needs_hooked_transformer
from tl_vpd.adapters import adapt
from tl_vpd.adapters.versions import is_bridge
from tl_vpd.analysis import GraphConfig, PruneConfig
from tl_vpd.evaluation import EvaluationConfig
from tl_vpd.formats import load_param_decomp, save_param_decomp
from tl_vpd.formats.param_decomp import certify
from tl_vpd.formats.param_decomp.gamma import order_index
from tl_vpd.formats.param_decomp.names import module_of, site_of

RELEASED = Path(__file__).parents[1] / "reference" / "data" / "released"
RUN = RELEASED / "p-00000001"
ANSWERS = load_file(RELEASED / "answers.safetensors")
NUMBERS = json.loads((RELEASED / "answers.json").read_text())
TOKENS = ANSWERS["tokens"]
CLASSES = [
    pytest.param("HookedTransformer", marks=needs_hooked_transformer),
    pytest.param("TransformerBridge", marks=needs_bridge),
]


@pytest.fixture(scope="module", params=CLASSES)
def imported(request):
    return load_param_decomp(RUN, request.param, tokens=TOKENS)


def test_logits_importances_and_masked_logits_are_the_answers(imported):
    model, vpd = imported
    assert_close(model(TOKENS), ANSWERS["logits"], atol=2e-5, rtol=0)
    ci = vpd.causal_importances(model, TOKENS)
    names = [key.removeprefix("ci/") for key in ANSWERS if key.startswith("ci/")]
    assert {site_of(name) for name in names} == set(vpd.sites) and len(names) == 12
    for name in names:
        assert_close(ci[site_of(name)], ANSWERS[f"ci/{name}"], atol=1e-5, rtol=0)
    with vpd.attach(model) as attached:
        for mode, key in (("unmasked", "unmasked"), ("ci", "ci_masked"), ("rounded", "rounded")):
            with attached.masked(mode, delta=0.0):
                assert_close(model(TOKENS), ANSWERS[f"logits_{key}"], atol=5e-5, rtol=0)


def test_the_certificate_has_the_answers_numbers_beside_the_runs_own(imported):
    _, vpd = imported
    certificate = vpd.record["certificate"]
    assert certificate["kl_ci"] == pytest.approx(NUMBERS["kl_ci_masked"], abs=1e-5)
    assert certificate["kl_unmasked"] == pytest.approx(NUMBERS["kl_unmasked"], abs=1e-6)
    above = torch.cat([ANSWERS[key] for key in ANSWERS if key.startswith("ci/")], dim=-1)
    assert certificate["l0"] == pytest.approx(float((above > 0.01).sum(-1).float().mean()), abs=0.05)
    assert certificate["alive"] == int((above.mean((0, 1)) > 1e-6).sum()) and certificate["built"] == 560
    assert (above > 0).sum(-1).float().mean() == pytest.approx(NUMBERS["l0"], abs=0.05)
    assert certificate["tokens"] == "given" and certificate["rows"] == 4 and certificate["length"] == 12
    assert certificate["kl_unmasked"] < certificate["kl_stochastic"] < certificate["kl_ci"] < certificate["kl_shuffled"]
    own = certificate["own_metrics"]
    assert own["train/loss/StochasticReconSubsetLoss"] == pytest.approx(0.0921903) and own["step"] == 300
    assert not any("grad_norm" in name or "schedules" in name for name in own)
    source = vpd.record["source"]
    assert (source["run"], source["checkpoint"], source["step"]) == ("p-00000001", "model_300.pth", 300)
    assert source["settings"]["pd"]["steps"] == 300


def test_saved_loaded_attached_evaluated_traced_and_pruned(imported, tmp_path):
    model, vpd = imported
    again = tl_vpd.Decomposition.load(vpd.save(tmp_path / "vpd"))
    assert again.record["certificate"] == vpd.record["certificate"]
    tensors = again.file_tensors()
    assert all(torch.equal(t, tensors[key]) for key, t in vpd.file_tensors().items())
    with again.attach(model):
        _, cache = model.run_with_cache(TOKENS)
        assert cache["q_ci", 1].shape == (4, 12, 24)
    report = tl_vpd.evaluate(again, model, TOKENS, EvaluationConfig(measures=(), budgets=(), controls=False))
    assert report.record["kl"]["ci"] == pytest.approx(NUMBERS["kl_ci_masked"], abs=1e-5)
    assert report.record["kl"]["rounded"] == pytest.approx(NUMBERS["kl_rounded"], abs=1e-5)
    graph = tl_vpd.attribution_graph(again, model, TOKENS[:1], config=GraphConfig(threshold=0.9))
    assert len(graph) > 10 and bool(graph.weight.isfinite().all())
    circuit = tl_vpd.prune(
        again,
        model,
        TOKENS[0],
        int(model(TOKENS[:1])[0, -1].argmax()),
        config=PruneConfig("importances_only", steps=2, adversary_steps=0),
    )
    assert 0 < len(circuit.nodes) < 12 * 560
    adapter, name = adapt(model), "blocks.0.mlp.W_in"
    W = adapter.weight(name).clone()
    adapter.set_weight(name, 1.5 * W)
    with pytest.raises(ValueError, match=name):
        again.attach(model)
    adapter.set_weight(name, W)


def test_compact_masks_as_before_and_is_written_in_the_authors_format(imported, tmp_path):
    model, vpd = imported
    small = vpd.compact(model, TOKENS)
    assert small.site_axis.total < vpd.site_axis.total
    outputs = []
    for decomposition in (vpd, small):
        for mode in ("ci", "rounded"):
            with torch.no_grad(), decomposition.attach(model) as attached, attached.masked(mode, delta=0.0):
                outputs.append(model(TOKENS))
    assert_close(outputs[2], outputs[0], atol=1e-5, rtol=0)
    assert_close(outputs[3], outputs[1], atol=1e-5, rtol=0)
    model_class = "TransformerBridge" if is_bridge(model) else "HookedTransformer"
    _, again = load_param_decomp(save_param_decomp(small, model, tmp_path / "run"), model_class, tokens=TOKENS)
    assert again.counts == small.counts
    for key, tensor in again.file_tensors().items():
        assert torch.equal(tensor, small.file_tensors()[key])


@needs_bridge
@needs_hooked_transformer
def test_hooked_transformer_and_bridge_agree():
    results = []
    for name in ("HookedTransformer", "TransformerBridge"):
        model, vpd = load_param_decomp(RUN, name, tokens=TOKENS)
        with vpd.attach(model) as attached, attached.masked("stochastic", seed=0):
            results.append((model(TOKENS), vpd.causal_importances(model, TOKENS).concatenated))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("model_class", CLASSES)
def test_device_dtype_and_random_numbers(model_class):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model, vpd = load_param_decomp(RUN, model_class, dtype=torch.bfloat16, tokens=TOKENS)
    assert torch.equal(torch.rand(4), expected)
    assert {p.dtype for p in (*model.parameters(), *vpd.parameters())} == {torch.bfloat16}
    assert_close(model(TOKENS).float(), ANSWERS["logits"], atol=0.1, rtol=0)
    precise, _ = load_param_decomp(RUN, model_class, dtype=torch.float64, tokens=TOKENS)
    assert_close(precise(TOKENS).float(), ANSWERS["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("model_class", CLASSES)
def test_without_tokens_the_model_writes_rows_and_a_path_will_do(model_class):
    model, vpd = load_param_decomp(str(RUN / "model_300.pth"), model_class)
    certificate = vpd.record["certificate"]
    assert certificate["tokens"] == "model" and (certificate["rows"], certificate["length"]) == (8, 12)
    assert certificate["kl_ci"] < 0.5 * certificate["kl_shuffled"]
    assert model.tokenizer is None and model.cfg.default_prepend_bos is False


@needs_hooked_transformer
def test_a_gamma_in_another_order_is_noticed():
    model, vpd = load_param_decomp(RUN, tokens=TOKENS)
    right = certify(vpd, model, TOKENS)
    assert not right.order_is_doubtful and right.kl_other_orders["forward"] > right.kl_ci
    modules = [module_of(site) for site in vpd.sites]
    d_in = dict(zip(modules, (s.d_in for s in vpd.sites.values()), strict=True))
    counts = dict(zip(modules, vpd.counts.values(), strict=True))
    # What a file in the order of the forward pass becomes when it is read as a lexicographic one.
    reads, writes = order_index(d_in, modules), order_index(counts, modules)
    with torch.no_grad():
        vpd.gamma.embed.weight.copy_(vpd.gamma.embed.weight[:, reads].clone())
        vpd.gamma.unembed.weight.copy_(vpd.gamma.unembed.weight[writes].clone())
        vpd.gamma.unembed.bias.copy_(vpd.gamma.unembed.bias[writes].clone())
    wrong = certify(vpd, model, TOKENS)
    assert wrong.order_is_doubtful and wrong.kl_ci > 1.3 * right.kl_ci
    assert wrong.kl_other_orders["forward"] == pytest.approx(right.kl_ci, abs=1e-5)
    with torch.no_grad():
        for p in vpd.gamma.parameters():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    assert certify(vpd, model, TOKENS).order_is_doubtful


def test_the_certificates_table_has_the_measured_and_the_runs_own():
    from tl_vpd.formats.param_decomp import Certificate

    certificate = Certificate("given", 1, 2, 0.1, 0.2, 0.3, 0.9, {"forward": 0.5}, 3.0, 4, 5, {"loss": 7.0})
    table = certificate.to_pandas()
    assert table[table.source == "measured"].set_index("metric")["value"].to_dict() == {
        "kl_unmasked": 0.1,
        "kl_ci": 0.2,
        "kl_stochastic": 0.3,
        "kl_shuffled": 0.9,
        "l0": 3.0,
        "alive": 4,
        "built": 5,
    }
    assert table[table.source == "run's own"]["value"].tolist() == [7.0]
