"""Saving and loading: exact round trips, and everything that is wrong named in one sentence."""

from __future__ import annotations

import errno
import json
import resource
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import decomposition_of, tiny_model
from tl_vpd import Decomposition
from tl_vpd.components.storage import CONFIG, TENSORS, open_folder
from tl_vpd.files import tensor_file
from tl_vpd.files.tensor_file import open_tensors, write_tensors

KEY = "V/blocks.0.attn.W_Q"
SITE = KEY[2:]


@pytest.fixture
def folder(model, tmp_path):
    return decomposition_of(model).save(tmp_path / "deep" / "vpd")


def content_of(folder):
    with open_tensors(folder / TENSORS) as file:
        return file.content


def rewrite(folder, *, tensors=lambda t: None, config=lambda c: None):
    """Writes the folder anew, with right digests, after changes of its tensors and config."""
    values, content = load_file(folder / TENSORS), content_of(folder)
    tensors(values)
    config(content)
    write_tensors(folder / TENSORS, values, content)
    (folder / CONFIG).write_text(json.dumps(content))


def refused(folder, message, error=ValueError, **options):
    """Loading is refused in one sentence."""
    with pytest.raises(error, match=message) as caught:
        Decomposition.load(folder, **options)
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text


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
    assert json.loads((tmp_path / CONFIG).read_text()) == content_of(tmp_path)


def test_a_record_cannot_change_what_is_stored(model, tmp_path):
    vpd = decomposition_of(model)
    vpd.record |= {"sites": [], "C": {}, "format_version": 9}
    again = Decomposition.load(vpd.save(tmp_path))
    assert again.sites == vpd.sites and again.record["C"] == {}


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
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        again = Decomposition.load(tmp_path, dtype=dtype)
        assert torch.equal(again.V[SITE], vpd.V[SITE].bfloat16().to(dtype))


def test_a_second_save_replaces_the_first(model, folder):
    other = decomposition_of(model, seed=1)
    other.save(folder)
    assert torch.equal(Decomposition.load(folder).V[SITE], other.V[SITE])


def test_loading_draws_no_random_numbers(folder):
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    Decomposition.load(folder)
    assert torch.equal(torch.rand(2), expected)


# -- what is not a decomposition -------------------------------------------------------------------------------------


def test_a_folder_that_is_not_a_decomposition_is_named(folder, tmp_path):
    refused(
        tmp_path / "nowhere",
        r"nowhere does not exist.*give the folder that Decomposition\.save wrote",
        FileNotFoundError,
    )
    refused(folder / CONFIG, r"config\.json is a file: give the folder of a decomposition", NotADirectoryError)
    (folder / TENSORS).unlink()
    refused(folder, f"has no {TENSORS}", FileNotFoundError)


def test_another_programs_tensors_are_refused(folder):
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    refused(folder, "format version 2, and decomposition.safetensors has no config: give a folder")
    (folder / CONFIG).unlink()
    refused(folder, f"has no {CONFIG}", FileNotFoundError)
    write_tensors(folder / TENSORS, {}, ["a graph"])
    refused(folder, "format version None, this tl_vpd reads 1 and 2; give a folder")


