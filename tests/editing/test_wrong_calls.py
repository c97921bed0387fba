"""Wrong calls of edits end in one sentence."""

from __future__ import annotations

import subprocess
import sys


def test_wrong_calls_say_what_came_and_what_to_do():
    result = subprocess.run([sys.executable, "-m", "tests.editing.wrong_calls"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
