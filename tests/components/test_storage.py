"""Saving and loading: exact round trips, and every damage named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import decomposition_of, tiny_model
from tl_vpd import Decomposition
from tl_vpd.components.storage import CONFIG, TENSORS, sha256_of, write_atomically

KEY = "V/blocks.0.attn.W_Q"


@pytest.fixture
def folder(model, tmp_path):
    return decomposition_of(model).save(tmp_path / "deep" / "vpd")


def rewrite(folder, change):
    """Applies ``change`` to the stored tensors and signs the file anew."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    reconfigure(folder, lambda config: config.update(sha256=sha256_of(folder / TENSORS)))


def reconfigure(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def test_a_round_trip_is_exact(model, tmp_path):
    vpd = decomposition_of(model, C={"*.attn.*": 3, "*.mlp.*": 5})
    vpd.record["metrics"] = {"kl": 0.25}
    again = Decomposition.load(vpd.save(tmp_path))
    before, after = vpd.state_dict(), again.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert (again.sites, again.counts, again.gamma_config) == (vpd.sites, vpd.counts, vpd.gamma_config)
    assert again.fingerprints == vpd.fingerprints and again.record["metrics"] == {"kl": 0.25}
    assert again.record["training"] == vpd.record["training"]
    assert all(p.requires_grad for p in again.parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS]


@pytest.mark.parametrize("kind", ["chunked_transformers", "per_subcomponent_mlps", "per_site_mlps"])
def test_every_kind_of_gamma_comes_back(model, tmp_path, kind):
    vpd = decomposition_of(model, gamma=dict(kind=kind, d_ci=8, n_heads=2, n_blocks=1, hidden=3, chunk=5))
    again = Decomposition.load(vpd.save(tmp_path))
    assert type(again.gamma) is type(vpd.gamma)
    assert all(torch.equal(a, b) for a, b in zip(vpd.parameters(), again.parameters(), strict=True))


def test_the_dtype_of_the_file_and_of_loading_are_the_callers(model, tmp_path):
    vpd = decomposition_of(model)
    vpd.save(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / TENSORS).values()} == {torch.bfloat16}
    assert {p.dtype for p in vpd.parameters()} == {torch.float32}
    name = "blocks.0.attn.W_Q"
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        again = Decomposition.load(tmp_path, dtype=dtype)
        assert torch.equal(again.V[name], vpd.V[name].bfloat16().to(dtype))


def test_a_second_save_replaces_the_first(model, folder):
    other = decomposition_of(model, seed=1)
    other.save(folder)
    assert torch.equal(Decomposition.load(folder).V[KEY[2:]], other.V[KEY[2:]])


def test_loading_draws_no_random_numbers(folder):
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    Decomposition.load(folder)
    assert torch.equal(torch.rand(2), expected)


def test_a_folder_that_is_no_decomposition_is_named(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere does not exist.*give the folder that Decomposition\.save wrote"
    ):
        Decomposition.load(tmp_path / "nowhere")
    for part in (TENSORS, CONFIG):
        (folder / part).unlink()
        with pytest.raises(FileNotFoundError, match=f"has no {part}"):
            Decomposition.load(folder)


def test_a_file_cut_short_or_changed_is_refused(folder):
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"checksum differs.*cut short or changed"):
        Decomposition.load(folder)
    (folder / TENSORS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum differs"):
        Decomposition.load(folder)


def test_a_truncated_file_with_a_matching_checksum_is_refused_too(folder):
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])
    reconfigure(folder, lambda config: config.update(sha256=sha256_of(folder / TENSORS)))
    with pytest.raises(ValueError, match="is damaged"):
        Decomposition.load(folder)


def test_wrong_tensors_are_named(folder):
    rewrite(folder, lambda t: t.update({KEY: torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match=r"V/blocks\.0\.attn\.W_Q is \(2, 2\), the config says \(8, 6\)"):
        Decomposition.load(folder)
    rewrite(folder, lambda t: t.update({KEY: torch.full((8, 6), float("nan"))}))
    with pytest.raises(ValueError, match=r"V/blocks\.0\.attn\.W_Q holds values that are not finite"):
        Decomposition.load(folder)
    rewrite(folder, lambda t: t.update(extra=t.pop(KEY)))
    with pytest.raises(ValueError, match=r"missing keys \['V/blocks\.0\.attn\.W_Q'\], unexpected keys \['extra'\]"):
        Decomposition.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=99), "99"),
        (lambda c: c.pop("format_version"), "format"),
        (lambda c: c.pop("sites"), "damaged.*sites"),
        (lambda c: c.pop("C"), "damaged.*'C'"),
        (lambda c: c.pop("sha256"), "damaged.*sha256"),
        (lambda c: c["C"].pop("blocks.0.attn.W_Q"), r"disagree about blocks\.0\.attn\.W_Q"),
        (lambda c: c["gamma"].update(kind="oracle"), "damaged.*kind"),
        (lambda c: c["gamma"].update(depth=3), "damaged.*depth"),
        (lambda c: c["sites"][0].update(colour="red"), "damaged.*colour"),
        (lambda c: c["sites"][0].update(d_in=9), r"V/blocks\.0\.attn\.W_Q is \(8, 6\), the config says \(9, 6\)"),
        (lambda c: c["C"].update({"blocks.0.attn.W_Q": 0}), r"C of blocks\.0\.attn\.W_Q is 0"),
        (lambda c: c["C"].update({"blocks.0.attn.W_Q": "six"}), "damaged"),
        (lambda c: c["gamma"].update(d_ci=None), "damaged.*d_ci"),
    ],
)
def test_a_config_that_is_wrong_says_where(folder, change, message):
    reconfigure(folder, change)
    with pytest.raises(ValueError, match="(?s)" + message):
        Decomposition.load(folder)


def test_a_config_that_is_not_json_is_refused(folder):
    for text in ("{", "[1, 2]", '"a"'):
        (folder / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=str(folder / CONFIG)):
            Decomposition.load(folder)


def test_a_place_that_cannot_be_written_is_an_os_error(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError):
            decomposition_of(model).save(target)


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_record_that_cannot_be_written_leaves_the_folder_as_it_was(tmp_path):
    vpd = decomposition_of(tiny_model(torch.float32))
    vpd.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    vpd.record["metrics"] = {"kl": np.float32(0.1)}
    with torch.no_grad():
        vpd.V["blocks.0.attn.W_K"].mul_(1.01)
    with pytest.raises(TypeError, match="not JSON serializable"):
        vpd.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
