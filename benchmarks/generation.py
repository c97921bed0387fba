"""Tokens per second of generation, masked and plain, with and without a KV cache, on the bundled model.

    python -m benchmarks.generation                  # benchmarks/results/generation.json; about a minute on one core

Four rows; from prefixes of 16 and of 96 tokens, 24 more tokens each, greedily. With a cache the model runs one token at a time,
and a causal Γ keeps its keys and values too, so a token's cost hardly depends on the prefix; without one, each token costs the
whole prefix. Seconds are the processor's, the least of ``--rounds``.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks import harness
from tl_vpd import bundled

ROWS, NEW, PREFIXES = 4, 24, (16, 96)
MODES = ("plain", "rounded", "stochastic", "ci")


@torch.no_grad()
def tokens_per_second(model: Any, attached: Any, mode: str, *, prefix: int, cache: bool, rounds: int) -> float:
    """New tokens of all rows per second of the processor."""
    prompt = bundled.tokens("validation")[:ROWS, :prefix].contiguous()
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "use_past_kv_cache": cache}
    seconds = []
    for _ in range(rounds):
        with nullcontext() if mode == "plain" else attached.masked(mode):
            start = time.process_time()
            model.generate(prompt, max_new_tokens=NEW, **options)
            seconds.append(time.process_time() - start)
    return round(ROWS * NEW / min(seconds), 1)


def main() -> None:
    """Measures and writes the record."""
    parser = harness.parser("generation", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = bundled.model()
    with bundled.decomposition().attach(model) as attached:
        record = {
            mode: {
                f"{prefix} tokens, {'cache' if cache else 'no cache'}": tokens_per_second(
                    model, attached, mode, prefix=prefix, cache=cache, rounds=options.rounds
                )
                for prefix in PREFIXES
                for cache in (True, False)
            }
            for mode in MODES
        }
    harness.write(options.out, record, "generation", rows=ROWS, new_tokens=NEW, rounds=options.rounds)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
