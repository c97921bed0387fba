"""Files from and to the Hugging Face Hub, or one sentence that says why it cannot be done.

Built on the parts of ``huggingface_hub`` (``HfApi``, its cache, its login); a token comes from ``hf auth login`` or ``HF_TOKEN``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from tl_vpd.checks import flag, shown, text_of
from tl_vpd.files.versions import library_versions

COMMIT = re.compile(r"[0-9a-f]{40}")
ANY_REPOSITORY = frozenset({".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"})
"""Files that a repository may have before anything is pushed to it."""
REASONS: dict[type[Exception], str] = {
    GatedRepoError: "ask for access on its page, then log in with 'hf auth login'",
    RepositoryNotFoundError: "there is no such repository, or it is private: check its name, or log in with 'hf auth login'",
    RevisionNotFoundError: "it has no such revision",
    OfflineModeIsEnabled: "HF_HUB_OFFLINE=1 forbids it",
}
STATUS = {
    401: "the token is not valid: log in with 'hf auth login', or set HF_TOKEN",
    403: "the token has no right to it: ask its owner, or log in with a token that has",
}
BROKEN_OFF = ("RemoteProtocolError", "ChunkedEncodingError", "ProtocolError", "IncompleteRead")
"""Classes of the HTTP libraries for an answer that ends too early."""


def check_repository(name: Any, *, with_user: bool = False) -> str:
    """A repository's name; raises TypeError or ValueError unless the Hub can have it (with ``with_user`` as ``user/repo``)."""
    try:
        validate_repo_id(text_of("repository", name))
    except HFValidationError:
        pass
    else:
        if name.isprintable() and ("/" in name or not with_user):  # huggingface_hub 0.x lets a last newline pass
            return name
    raise ValueError(f"{shown(name)} is not the name of a repository on the Hugging Face Hub: give 'user/repo'.")


def fetch(repository: str, name: str, *, others: Sequence[str] = (), revision: str | None = None) -> Path:
    """The folder of a repository's cached copy with a file, and others of the same commit where it has them.

    Without a network, or with ``HF_HUB_OFFLINE=1``, it is what was fetched before. Raises FileNotFoundError where there is no
    such file, OSError, which says why, where it cannot be fetched, TypeError or ValueError for what cannot be a name.
    """
    check_repository(repository)
    revision = None if revision is None else _revision(revision)
    with _one_sentence(repository, revision, "cannot be fetched from the Hugging Face Hub"):
        api = _api()
        try:
            folder = Path(api.hf_hub_download(repository, name, revision=revision)).parent
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            raise FileNotFoundError(f"{repository}{_at(revision)} has no {name}.") from error
        for other in others:
            try:
                api.hf_hub_download(repository, other, revision=folder.name)
            except EntryNotFoundError:
                continue
    return folder


def check_push(repository: Any, *, private: Any, revision: Any) -> None:
    """Checks the arguments of ``upload``; raises TypeError or ValueError."""
    check_repository(repository, with_user=True)
    if private is not None:
        flag("private", private)
    if revision is not None and COMMIT.fullmatch(_revision(revision)):
        raise ValueError(f"revision={revision!r} is a commit, which cannot be pushed to: give the name of a branch.")


def check_login(repository: str) -> None:
    """Raises OSError if there is no token to push with."""
    if get_token() is None:
        raise OSError(
            f"{repository} cannot be pushed to: there is no token: log in with 'hf auth login', or set HF_TOKEN."
        )


def upload(
    repository: str,
    files: Mapping[str, Path | bytes],
    *,
    key: str,
    absent: Sequence[str] = (),
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """One commit with all files, to a repository that is made if needed; the address of the commit.

    Args:
        repository: ``user/repo``, which ``check_push`` has checked, as ``private`` and ``revision``.
        files: by name; their paths or contents.
        key: the file that says that a repository is of this kind; others are left alone.
        absent: names of files that the commit removes, if they are there.
        private: whether only people with access see it (None: as it is, or as the account makes new ones).
        revision: a branch, which is made if needed (None: the main branch).

    Raises:
        FileExistsError: the repository belongs to something else, or is public where ``private=True`` (or the reverse).
        OSError: the Hub does not accept it; the message says why, and whether a new and empty repository is left.
    """
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    made: list[str] = []
    with _one_sentence(repository, revision, "cannot be pushed to", made):
        api = _api()
        try:
            info = api.model_info(repository)
        except RepositoryNotFoundError:
            api.create_repo(repository, private=private, exist_ok=True)
            made.append("; the repository was made before that and is empty")
            info = api.model_info(repository)
        if private is not None and bool(info.private) != private:
            raise FileExistsError(
                f"{repository} is {'private' if info.private else 'public'} and private={private} was asked: change it in its "
                "settings on the Hub, or choose another name."
            )
        is_new = False
        if revision is not None:
            try:
                info = api.model_info(repository, revision=revision)
            except RevisionNotFoundError:  # the branch will start as the main one is
                is_new = True
        names = {sibling.rfilename for sibling in info.siblings or []}
        if key not in names and names - ANY_REPOSITORY:
            raise FileExistsError(
                f"{repository}{_at(revision)} belongs to something else, it has {min(names - ANY_REPOSITORY)} and no {key}: "
                "choose another name."
            )
        if is_new:
            api.create_branch(repository, branch=str(revision))
        operations += [CommitOperationDelete(name) for name in absent if name in names]
        commit = api.create_commit(repository, operations, commit_message=f"Upload {key}", revision=revision)
    return str(commit.commit_url)


def _revision(name: Any) -> str:
    if not text_of("revision", name).strip():
        raise ValueError(f"revision={name!r} is empty: give the name of a branch, tag or commit, or None.")
    return name


def _api() -> HfApi:
    return HfApi(library_name="tl_vpd", library_version=library_versions().get("tl-vpd", ""))


@contextmanager
def _one_sentence(repository: str, revision: str | None, what: str, made: Sequence[str] = ()) -> Iterator[None]:
    """Turns what ``huggingface_hub`` and its HTTP libraries raise, which differ between versions, into one OSError. ``made`` is
    filled inside with ends of the sentence: what stays on the Hub.
    """
    try:
        yield
    except Exception as error:
        of_this_module = isinstance(error, FileNotFoundError | FileExistsError) and error.errno is None
        if of_this_module and not isinstance(error, LocalEntryNotFoundError):
            raise
        raise OSError(f"{repository}{_at(revision)} {what}: {_reason(error)}{''.join(made)}.") from error


def _reason(error: BaseException) -> str:
    """Why the Hub did not do it: what the error or one that it came from says."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    said = next((reason for e in chain if (reason := _known(e))), "")
    if any(isinstance(e, LocalEntryNotFoundError) for e in chain):
        return f"{said or 'the Hub cannot be reached'}, and it was not fetched before"
    if said:
        return said
    text = " ".join(str(error).split())[:200].rstrip(".:")
    return text if type(error) is OSError or isinstance(error, ValueError) else f"{type(error).__name__}, {text}"


def _known(error: BaseException) -> str:
    """What a known error means (empty: it is not known)."""
    for kind, reason in REASONS.items():
        if isinstance(error, kind):
            return reason
    if type(error).__name__ in BROKEN_OFF or "Consistency check failed" in str(error):
        return "the connection broke off: try again"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return ""
    if status in STATUS:
        return STATUS[status]
    message = " ".join(str(getattr(error, "server_message", None) or "").split())[:200].rstrip(".")
    return f"the Hub answers {status}{f' ({message})' if message else ''}"


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""
