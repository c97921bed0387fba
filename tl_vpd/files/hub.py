"""Files from the Hugging Face Hub, or one sentence that says why they cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REASONS = {
    GatedRepoError: "ask for access on its page, then log in with 'hf auth login'",
    RepositoryNotFoundError: "there is no such repository, or it is private: check its name, or log in with 'hf auth login'",
    RevisionNotFoundError: "it has no such revision",
    LocalEntryNotFoundError: "the Hub cannot be reached and these files were not fetched before",
}


def fetch(repository: str, names: Sequence[str], *, revision: str | None = None) -> Path:
    """The folder of a repository with the files of these names, of which there may be fewer.

    Args:
        repository: ``user/repo``.
        names: of the files.
        revision: a branch, tag or commit (None: the main branch).

    Raises:
        OSError: they cannot be fetched; the message says why.
        ValueError: it is not the name of a repository.
    """
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(names)))
    except HFValidationError as error:
        raise ValueError(
            f"{repository!r} is not the name of a repository on the Hugging Face Hub: give 'user/repo'."
        ) from error
    except Exception as error:  # errors of several HTTP libraries, which differ between versions of huggingface_hub
        known = next((reason for kind, reason in REASONS.items() if isinstance(error, kind)), None)
        reason = known or f"{type(error).__name__}, {' '.join(str(error).split())[:200].rstrip('.')}"
        at = f" at {revision}" if revision else ""
        raise OSError(f"{repository}{at} cannot be fetched from the Hugging Face Hub: {reason}.") from error
