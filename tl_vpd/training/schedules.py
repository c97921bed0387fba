"""What changes over a run: learning rates, the minimality exponent, the adversary's rate.

lr(t) = lr · (f + (1 − f) · ½ (1 + cos π t / (T − 1)))       t = 0 … T − 1
"""

from __future__ import annotations

import math


def cosine(step: int, steps: int, final: float) -> float:
    """Factor from 1 at step 0 to ``final`` at the last step."""
    progress = min(step / max(steps - 1, 1), 1.0)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(step: int, steps: int, start: float, end: float) -> float:
    """From ``start`` at step 0 to ``end`` at step ``steps``."""
    return start + (end - start) * min(step / max(steps, 1), 1.0)


def warm_up(step: int, steps: int, share: float) -> float:
    """Factor that rises linearly from 0 over the first ``share`` of the run, then stays 1."""
    return min(step / max(share * steps, 1e-12), 1.0) if share else 1.0
