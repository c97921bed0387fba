"""One process a folder: a lock that the operating system releases when its process ends, however it ends.

>>> with locked(folder):                                          # doctest: +SKIP
...     write_into(folder)
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tl_vpd.files.atomic import make_folder, named_errors

LOCK = ".lock"
"""The locked file; it stays when the lock is released, and means nothing then."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder, made if need be; raises OSError where another process, which the message names, has locked it."""
    make_folder(folder)
    path = folder / LOCK
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            errno.EAGAIN, f"{folder} is in use by {_owner(path)}: wait until it ends, or choose another folder."
        ) from error
    except OSError:
        with named_errors(path):
            raise
    try:
        with suppress(OSError):  # a full disk: the message of others has no name then
            path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def _owner(path: Path) -> str:
    """Who has locked a file."""
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
