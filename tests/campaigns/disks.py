"""Trainings whose disk is full, or whose files may not grow, at any byte."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from tests.campaigns.counts import Budget, Counts
from tests.campaigns.tiny_runs import go_on, in_child, is_sentence, leftovers, result_of, train

TRIED = """A short training, saved after every step, runs on a disk that is full after any number of bytes (a file system in
memory, where the system lets users mount one), or with a limit on the size of any file. It must end in one sentence that names
the folder and what is intact; with room again it must resume to the undisturbed result bit for bit, and no temporary file may
remain."""
SHORT, LONG = Budget(40, 40), Budget(2_000, 540)

NEW_NAMESPACES = 0x00020000 | 0x10000000  # of mounts and users
SIZE = 1 << 20


def run(budget: Budget, seed: int) -> Counts:
    """Trains with too little room.

    Args:
        budget: of trainings.
        seed: of how much room.
    """
    counts = Counts()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "disk" / "run"
        in_child(lambda: str(train(folder)))
        expected, sizes = result_of(folder), [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
        shutil.rmtree(folder)
        kinds = ["file size"] + (["full disk"] if in_child(lambda: str(mounted(folder.parent)))[1] == "True" else [])
        for i in budget.tries_left():
            chooses = random.Random(f"{seed}:{i}")
            kind = kinds[i % len(kinds)]
            room = chooses.randint(0, round(1.3 * (sum(sizes) if kind == "full disk" else max(sizes))))
            attempt = on_full_disk if kind == "full disk" else with_small_files
            ended, said = in_child(lambda f=attempt, n=room: f(folder, n, expected))  # type: ignore[misc]
            outcome, _, detail = said.partition(": ") if said else ("hung" if ended < 0 else "crashed", "", "")
            counts.add(outcome, f"seed {seed}, try {i}: {kind} of {room} bytes: {detail}")
            shutil.rmtree(folder, ignore_errors=True)
    return counts


def mounted(folder: Path) -> bool:
    """Mounts a file system in memory for this process alone; False where the system does not allow it."""
    if sys.platform != "linux":
        return False
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(NEW_NAMESPACES):
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError:
        return False
    return libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, f"size={SIZE}".encode()) == 0


def on_full_disk(folder: Path, room: int, expected: str) -> str:
    """Trains where ``room`` bytes are free; the outcome.

    Args:
        folder: of the run.
        room: free bytes, in whole pages.
        expected: the checksum of the undisturbed run.
    """
    assert mounted(folder.parent)
    ballast = folder.parent / "ballast"
    used = max(0, SIZE - room)
    ballast.write_bytes(b"\1" * min(used, SIZE))
    return judged(folder, ballast.unlink, expected, errno.ENOSPC)


def with_small_files(folder: Path, room: int, expected: str) -> str:
    """Trains where no file may have more than ``room`` bytes; the outcome.

    Args:
        folder: of the run.
        room: bytes.
        expected: the checksum of the undisturbed run.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    return judged(folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, unlimited), expected, errno.EFBIG)


def judged(folder: Path, make_room: object, expected: str, number: int) -> str:
    """Trains, makes room and resumes; the outcome and what was said.

    Args:
        folder: of the run.
        make_room: a function.
        expected: the checksum of the undisturbed run.
        number: of the system's error.
    """
    refused = ""
    try:
        train(folder)
    except OSError as error:
        refused = str(error.strerror)
        if error.errno != number or not is_sentence(error, str(folder)):
            return f"wrong exception: {error!r}"
    except Exception as error:
        return f"wrong exception: {error!r}"
    assert callable(make_room)
    make_room()
    try:
        go_on(folder)
    except Exception as error:
        return f"wrong exception: {error!r}, when it was resumed after {refused}"
    if result_of(folder) != expected:
        return f"silent: {refused}"
    if left := leftovers(folder):
        return f"left behind: {left}"
    return f"refused and resumed bit for bit: {refused}" if refused else "room enough: "
