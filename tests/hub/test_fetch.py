"""What comes from the Hub: the decomposition of the revision that was asked, or one sentence."""

from __future__ import annotations

import time

import pytest
import torch

from tests.hub.test_push import refused
from tests.tiny import decomposition_of, tiny_model
from tl_vpd import Decomposition
from tl_vpd.components.storage import CONFIG, TENSORS


def test_a_private_repository_needs_a_token_of_somebody_with_access(hub, pushed, login):
    pushed.push_to_hub("user/secret", private=True)
    for token in (None, "hf_guest"):
        login(token)
        with refused(OSError, r"user/secret cannot be fetched .* it is private: check its name, or log in"):
            Decomposition.from_hub("user/secret")
    login("hf_owner")
    assert Decomposition.from_hub("user/secret").counts == pushed.counts


def test_public_ones_need_no_token_and_are_fetched_once(hub, pushed, login):
    login(None)
    for _ in range(2):
        assert Decomposition.from_hub("user/repo").counts == pushed.counts
    assert sum(call.startswith("GET /user/repo/resolve") and TENSORS in call for call in hub.calls) == 1


def test_what_was_fetched_loads_without_a_network(hub, pushed, offline):
    first = Decomposition.from_hub("user/repo")
    commit = hub.repositories["user/repo"].branches["main"]
    Decomposition.from_hub("user/repo", revision=commit)
    offline()
    n = len(hub.calls)
    for revision in (None, commit):
        again = Decomposition.from_hub("user/repo", revision=revision)
        assert all(torch.equal(again.file_tensors()[key], tensor) for key, tensor in first.file_tensors().items())
    for name, revision in (("user/other", None), ("user/repo", "v2")):
        with refused(OSError, f"{name}.* HF_HUB_OFFLINE=1 forbids it, and it was not fetched before"):
            Decomposition.from_hub(name, revision=revision)
    assert len(hub.calls) == n


@pytest.mark.parametrize("status", [403, 500, 503])
def test_what_was_fetched_loads_while_the_hub_is_down(hub, pushed, monkeypatch, status):
    Decomposition.from_hub("user/repo")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the attempts of huggingface_hub
    hub.faults["HEAD"] = status
    assert Decomposition.from_hub("user/repo").counts == pushed.counts
    hub.put("user/other", dict(hub.files("user/repo")))
    reason = "no right" if status == 403 else f"the Hub answers {status}"
    with refused(OSError, rf"user/other cannot be fetched .*{reason}.*, and it was not fetched before"):
        Decomposition.from_hub("user/other")


def test_revisions_are_branches_and_commits(hub, pushed):
    first = hub.repositories["user/repo"].branches["main"]
    other = decomposition_of(tiny_model(), C=4)
    other.push_to_hub("user/repo")
    assert Decomposition.from_hub("user/repo", revision=first).counts == pushed.counts
    assert Decomposition.from_hub("user/repo", revision="main").counts == other.counts
    for revision in ("v9", "0" * 40):
        with refused(OSError, f"user/repo at {revision} cannot be fetched .*: it has no such revision"):
            Decomposition.from_hub("user/repo", revision=revision)


def test_there_is_no_such_repository(hub, pushed):
    with refused(OSError, r"user/none cannot be fetched .*: there is no such repository"):
        Decomposition.from_hub("user/none")


def test_a_repository_that_is_not_a_decomposition(hub):
    hub.put("user/model", {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b"12345678"})
    with refused(FileNotFoundError, f"not a decomposition: user/model has no {TENSORS}"):
        Decomposition.from_hub("user/model")
    hub.put("user/false", {TENSORS: b"12345678"})
    with pytest.raises(ValueError, match=r"user/false: .*decomposition\.safetensors"):
        Decomposition.from_hub("user/false")


def test_a_download_that_breaks_off_is_said_and_the_next_one_is_whole(hub, pushed, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the attempts of huggingface_hub
    hub.faults["GET /user/repo/resolve"] = "cut"
    with refused(OSError, r"user/repo cannot be fetched from the Hugging Face Hub: the connection broke off"):
        Decomposition.from_hub("user/repo")
    hub.faults.clear()
    again = Decomposition.from_hub("user/repo", dtype=torch.float64)
    assert all(torch.equal(again.file_tensors()[key], tensor) for key, tensor in pushed.file_tensors().items())


def test_a_cache_that_cannot_be_written_is_said(hub, pushed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    with refused(OSError, r"user/repo cannot be fetched from the Hugging Face Hub: .*file"):
        Decomposition.from_hub("user/repo")


def test_a_damaged_file_is_named_with_what_to_do(hub, pushed):
    files = dict(hub.files("user/repo"))
    files[TENSORS] = files[TENSORS][:-1] + bytes([files[TENSORS][-1] ^ 1])
    hub.put("user/damaged", files)
    with pytest.raises(ValueError, match=r"user/damaged: .*; if a file is damaged, delete .* and try again") as caught:
        Decomposition.from_hub("user/damaged")
    assert "\n" not in str(caught.value)


def test_without_the_copy_of_the_config_it_loads_with_a_warning(hub, pushed):
    files = dict(hub.files("user/repo"))
    del files[CONFIG]
    hub.put("user/bare", files)
    with pytest.warns(UserWarning, match=f"{CONFIG} does not exist"):
        assert Decomposition.from_hub("user/bare").counts == pushed.counts


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("user/repo/more", {}, "'user/repo/more' is not the name of a repository on the Hugging Face Hub"),
        ("", {}, "'' is not the name of a repository"),
        ("user/repo", {"revision": ""}, "revision='' is empty: give the name of a branch, tag or commit"),
        ("user/repo", {"device": "nowhere"}, "device='nowhere' is not a device"),
    ],
)
def test_a_name_that_is_not_one_is_refused(hub, pushed, name, options, message):
    with pytest.raises(ValueError, match=message):
        Decomposition.from_hub(name, **options)
