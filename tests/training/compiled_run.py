"""A run with and without ``torch.compile``, compared: ``python -m tests.training.compiled_run``.

A process of its own, because the shape checks that tests put on every function of the package cannot be traced.
"""

from __future__ import annotations

import torch

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import VPDConfig, decompose
from tl_vpd.importance.transformer import Block


def main() -> None:
    """Raises where the two differ by more than rounding, or blocks stay compiled."""
    config = VPDConfig(steps=3, batch_size=4, C=5, gamma=GAMMA, warm_up_steps=50)
    found = []
    for compile in (False, True):
        run = decompose(
            tiny_model(dtype=torch.float32),
            some_tokens(shape=(12, 6)),
            config,
            compile=compile,
            log_every=1,
            progress=False,
        )
        found.append(run)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    plain, compiled = (run.history[["stochastic", "adversarial", "importance", "l0"]] for run in found)
    assert ((plain - compiled).abs() / plain).max().max() < 1e-3, (plain, compiled)
    blocks = [m for m in found[1].decomposition.gamma.modules() if isinstance(m, Block)]
    assert blocks and all(block._compiled_call_impl is None for block in blocks)


if __name__ == "__main__":
    main()
