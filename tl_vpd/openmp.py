"""The command line's threads sleep while they wait.

PyTorch's OpenMP threads otherwise spin at the end of each loop. Beside another busy process, a thread that spins occupies the
core on which the thread it waits for would run, and a training step takes up to thirty times as long. OpenMP (GNU's, LLVM's and
Intel's) reads its setting once, when PyTorch loads it, so the package imports this module first. It acts on the whole process:
where the package is used as a library, the user decides.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What says how OpenMP's threads wait, in any of its libraries."""


def is_command(arguments: Sequence[str]) -> bool:
    """Whether these arguments of a process (``sys.orig_argv``) start the command line.

    >>> is_command(["python", "-m", "tl_vpd.cli", "demo"]), is_command(["python", "/usr/bin/tl-vpd", "demo"])
    (True, True)
    >>> is_command(["python", "notebook.py", "tl-vpd"]), is_command(["python", "-c", "import tl_vpd"])
    (False, False)
    """
    before = list(arguments[1:])
    while before and before[0].startswith("-") and before[0] not in ("-m", "-c"):
        before.pop(0)  # of Python itself, such as -u
    if before[:2] == ["-m", "tl_vpd.cli"]:
        return True
    return bool(before) and Path(before[0]).stem == "tl-vpd"


def threads_sleep() -> bool:
    """Whether the process was told how its OpenMP threads wait."""
    return any(name in os.environ for name in SETTINGS)


if is_command(sys.orig_argv) and not threads_sleep():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
