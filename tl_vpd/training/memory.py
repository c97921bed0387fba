"""Memory: how much a machine has, how much the process has taken, and freed memory that stays with it.

A step frees tensors and allocates others of the same sizes. glibc's allocator returns large ones to the system each time, and the
system supplies them again page by page, filled with zeros. ``keep_freed_memory`` tells the allocator to keep them. It acts
on the whole process, so the command line calls it and the library does not.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much memory a container may take."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt(3)


def keep_freed_memory() -> bool:
    """Lets glibc's allocator keep what is freed; says whether there is such an allocator."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_THRESHOLD, 32 << 20), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 64 << 20)])


def peak_memory(device: torch.device) -> int:
    """The most bytes that have been in use at once, on a GPU or by the process (0: the system does not say)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def machine_memory(device: torch.device | str = "cpu") -> int:
    """Bytes of memory of a GPU, or of this machine or the container that this process is in (0: the system does not say)."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    sizes = []
    with suppress(AttributeError, ValueError, OSError):  # Windows
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in LIMITS:
        with suppress(ValueError, OSError):  # no such limit, or "max"
            sizes.append(int(path.read_text(encoding="ascii")))
    return min(sizes, default=0)
