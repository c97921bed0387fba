"""Writing a file so that its path holds the old content or the new one, whatever happens between.

The new content goes to a temporary file beside the old one, is synced, and takes its name in one step. Temporary files of
processes that were killed are cleared by the next write.
"""

from __future__ import annotations

import errno
import itertools
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_count = itertools.count()
"""Threads of one process write to temporary files of different names."""


def write_file(path: Path, write: Callable[[Path], Any], *, safe: str | None = None) -> None:
    """Calls ``write(temporary_path)`` and moves the result to ``path``; a link is followed, not replaced.

    Args:
        path: of the file; its folder must exist.
        write: makes the file at the path that it gets.
        safe: what is intact if it fails, for the message (None: the older file, if there is one).

    Raises:
        OSError: it cannot be written; the message names the folder, what is safe and what to do.
    """
    path = _path(path).resolve()
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "not an ordinary file"
        raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, f"{path} is {kind}: give the path of a file.")
    if not path.parent.is_dir():
        kind = "is a file" if path.parent.exists() else "does not exist"
        raise OSError(errno.ENOTDIR, f"{path.name} cannot be written: {path.parent} {kind}, a folder is needed.")
    clear_leftovers(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}-{next(_count)}.tmp")
    with named_errors(path, safe):
        try:
            temporary.touch()
            mode = (path if path.exists() else temporary).stat().st_mode
            write(temporary)
            with suppress(OSError):  # not every file system has modes
                temporary.chmod(mode & 0o777)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
            _sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text; errors as for ``write_file``."""
    write_file(path, lambda p: p.write_text(text, encoding="utf-8"))


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it; raises OSError where it cannot be made, or a file has its name."""
    for place in (_path(folder), *folder.parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file and a folder is needed: give another path.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"The folder {folder} cannot be made: {_reason(error)}.") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside a new one, which takes its name if all went well; raises FileExistsError where the folder has
    something in it, or a file has its name.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder: give the path of a new one.")
    parent = folder.resolve().parent
    make_folder(parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{folder.name}-") as temporary:
        written = Path(temporary) / "new"
        written.mkdir()
        yield written
        if folder.is_dir():
            folder.rmdir()
        written.replace(folder)


def clear_leftovers(path: Path) -> None:
    """Deletes the temporary files of processes of this machine that were killed while they wrote ``path``."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(platform.node())}\.(\d+)-\d+\.tmp")
    with suppress(OSError):
        for entry in os.scandir(path.parent):
            match = pattern.fullmatch(entry.name)
            if match and not _alive(int(match[1])):
                os.unlink(entry.path)


@contextmanager
def named_errors(path: Path, safe: str | None = None) -> Iterator[None]:
    """Turns errors of writing (the safetensors library's too) into an OSError that says what is safe (None: the older file, if
    there is one) and what to do.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = _reason(error)
        number = getattr(error, "errno", None) or errno.EIO
        intact = safe or (f"the older {path.name} is intact" if path.exists() else "nothing was written")
        if number in NO_SPACE or "No space left" in text or "quota exceeded" in text.lower():
            message = f"No space left on the disk of {path.parent} for {path.name}: {intact}; make room and try again."
            raise OSError(errno.ENOSPC, message) from error
        raise OSError(number, f"{path} cannot be written ({text}): {intact}.") from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _path(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} is not a path: it contains a zero byte.")
    return path


def _alive(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it exists and belongs to somebody else
    return True


def _sync(folder: Path) -> None:
    """A rename is on the disk when its folder is; not every system can sync a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
