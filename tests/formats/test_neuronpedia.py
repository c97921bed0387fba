"""Features of Neuronpedia: every number by hand, every key and type as SAEDashboard writes them."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import VPDConfig, bundled
from tl_vpd.analysis import HarvestConfig
from tl_vpd.formats import NeuronpediaConfig, save_neuronpedia
from tl_vpd.formats import neuronpedia as module
from tl_vpd.toys.tms import TMS
from tl_vpd.training import new_decomposition

TOKENS = some_tokens(seed=2, shape=(4, 7))
SITES = ["blocks.0.attn.W_V", "blocks.1.attn.W_O", "blocks.1.mlp.W_in", "blocks.1.mlp.W_out"]

BATCH = {"model_id": str, "layer": int, "sae_set": str, "sae_id_suffix": type(None), "features": list}
NUMBERS = ("values", "indices", "l1", "pearson", "heights", "dist", "vector")
FEATURE: dict[str, type] = {
    "feature_index": int,
    **{f"neuron_alignment_{c}": list for c in ("indices", "values", "l1")},
    **{f"correlated_{of}_{c}": list for of in ("neurons", "features") for c in ("indices", "l1", "pearson")},
    **{f"{end}_{c}": list for end in ("neg", "pos") for c in ("str", "values")},
    "frac_nonzero": float,
    **{f"{kind}_hist_data_bar_{c}": list for kind in ("freq", "logits") for c in ("values", "heights")},
    "n_prompts_total": int,
    "n_tokens_in_prompt": int,
    "dataset": str,
    "decoder_weights_dist": list,
    "activations": list,
    "vector": list,
}
ACTIVATION = {
    "bin_min": (int, float),
    "bin_max": (int, float),
    "bin_contains": (int, float),
    "tokens": list,
    "values": list,
    "qualifying_token_index": int,
}


def check_schema(batch: dict[str, Any]) -> None:
    """The keys and types of SAEDashboard's ``NeuronpediaDashboardBatch.to_dict``; lists that are read together are as long."""
    for content, schema in [(batch, BATCH), *((feature, FEATURE) for feature in batch["features"])]:
        assert content.keys() == schema.keys()
        assert all(isinstance(content[key], kind) for key, kind in schema.items())
    for feature in batch["features"]:
        for key, value in feature.items():
            if isinstance(value, list) and key != "activations":
                kind = str if key.endswith("_str") else (int, float)
                assert all(isinstance(entry, kind) for entry in value)
        for first, second in (("pos_str", "pos_values"), ("neg_str", "neg_values")):
            assert len(feature[first]) == len(feature[second])
        for kind in ("freq", "logits"):
            assert len(feature[f"{kind}_hist_data_bar_values"]) == len(feature[f"{kind}_hist_data_bar_heights"])
        for activation in feature["activations"]:
            assert activation.keys() == ACTIVATION.keys()
            assert all(isinstance(activation[key], kind) for key, kind in ACTIVATION.items())
            assert len(activation["tokens"]) == len(activation["values"]) > activation["qualifying_token_index"]
            assert max(activation["values"]) == activation["bin_max"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def vpd(model):
    vpd = decomposition_of(model, 6, sites=SITES)
    with torch.no_grad():  # one of W_in and all of W_O are dead
        bias = vpd.site_axis.split_sites(vpd.gamma.unembed.bias)
        bias["blocks.1.mlp.W_in"][2] -= 1000
        bias["blocks.1.attn.W_O"][:] -= 1000
    return vpd


def read(folder):
    """All features by source and index; every file is checked."""
    features = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            batch = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(name))
            check_schema(batch)
            source = f"{batch['layer']}-{batch['sae_set']}"
            assert file.parent == folder / source and batch["model_id"] == "tiny"
            features |= {(source, f["feature_index"]): f for f in batch["features"]}
    return features


def test_every_number_by_hand(model, vpd, tmp_path):
    config = NeuronpediaConfig(
        harvest=HarvestConfig(threshold=0.0, bins=4, windows=2, radius=1), logits=3, dataset="random numbers"
    )
    features = read(save_neuronpedia(vpd, model, TOKENS, tmp_path / "f", model_id="tiny", config=config))
    ci, W_U = vpd.causal_importances(model, TOKENS), model.W_U.detach()
    sources = {"0-w_v-vpd": SITES[0], "1-w_in-vpd": SITES[2], "1-w_out-vpd": SITES[3]}
    alive = {(s, c) for s, site in sources.items() for c in range(6) if float(ci[site][..., c].mean()) > 1e-6}
    assert features.keys() == alive and ("1-w_in-vpd", 2) not in alive and len(alive) > 12
    for (source, c), feature in features.items():
        g = ci[sources[source]][..., c]
        assert feature["frac_nonzero"] == pytest.approx(float((g > 0).double().mean()))
        assert feature["freq_hist_data_bar_values"] == [0.125, 0.375, 0.625, 0.875]
        counts = [int(((g > low / 4) & (g <= (low + 1) / 4)).sum()) for low in range(4)]
        assert feature["freq_hist_data_bar_heights"] == counts and sum(counts) > 0
        assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"]) == (4, 7)
        assert feature["dataset"] == "random numbers"
        best = g.amax(1).sort(descending=True).values[:2]
        assert [a["bin_max"] for a in feature["activations"]] == pytest.approx(best[best > 0].tolist())
        for activation in feature["activations"]:
            tokens, at = [int(t) for t in activation["tokens"]], activation["qualifying_token_index"]
            assert activation["values"][at] == activation["bin_max"] and len(tokens) <= 3
            assert any(
                TOKENS[r, i : i + len(tokens)].tolist() == tokens
                and g[r, i : i + len(tokens)].tolist() == pytest.approx(activation["values"])
                for r in range(4)
                for i in range(7)
            )
        if source != "1-w_out-vpd":
            assert feature["pos_str"] == feature["neg_values"] == feature["logits_hist_data_bar_values"] == []
            continue
        logits = vpd.U["blocks.1.mlp.W_out"][c].detach().double() @ W_U
        order = logits.argsort(descending=True).tolist()
        assert feature["pos_str"] == [str(t) for t in order[:3]]
        assert feature["neg_str"] == [str(t) for t in order[:-4:-1]]
        assert feature["pos_values"] == pytest.approx([float(logits[t]) for t in order[:3]], abs=1e-5)
        assert feature["neg_values"] == pytest.approx([float(logits[t]) for t in order[:-4:-1]], abs=1e-5)
        width = float(logits.max() - logits.min()) / 4
        middles = [float(logits.min()) + width * (i + 0.5) for i in range(4)]
        assert feature["logits_hist_data_bar_values"] == pytest.approx(middles, abs=1e-5)
        heights = feature["logits_hist_data_bar_heights"]
        assert sum(heights) == 11
        assert heights[1] == int(((logits >= middles[1] - width / 2) & (logits < middles[1] + width / 2)).sum())


