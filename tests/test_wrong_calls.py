"""Wrong calls end in one sentence, and other forms of right arguments give the same numbers.

Scripts of their own, since the tests check every argument's type before the library sees it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "script", ["hooks.wrong_calls", "hooks.other_forms", "wrong_calls_analysis", "editing.wrong_calls"]
)
def test_calls_are_right_or_refused_in_one_sentence(script):
    result = subprocess.run([sys.executable, "-m", f"tests.{script}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