def test_a_changed_byte_and_a_cut_are_refused(folder):
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:-100])
    refused(folder, "is not an intact safetensors file")
    (folder / TENSORS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(folder, r"gamma/\S+ is damaged, its checksum differs")


def test_wrong_tensors_are_named(folder):
    rewrite(folder, tensors=lambda t: t.update({KEY: torch.zeros(2, 2)}))
    refused(folder, r"V/blocks\.0\.attn\.W_Q is \(2, 2\), the config says \(8, 6\)")
    rewrite(folder, tensors=lambda t: t.update({KEY: torch.zeros(8, 6, dtype=torch.int32)}))
    refused(folder, r"V/blocks\.0\.attn\.W_Q is of torch\.int32, a type of floating-point numbers is needed")
    rewrite(folder, tensors=lambda t: t.update(extra=t.pop(KEY)))
    refused(folder, r"V/blocks\.0\.attn\.W_Q is missing, the config says \(8, 6\)")


def test_wrong_tensors_of_gamma_are_named(folder):
    rewrite(folder, tensors=lambda t: t.update({"gamma/embed.bias": torch.zeros(3)}))
    refused(folder, r"gamma/embed\.bias is \(3,\), the config says \(8,\)")
    rewrite(folder, tensors=lambda t: t.update(extra=t.pop("gamma/embed.bias")))
    refused(folder, r"missing keys \['gamma/embed\.bias'\], unexpected keys \['extra'\]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=99), "format version 99, this tl_vpd reads 1 and 2; update tl_vpd"),
        (lambda c: c.pop("format_version"), "format version None"),
        (lambda c: c.pop("sites"), "damaged: sites: Field required"),
        (lambda c: c.pop("C"), "damaged: C: Field required"),
        (lambda c: c.update(C=3), "damaged: C=3"),
        (lambda c: c["C"].pop(SITE), r"disagree about blocks\.0\.attn\.W_Q"),
        (lambda c: c["sites"].append(c["sites"][0]), r"disagree about blocks\.0\.attn\.W_Q"),
        (lambda c: c.update(fingerprints=None), "damaged: fingerprints=None"),
        (lambda c: c["fingerprints"][SITE].update(norm=None), r"damaged: fingerprints\.blocks\.0\.attn\.W_Q\.norm=None"),
        (lambda c: c["fingerprints"][SITE]["projections"].pop(), "fingerprint of .*W_Q is not a finite norm with 16"),
        (lambda c: c["gamma"].update(kind="oracle"), "damaged: gamma.kind='oracle': Input should be 'shared_transformer'"),
        (lambda c: c["gamma"].update(depth=3), "damaged.*has no 'depth'"),
        (lambda c: c["gamma"].update(n_heads=3), "damaged: d_ci=8 does not divide into n_heads=3 heads"),
        (lambda c: c["gamma"].update(n_heads=-2), r"damaged: gamma\.n_heads=-2: Input should be greater than 0"),
        (lambda c: c["gamma"].update(d_ci=None), "damaged.*d_ci"),
        (lambda c: c["gamma"].update(d_ci=16), r"gamma/\S+ is \S+ \d+\), the config says"),
        (lambda c: c["sites"][0].update(colour="red"), "damaged.*has no 'colour'"),
        (lambda c: c["sites"][0].update(n_heads=3), "3 heads of 4 are not 8 or 8 wide"),
        (lambda c: c["sites"][0].update(d_in=9), r"V/blocks\.0\.attn\.W_Q is \(8, 6\), the config says \(9, 6\)"),
        (lambda c: c["C"].update({SITE: 0}), r"damaged: C\.blocks\.0\.attn\.W_Q=0: Input should be greater than 0"),
        (lambda c: c["C"].update({SITE: -3}), r"damaged: C\.blocks\.0\.attn\.W_Q=-3"),
        (lambda c: c["C"].update({SITE: "six"}), r"damaged: C\.blocks\.0\.attn\.W_Q='six'"),
        (lambda c: c["C"].update({SITE: 10**30}), r"damaged: C\.blocks\.0\.attn\.W_Q=1000"),
        (lambda c: c["C"].update({SITE: 200_000_000}), r"is \(8, 6\), the config says \(8, 200000000\)"),
        (lambda c: c["gamma"].update(n_blocks=1_000_000), "the config says n_blocks=1000000, and Γ has 12 tensors"),
        (lambda c: c["gamma"].update(d_mlp=200_000_000), "the config says .*200000000"),
    ],
)  # fmt: skip
def test_a_config_that_is_wrong_says_where(folder, change, message):
    rewrite(folder, config=change)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder, message)
    assert time.monotonic() - start < 5, "sizes are compared before anything is built"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "nor allocated (kilobytes)"


# -- config.json is a copy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "config.json does not exist: only decomposition.safetensors is read"),
        (lambda path: path.write_text("{"), "config.json is not JSON"),
        (lambda path: path.write_text("[" * 100_000), "config.json is nested too deeply"),
        (lambda path: path.write_text('{"C": ' + "9" * 5_000 + "}"), "config.json is not JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "config.json is not UTF-8"),
        (lambda path: path.write_text(path.read_text().replace('"n_heads": 2', '"n_heads": 1')), "config.json differs"),
        (lambda path: (path.unlink(), path.mkdir()), "config.json is not an ordinary file"),
    ],
)  # fmt: skip
def test_a_changed_copy_is_said_and_changes_nothing(model, folder, change, message):
    vpd = decomposition_of(model)
    change(folder / CONFIG)
    with pytest.warns(UserWarning, match=message) as said:
        again = Decomposition.load(folder)
    assert len(said) == 1
    assert again.gamma_config == vpd.gamma_config and torch.equal(again.V[SITE], vpd.V[SITE])


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ['{"model_type": "gpt2"}', "[1]", "not JSON"])
def test_another_programs_config_is_not_overwritten(model, tmp_path, there):
    (tmp_path / CONFIG).write_text(there)
    with pytest.raises(FileExistsError, match=r"config\.json .*choose another folder\.$"):
        decomposition_of(model).save(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {CONFIG: there}


def test_a_damaged_copy_is_renewed(model, folder):
    (folder / CONFIG).write_text("half")
    decomposition_of(model).save(folder)
    Decomposition.load(folder)


def test_a_linked_folder_is_written_through(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    decomposition_of(model).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    Decomposition.load(tmp_path / "real")


def test_a_place_that_cannot_be_written_is_named(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"file is a file.*: give .*\.$"):
            decomposition_of(model).save(target)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), None, r"V/blocks\.0\.attn\.W_Q has 1 of 48 entries that are NaN or infinite"),
        (float("-inf"), torch.bfloat16, r"V/blocks\.0\.attn\.W_Q has 1 of 48 entries that are NaN or infinite"),
        (-7e4, torch.float16, r"V/blocks\.0\.attn\.W_Q has values up to 7e\+04, too large for torch\.float16"),
        (3.4e38, torch.bfloat16, "too large for torch.bfloat16"),
    ],
)
def test_values_that_a_file_would_not_have_are_refused_before_anything_is_written(folder, value, dtype, message):
    vpd, before = Decomposition.load(folder), (folder / TENSORS).read_bytes()
    with torch.no_grad():
        vpd.V[SITE][1, 2] = value
    for target in (folder, folder.parent / "new"):
        with pytest.raises(ValueError, match=message):
            vpd.save(target, dtype=dtype)
    assert (folder / TENSORS).read_bytes() == before and not (folder.parent / "new").exists()