def test_activations_and_files_of_a_few(model, vpd, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PER_FILE", 2)
    config = NeuronpediaConfig(set_name="mine.2", values="activation")
    folder = save_neuronpedia(vpd, model, TOKENS, tmp_path / "f", model_id="tiny", config=config)
    features, acts = read(folder), vpd.component_acts(model, TOKENS)
    indices = [c for source, c in features if source == "1-w_out-mine.2"]
    files = [json.loads(p.read_text())["features"] for p in sorted((folder / "1-w_out-mine.2").iterdir())]
    assert [[f["feature_index"] for f in file] for file in files] == [indices[:2], indices[2:4], indices[4:]][
        : len(files)
    ]
    for c in indices:
        shown = acts[SITES[3]][..., c] * vpd.U[SITES[3]][c].detach().norm()
        for activation in features["1-w_out-mine.2", c]["activations"]:
            row = next(r for r in range(4) if [str(t) for t in TOKENS[r].tolist()] == activation["tokens"])
            assert activation["values"] == pytest.approx(shown[row].tolist(), abs=1e-5)
            g = vpd.causal_importances(model, TOKENS)[SITES[3]][row, :, c]
            assert activation["qualifying_token_index"] in (g == g.max()).nonzero()[:, 0]


def test_text_of_the_bundled_model(tmp_path):
    model, tokens = bundled.model(), bundled.tokens("validation")[:4]
    vpd = decomposition_of(model, 5, sites=["blocks.1.mlp.W_out"])
    features = read(save_neuronpedia(vpd, model, tokens, tmp_path / "f", model_id="tiny"))
    counts = vpd.causal_importances(model, tokens).concatenated.mean((0, 1)) > 1e-6
    assert len(features) == int(counts.sum())
    text = "".join(next(iter(features.values()))["activations"][0]["tokens"])
    assert text in "".join(model.to_string(row) for row in tokens)
    scores = vpd.U["blocks.1.mlp.W_out"].detach() @ model.W_U
    assert all(f["pos_str"][0] == model.to_string(int(scores[c].argmax())) for (_, c), f in features.items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model_id": "a b"}, ValueError, "model_id='a b': give at most 100 letters and digits"),
        ({"model_id": "a", "attention_mask": torch.zeros(4, 7, dtype=torch.long)}, ValueError, "no real token"),
    ],
)
def test_bad_input_leaves_nothing(model, vpd, tmp_path, options, error, message):
    with pytest.raises(error, match=message) as raised:
        save_neuronpedia(vpd, model, TOKENS, tmp_path / "f", **options)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_configs():
    for options, message in (
        ({"set_name": "a__b"}, "set_name='a__b'"),
        ({"logits": 0}, "logits=0"),
    ):
        with pytest.raises(ValueError, match=message):
            NeuronpediaConfig(**options)


def test_what_cannot_be_a_feature_is_refused(model, tmp_path):
    dead = decomposition_of(model, 3, sites=SITES)
    with torch.no_grad():
        dead.gamma.unembed.bias -= 1000
    with pytest.raises(ValueError, match="No subcomponent is alive on these prompts"):
        save_neuronpedia(dead, model, TOKENS, tmp_path / "f", model_id="tiny")
    toy = TMS(5, 2).build()
    vpd = new_decomposition(toy, VPDConfig(C=2, gamma=dict(kind="per_site_mlps", hidden=2)))
    with pytest.raises(ValueError, match="embed is in no layer, and every source of Neuronpedia is of one"):
        save_neuronpedia(vpd, toy, torch.randn(2, 3, 5), tmp_path / "f", model_id="tiny")
    nan = decomposition_of(model, 3, sites=SITES)
    with torch.no_grad():
        nan.U["blocks.1.mlp.W_out"][0, 0] = float("inf")
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"W_out @ W_U has 11 of 33 entries that are NaN"),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)
        save_neuronpedia(nan, model, TOKENS, tmp_path / "f", model_id="tiny")
    assert list(tmp_path.iterdir()) == []
