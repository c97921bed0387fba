"""What a push leaves on the Hub: everything in one commit, or nothing."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from huggingface_hub import ModelCard

from tests.tiny import decomposition_of, tiny_model
from tl_vpd import CardConfig, Decomposition

FILES = {".gitattributes", "README.md", "config.json", "decomposition.safetensors"}


@contextmanager
def refused(error, message):
    """What is inside raises this error, in one sentence."""
    with pytest.raises(error, match=message) as caught:
        yield caught
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text, text


def test_what_was_pushed_comes_back_to_the_bit(hub, login, vpd):
    login("hf_owner")
    vpd.record["training"] = {"steps": 3}
    address = vpd.push_to_hub("user/repo", card=CardConfig(licence="mit"))
    assert hub.files("user/repo").keys() == FILES
    commits = hub.repositories["user/repo"].commits
    assert (
        len(commits) == 2 and address == f"{hub.url}/user/repo/commit/{hub.repositories['user/repo'].branches['main']}"
    )
    again = Decomposition.from_hub("user/repo", dtype=torch.float64)
    assert again.record["training"] == {"steps": 3} and again.counts == vpd.counts
    for key, tensor in vpd.file_tensors().items():
        assert torch.equal(again.file_tensors()[key], tensor), key
    card = ModelCard(hub.files("user/repo")["README.md"].decode())
    assert card.data.library_name == "tl_vpd" and card.data.license == "mit"
    assert "from_hub('user/repo')" in card.text


def test_a_push_replaces_the_older_one_and_its_report(hub, login, vpd, report):
    login("hf_owner")
    vpd.push_to_hub("user/repo", report=report)
    stored = json.loads(hub.files("user/repo")["metrics.json"])
    assert stored["built"] == report.record["built"] and stored["sha256"]
    assert "Not evaluated" not in hub.files("user/repo")["README.md"].decode()
    other = decomposition_of(tiny_model(), C=4)
    other.push_to_hub("user/repo")
    assert hub.files("user/repo").keys() == FILES  # the report was of other weights
    assert "Not evaluated" in hub.files("user/repo")["README.md"].decode()
    assert Decomposition.from_hub("user/repo").counts == other.counts


def test_a_branch_is_made_and_main_stays_as_it_was(hub, pushed):
    before = hub.files("user/repo")
    other = decomposition_of(tiny_model(), C=4)
    for _ in range(2):  # it is there at the second push
        other.push_to_hub("user/repo", revision="smaller")
    assert hub.files("user/repo") == before
    assert Decomposition.from_hub("user/repo", revision="smaller").counts == other.counts
    assert Decomposition.from_hub("user/repo").counts == pushed.counts


def test_a_private_repository_is_made_private_and_visibility_never_changes_in_passing(hub, pushed):
    pushed.push_to_hub("user/secret", private=True)
    assert hub.repositories["user/secret"].private
    pushed.push_to_hub("user/secret")
    pushed.push_to_hub("user/secret", private=True)
    for name, private, message in [
        ("user/secret", False, "user/secret is private and private=False was asked"),
        ("user/repo", True, "user/repo is public and private=True was asked"),
    ]:
        before = dict(hub.repositories[name].commits)
        with refused(FileExistsError, message):
            decomposition_of(tiny_model(), C=4).push_to_hub(name, private=private)
        assert hub.repositories[name].commits == before


def test_a_repository_of_something_else_is_left_alone(hub, login, vpd):
    login("hf_owner")
    hub.put("user/model", {"README.md": b"a model", "config.json": b'{"model_type": "gpt2"}'})
    for revision in (None, "vpd"):
        with refused(FileExistsError, r"belongs to something else, it has config.json"):
            vpd.push_to_hub("user/model", revision=revision)
    assert len(hub.repositories["user/model"].commits) == 1 and list(hub.repositories["user/model"].branches) == [
        "main"
    ]
    hub.put("user/empty", {"README.md": b"to be filled"})
    vpd.push_to_hub("user/empty")
    assert hub.files("user/empty").keys() == FILES


@pytest.mark.parametrize(
    ("repository", "options", "message"),
    [
        ("repo", {}, "'repo' is not the name of a repository on the Hugging Face Hub: give 'user/repo'"),
        ("user/repo/more", {}, "is not the name of a repository"),
        ("user/..", {}, "is not the name of a repository"),
        ("user/repo\n", {}, "is not the name of a repository"),
        ("user/repo", {"revision": "0" * 40}, "is a commit, which cannot be pushed to: give the name of a branch"),
        ("user/repo", {"revision": " "}, "revision=' ' is empty"),
    ],
)
def test_a_name_that_is_not_one_is_refused_without_a_call(hub, login, vpd, repository, options, message):
    login("hf_owner")
    with refused(ValueError, message):
        vpd.push_to_hub(repository, **options)
    assert not hub.calls


def test_without_a_token_or_with_damaged_numbers_nothing_is_called(hub, login, vpd):
    with refused(OSError, r"user/repo cannot be pushed to: there is no token: log in .* or set HF_TOKEN"):
        vpd.push_to_hub("user/repo")
    login("hf_owner")
    with torch.no_grad():
        vpd.V["blocks.1.attn.W_K"][0, 0] = float("nan")
    with refused(ValueError, r"V/blocks\.1\.attn\.W_K has 1 of 48 entries that are NaN"):
        vpd.push_to_hub("user/repo")
    assert not hub.calls and not hub.repositories


def test_a_report_of_another_decomposition_is_refused(hub, login, report):
    login("hf_owner")
    other = decomposition_of(tiny_model(), C=4)
    with refused(ValueError, r"it says C=6 at 'blocks\.0\.attn\.W_Q', and this one has C=4"):
        other.push_to_hub("user/repo", report=report)
    assert not hub.calls


@pytest.mark.parametrize(("token", "reason"), [("hf_guest", "has no right to it"), ("hf_revoked", "is not valid")])
def test_who_may_not_write_is_told_so(hub, pushed, login, token, reason):
    login(token)
    before = dict(hub.repositories["user/repo"].commits)
    with refused(OSError, f"user/repo cannot be pushed to: the token {reason}"):
        decomposition_of(tiny_model(), C=4).push_to_hub("user/repo")
    assert hub.repositories["user/repo"].commits == before


@pytest.mark.parametrize(
    ("call", "status", "reason"),
    [
        ("repos/create", 403, "has no right"),
        ("GET /api/models", 404, r"the Hub answers 404 \(a fault of the test\)"),
        ("validate-yaml", 500, r"the Hub answers 500 \(a fault of the test\)"),
        ("preupload", 403, "has no right"),
        ("objects/batch", 403, "has no right"),
        ("PUT /large", 403, "has no right"),
        ("POST /verify", 403, "has no right"),
        ("/commit/", 500, r"the Hub answers 500 \(a fault of the test\)"),
        ("/commit/", 409, r"the Hub answers 409 \(a fault of the test\)"),
    ],
)
def test_a_call_that_fails_leaves_the_repository_as_it_was(hub, login, vpd, call, status, reason):
    login("hf_owner")
    hub.faults[call] = status
    with refused(OSError, f"user/repo cannot be pushed to: .*{reason}") as caught:
        vpd.push_to_hub("user/repo")
    assert ("; the repository was made before that and is empty." in str(caught.value)) == bool(hub.repositories)
    assert all(hub.files(name).keys() == {".gitattributes"} for name in hub.repositories)
    if call == "/commit/":  # the repository is there now, which is not this push's doing
        with pytest.raises(OSError, match=r"\(a fault of the test\)\.$"):
            vpd.push_to_hub("user/repo")
    hub.faults.clear()
    vpd.push_to_hub("user/repo")
    assert hub.files("user/repo").keys() == FILES


def test_a_licence_that_the_hub_does_not_know_is_its_answer(hub, login, vpd):
    login("hf_owner")
    with pytest.raises(OSError, match=r'"license" must be one of \[mit\]') as caught:
        vpd.push_to_hub("user/repo", card=CardConfig(licence="unknown-here"))
    assert "\n" not in str(caught.value)
    assert hub.files("user/repo").keys() == {".gitattributes"}


def test_offline_is_said(hub, login, offline, vpd):
    login("hf_owner")
    offline()
    with refused(OSError, "user/repo cannot be pushed to: HF_HUB_OFFLINE=1 forbids it"):
        vpd.push_to_hub("user/repo")
    assert not hub.calls