def test_values_too_large_for_the_dtype_of_loading_are_refused(folder):
    rewrite(folder, tensors=lambda t: t[KEY].mul_(1e9))
    Decomposition.load(folder, dtype=torch.bfloat16)
    refused(folder, r"V/blocks\.0\.attn\.W_Q has values up to .*, too large for torch\.float16", dtype=torch.float16)


def test_values_that_become_zero_are_fine(folder):
    rewrite(folder, tensors=lambda t: t[KEY].mul_(1e-30))
    vpd = Decomposition.load(folder, dtype=torch.float16)
    assert not vpd.V[SITE].any()
    Decomposition.load(folder).save(folder, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes_that_a_decomposition_cannot_have_are_refused(folder, dtype):
    refused(folder, f"dtype={dtype}: choose from torch.float64, torch.float32", dtype=dtype)
    with pytest.raises(ValueError, match=f"dtype={dtype}: choose from"):
        Decomposition.load(folder).save(folder.parent / "new", dtype=dtype)
    assert not (folder.parent / "new").exists()


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        (np.float32(0.1), TypeError, "must be strings, numbers, lists and dicts .*float32"),
        (float("nan"), ValueError, "must be finite numbers"),
        ({1: "a", "1": "b"}, ValueError, "the key '1' is there twice"),
    ],
)
def test_a_record_that_cannot_be_read_again_leaves_the_folder_as_it_was(tmp_path, record, error, message):
    vpd = decomposition_of(tiny_model(torch.float32))
    vpd.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    vpd.record["metrics"] = {"kl": record}
    with torch.no_grad():
        vpd.V["blocks.0.attn.W_K"].mul_(1.01)
    with pytest.raises(error, match=message):
        vpd.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_says_what_is_safe(model, folder, monkeypatch):
    """At the tensors the older decomposition is whole, at config.json the new one is."""
    old, other = Decomposition.load(folder), decomposition_of(model, seed=1)

    def full(path, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file, "_write", full)
    with pytest.raises(OSError, match=rf"No space left .* {folder} .* older {TENSORS} is intact; make room"):
        other.save(folder)
    monkeypatch.undo()
    assert torch.equal(Decomposition.load(folder).V[SITE], old.V[SITE])
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=rf"No space left .* {folder} .*: {TENSORS} is whole, .*; make room"):
        other.save(folder)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"config\.json differs"):
        assert torch.equal(Decomposition.load(folder).V[SITE], other.V[SITE])
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]


def test_threads_that_save_into_one_folder_leave_one_of_their_decompositions(model, tmp_path):
    several = [decomposition_of(model, seed=seed) for seed in range(4)]
    for vpd, name in zip(several, "abcd", strict=True):
        vpd.record["who"] = name
    for _ in range(5):
        threads = [threading.Thread(target=vpd.save, args=(tmp_path,)) for vpd in several]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        last = Decomposition.load(tmp_path)  # without a warning: config.json is of the same one
        one = several["abcd".index(last.record["who"])]
        assert all(torch.equal(a, b) for a, b in zip(last.parameters(), one.parameters(), strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]


def test_the_open_file_is_proved_as_it_is_read(folder):
    with open_folder(folder) as (config, file):
        assert set(config) == {"sites", "C", "gamma", "fingerprints", "record"}
        assert file.shapes[KEY] == (8, 6)


def test_tensors_are_read_one_at_a_time_and_once(folder, monkeypatch):
    alive, keys, read = [], [], tensor_file.TensorFile.read

    def watched(file, key):
        assert not any(earlier() is not None for earlier in alive), "an earlier tensor is still in memory"
        tensor = read(file, key)
        alive.append(weakref.ref(tensor))
        keys.append(key)
        return tensor

    monkeypatch.setattr(tensor_file.TensorFile, "read", watched)
    vpd = Decomposition.load(folder, dtype=torch.float64)
    assert sorted(keys) == sorted(vpd.file_tensors())
