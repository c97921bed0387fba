"""What the Hub does not give is said in one sentence."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from tests.tiny import decomposition_of
from tl_vpd import Decomposition
from tl_vpd.components.storage import TENSORS
from tl_vpd.files import hub


class ConnectTimeout(Exception):
    """As the HTTP libraries have one."""


def one_sentence(caught) -> None:
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and "user" in text, text


def test_a_name_that_is_not_one_is_refused_without_the_hub():
    with pytest.raises(ValueError, match="'user/repo/more' is not the name of a repository"):
        Decomposition.from_hub("user/repo/more")


def test_without_a_network_the_hub_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"user/never-fetched cannot be fetched .* the Hub cannot be reached") as caught:
        Decomposition.from_hub("user/never-fetched")
    one_sentence(caught)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RepositoryNotFoundError, "there is no such repository, or it is private"),
        (RevisionNotFoundError, "user/repo at v9 cannot be fetched .* no such revision"),
        (GatedRepoError, "ask for access on its page"),
        (ConnectTimeout, "ConnectTimeout, 404 Client Error"),
    ],
)
def test_every_refusal_of_the_hub_is_one_sentence(monkeypatch, kind, message):
    def refuse(*arguments, **options):
        error = kind.__new__(kind)
        error.args = ("404 Client Error.\n\nRepository not found.",)
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(OSError, match=message) as caught:
        Decomposition.from_hub("user/repo", revision="v9")
    one_sentence(caught)


def test_a_repository_that_is_not_a_decomposition_and_half_a_download(model, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **o: str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(FileNotFoundError, match=f"user/repo is not a decomposition: it has no {TENSORS}"):
        Decomposition.from_hub("user/repo")
    (tmp_path / "config.json").unlink()
    decomposition_of(model).save(tmp_path)
    assert Decomposition.from_hub("user/repo").sites
    whole = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"user/repo: .* is not an intact .* if the download broke off, delete"
    ) as caught:
        Decomposition.from_hub("user/repo")
    one_sentence(caught)
