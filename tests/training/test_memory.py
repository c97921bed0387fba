"""Memory freed by one tensor serves the next without the system's help."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from tl_vpd.training.memory import keep_freed_memory
assert keep_freed_memory()
for _ in range(3):
    torch.ones(6_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    a, b = torch.ones(6_000_000), torch.ones(6_000_000)
    del a, b
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


PAGES = 10 * 6_000_000 * 4 // 4096
"""Of all tensors made."""


@pytest.mark.skipif(sys.platform != "linux", reason="what is kept is glibc's heap, which other systems do not have")
def test_freed_memory_is_used_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < PAGES / 3
