"""Transcoders and SAEs of other tools: files as those tools lay them out, read against independent forwards; round trips."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.baselines.test_transcoders import random_transcoders
from tests.tiny import some_tokens, tiny_model
from tl_vpd.baselines import ReplacedModel, calibrate
from tl_vpd.formats import (
    load_circuit_tracer_transcoders,
    load_paper_transcoders,
    load_saelens,
    save_circuit_tracer_transcoders,
    save_saelens,
)

D, N = 8, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(one, other):
    names, others = dict(one.named_parameters()), dict(other.named_parameters())
    return names.keys() == others.keys() and all(torch.equal(names[n], others[n]) for n in names)


# -- SAELens -----------------------------------------------------------------------------------------------------------


def saelens_folder(folder, architecture, hook="mlp.hook_in", *, layer=1, **settings):
    """As SAELens writes it; returns the tensors."""
    tensors = {"W_enc": draw(D, N), "b_enc": draw(N, seed=1), "W_dec": draw(N, D, seed=2), "b_dec": draw(D, seed=3)}
    if architecture.startswith("jumprelu"):
        tensors["threshold"] = draw(N, seed=4).abs()
    if "skip" in architecture:
        tensors["W_skip"] = draw(D, D, seed=5)
    metadata = {"hook_name": f"blocks.{layer}.{hook}"}
    if "transcoder" in architecture:
        metadata["hook_name_out"] = f"blocks.{layer}.hook_mlp_out"
    config = {"architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float64", "metadata": metadata, **settings}
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_transcoders_of_saelens(tmp_path, architecture):
    t = saelens_folder(tmp_path / "one", architecture)
    transcoders, x = load_saelens([tmp_path / "one"]), draw(3, D, seed=9)
    assert transcoders.layers == [1] and transcoders.reads == "mlp_in"
    z = x @ t["W_enc"] + t["b_enc"]
    acts = z.relu() * (z > t.get("threshold", torch.zeros(N)))
    y = acts @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if "skip" in architecture else 0)
    torch.testing.assert_close(transcoders.decode(1, {1: transcoders.encode(1, x)}, x), y)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("off_input", [True, False])
def test_saes_of_saelens(tmp_path, architecture, off_input):
    t = saelens_folder(tmp_path / "one", architecture, "hook_mlp_out", apply_b_dec_to_input=off_input)
    sae, y = load_saelens([tmp_path / "one"]), draw(3, D, seed=9)
    z = (y - t["b_dec"] * off_input) @ t["W_enc"] + t["b_enc"]
    acts = z.relu() * (z > t.get("threshold", torch.zeros(N)))
    assert sae.reads == "mlp_out"
    torch.testing.assert_close(sae.decode(1, {1: sae.encode(1, y)}, y), acts @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("options", [{}, {"skip": True}, {"reads": "mlp_out"}])
def test_what_is_written_for_saelens_is_read(tmp_path, options):
    transcoders = random_transcoders(**options)
    folder = save_saelens(transcoders, tmp_path / "s")
    loaded = load_saelens([folder / "blocks.0", folder / "blocks.1"])
    assert same(loaded, transcoders) and loaded.reads == transcoders.reads


def test_transcoders_of_a_normalised_stream_need_folded_norms(tmp_path):
    saelens_folder(tmp_path / "one", "transcoder", "ln2.hook_normalized")
    transcoders = load_saelens([tmp_path / "one"])
    with pytest.raises(ValueError, match=r"load the model with fold_ln=True\."):
        ReplacedModel(tiny_model()).check(transcoders)
    ReplacedModel(tiny_model(normalization_type="LNPre")).check(transcoders)


@pytest.mark.parametrize(
    ("architecture", "hook", "settings", "message"),
    [
        ("topk", "hook_mlp_out", {}, "the architecture 'topk' is not read"),
        ("standard", "hook_resid_post", {}, "writes to 'hook_resid_post'"),
        ("transcoder", "hook_resid_mid", {}, "reads 'hook_resid_mid'"),
        ("transcoder", "mlp.hook_in", {"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ("transcoder", "mlp.hook_in", {"metadata": {"hook_name": "ln_final"}}, "the hook 'ln_final' is not of a block"),
    ],
)
def test_other_things_of_saelens_are_refused(tmp_path, architecture, hook, settings, message):
    saelens_folder(tmp_path / "one", architecture, hook, **settings)
    with pytest.raises(ValueError, match=message):
        load_saelens([tmp_path / "one"])


def test_saelens_has_no_cross_layer_transcoders(tmp_path):
    with pytest.raises(ValueError, match="SAELens has no cross-layer transcoders"):
        save_saelens(random_transcoders(cross_layer=True), tmp_path)
    saelens_folder(tmp_path / "one", "transcoder")
    with pytest.raises(ValueError, match="give one for each layer"):
        load_saelens([tmp_path / "one", tmp_path / "one"])
    with pytest.raises(FileNotFoundError):
        load_saelens([tmp_path / "two"])


# -- circuit-tracer ----------------------------------------------------------------------------------------------------


def write_config(folder, kind, **settings):
    folder.mkdir()
    config = {"model_name": "m", "model_kind": kind, "feature_input_hook": "mlp.hook_in"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "feature_output_hook": "mlp.hook_out", **settings}))


def test_a_transcoder_set_of_circuit_tracer(tmp_path):
    write_config(tmp_path / "set", "transcoder_set")
    files = []
    for i in range(2):
        t = {"W_enc": draw(N, D, seed=i), "b_enc": draw(N, seed=2), "W_dec": draw(N, D, seed=3), "b_dec": draw(D)}
        t |= {"activation_function.threshold": draw(N, seed=5).abs(), "W_skip": draw(D, D, seed=6)}
        save_file(t, tmp_path / "set" / f"layer_{i}.safetensors")
        files.append(t)
    transcoders, x = load_circuit_tracer_transcoders(tmp_path / "set"), draw(4, D, seed=7)
    for i, t in enumerate(files):
        z = torch.nn.functional.linear(x, t["W_enc"], t["b_enc"])
        acts = z * (z > t["activation_function.threshold"])
        y = acts @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"].T
        torch.testing.assert_close(transcoders.decode(i, {i: transcoders.encode(i, x)}, x), y)
    again = save_circuit_tracer_transcoders(transcoders, tmp_path / "again", model_name="m")
    for i, t in enumerate(files):
        written = load_file(again / f"layer_{i}.safetensors")
        assert written.keys() == t.keys() and all(torch.equal(written[name], t[name]) for name in t)


def test_cross_layer_transcoders_of_circuit_tracer(tmp_path):
    write_config(tmp_path / "clt", "cross_layer_transcoder")
    W_enc, W_dec = [draw(N, D, seed=i) for i in range(3)], [draw(N, 3 - i, D, seed=9 + i) for i in range(3)]
    b_enc, b_dec, threshold = draw(3, N, seed=4), draw(3, D, seed=5), draw(3, N, seed=6).abs()
    for i in range(3):
        encoder = {f"W_enc_{i}": W_enc[i], f"b_enc_{i}": b_enc[i], f"b_dec_{i}": b_dec[i]}
        save_file({**encoder, f"threshold_{i}": threshold[i]}, tmp_path / "clt" / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": W_dec[i]}, tmp_path / "clt" / f"W_dec_{i}.safetensors")
    transcoders, x = load_circuit_tracer_transcoders(tmp_path / "clt"), draw(3, 4, D, seed=7)
    z = torch.einsum("lbd,lfd->lbf", x, torch.stack(W_enc)) + b_enc[:, None]
    acts = z * (z > threshold[:, None])
    encoded = {i: transcoders.encode(i, x[i]) for i in range(3)}
    for j in range(3):
        y = b_dec[j] + sum(acts[i] @ W_dec[i][:, j - i] for i in range(j + 1))
        torch.testing.assert_close(transcoders.decode(j, encoded, x[j]), y)
    again = save_circuit_tracer_transcoders(transcoders, tmp_path / "again", model_name="m", scan="s")
    assert same(load_circuit_tracer_transcoders(again), transcoders)
    assert load_file(again / "W_dec_0.safetensors")["W_dec_0"].shape == (N, 3, D)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_kind": "sae"}, "model_kind is 'sae'"),
        ({"feature_input_hook": "hook_resid_mid"}, "reads 'hook_resid_mid'"),
        ({"feature_output_hook": "hook_resid_post"}, "writes to 'hook_resid_post'"),
        ({"activation": "topk"}, "activation='topk' is not read"),
        ({"transcoders": ["hf://a/b/c.safetensors"]}, "on the Hub"),
    ],
)
def test_other_things_of_circuit_tracer_are_refused(tmp_path, settings, message):
    write_config(tmp_path / "set", **{"kind": "transcoder_set", **settings})
    save_file({"W_enc": draw(N, D)}, tmp_path / "set" / "layer_0.safetensors")
    with pytest.raises(ValueError, match=message):
        load_circuit_tracer_transcoders(tmp_path / "set")


def test_what_circuit_tracer_cannot_load_is_not_written(tmp_path):
    for transcoders, message in (
        (random_transcoders(layers=(1,)), "every layer from 0 on"),
        (random_transcoders(reads="mlp_out"), "SAEs are not in the format"),
        (random_transcoders(cross_layer=True, skip=True), "no skip connection there"),
        (random_transcoders(threshold=float("nan")), "calibrate"),
    ):
        with pytest.raises(ValueError, match=message):
            save_circuit_tracer_transcoders(transcoders, tmp_path / "x", model_name="m")
    assert not (tmp_path / "x").exists()


# -- the paper's -------------------------------------------------------------------------------------------------------


def paper_folder(folder, tensors, **settings):
    folder.mkdir()
    torch.save(tensors, folder / "encoder.pt")
    config = {"input_size": D, "output_size": D, "dict_size": N, "encoder_type": "batchtopk", "top_k": 2, **settings}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "torch.float64", "num_tokens": 500}))


def test_the_papers_batch_top_k_transcoders_are_calibrated_to_its_k(tmp_path):
    t = {"W_enc": draw(D, N), "b_enc": draw(N, seed=1), "W_dec": draw(N, D, seed=2), "b_dec": draw(D, seed=3)}
    for i in range(2):
        paper_folder(tmp_path / f"layer{i}", t)
    transcoders = load_paper_transcoders({i: tmp_path / f"layer{i}" for i in range(2)})
    assert transcoders.record == {"k": 2, "tokens": 500} and not transcoders.calibrated
    model, tokens = tiny_model(), some_tokens(shape=(4, 9))
    ready = calibrate(transcoders, model, tokens, float(transcoders.record["k"]))
    with ReplacedModel(model) as replaced:
        x = replaced.clean(tokens).inputs[0]
    z = (x @ t["W_enc"] + t["b_enc"]).relu()
    kept = z.flatten().topk(2 * 36)
    selected = torch.zeros_like(z.flatten()).scatter(0, kept.indices, kept.values).view_as(z)
    assert torch.equal(ready.encode(0, x), selected)  # all rows are one batch


def test_the_papers_cross_layer_transcoders(tmp_path):
    tensors = {}
    for i in range(2):
        tensors |= {f"W_enc.{i}": draw(D, N, seed=i), f"b_enc.{i}": draw(N), f"b_dec.{i}": draw(D, seed=i)}
        tensors |= {f"W_dec.{i}": draw(2 - i, N, D, seed=5), f"jumprelu_log_thresholds.{i}": draw(N, seed=8)}
    paper_folder(tmp_path / "clt", tensors, layers="[0, 1]", encoder_type="jumprelu")
    transcoders, x = load_paper_transcoders(tmp_path / "clt"), draw(2, 4, D, seed=7)
    acts = []
    for i in range(2):
        z = (x[i] @ tensors[f"W_enc.{i}"] + tensors[f"b_enc.{i}"]).relu()
        acts.append(z * (z > tensors[f"jumprelu_log_thresholds.{i}"].exp()))
    y = tensors["b_dec.1"] + acts[0] @ tensors["W_dec.0"][1] + acts[1] @ tensors["W_dec.1"][0]
    encoded = {i: transcoders.encode(i, x[i]) for i in range(2)}
    torch.testing.assert_close(transcoders.decode(1, encoded, x[1]), y)


def test_other_files_in_place_of_the_papers_are_refused(tmp_path):
    paper_folder(tmp_path / "a", {"W_enc": draw(D, N)})
    paper_folder(tmp_path / "b", {"W_enc": draw(D, N)}, encoder_type="topk")
    paper_folder(tmp_path / "c", {}, input_unit_norm=True)
    for name, message in (
        ("a", "lacks the tensor b_enc"),
        ("b", "encoder_type is 'topk'"),
        ("c", "input_unit_norm is on"),
    ):
        with pytest.raises(ValueError, match=message):
            load_paper_transcoders({0: tmp_path / name})
    with pytest.raises(ValueError, match="of one layer, which its config does not name"):
        load_paper_transcoders(tmp_path / "a")
    (tmp_path / "a" / "encoder.pt").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="is not a file of tensors"):
        load_paper_transcoders({0: tmp_path / "a"})
