"""What it costs to decompose one block of twelve: passes that start at it, beside passes through every block.

    python -m benchmarks.partial                     # benchmarks/results/partial.json, about a minute of one core

A random HookedTransformer of 12 blocks, of which all are decomposed (``all``), or the last one with masked passes that start
there (``last``), or the last one with masked passes through every block (``last, whole passes``). ``step`` is a training step,
``evaluation`` the report's mask modes and an attack of 5 steps; clean passes go through every block in each case. Seconds are
medians over rounds in turn; ``over …`` are medians of ratios to that case in the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch

from benchmarks import harness
from benchmarks.models import SITES, Size, random_tokens, target_of
from tl_vpd import Decomposition, EvaluationConfig, VPDConfig
from tl_vpd.evaluation import evaluate
from tl_vpd.evaluation.sample import Sample
from tl_vpd.forward import MaskedModel
from tl_vpd.training import Trainer, new_decomposition

SIZE = Size(128, 512, 512, 8, 64, (64,) * 6, 64, 128, layers=12)
CASES = {"all": (SITES, False), "last": (("blocks.11.*",), False), "last, whole passes": (("blocks.11.*",), True)}
"""Sites, and whether masked passes go through every block."""
ATTACK = EvaluationConfig(measures=(), budgets=(5,), controls=False, batch_size=SIZE.batch)


def variants(sites: tuple[str, ...], whole: bool) -> dict[str, Callable[[], object]]:
    """A training step and an evaluation."""
    model, tokens = target_of(SIZE, torch.device("cpu")), random_tokens(SIZE)
    gamma = {"d_ci": SIZE.d_gamma, "d_mlp": SIZE.d_gamma_mlp, "n_blocks": 1, "n_heads": 4}
    config = VPDConfig(steps=1000, batch_size=SIZE.batch, sites=sites, C=SIZE.C[0], gamma=gamma)
    masked_model = MaskedModel(new_decomposition(model, config), model, fused_attention=True)
    masked_model.__enter__()  # for as long as the benchmark runs
    trainer = Trainer(masked_model, config, (SIZE.batch, SIZE.context))
    if whole:
        trainer.engine.starts_late = False
    other = target_of(SIZE, torch.device("cpu"))
    decomposition: Decomposition = new_decomposition(other, config)

    def report() -> object:
        with patch.object(Sample, "starts_late", False) if whole else nullcontext():
            return evaluate(decomposition, other, tokens, ATTACK)

    return {"step": lambda: trainer.step(tokens), "evaluation": report}


def main() -> None:
    """Measures and writes the record."""
    parser = harness.parser("partial", __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="that count")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made, record = {name: variants(*case) for name, case in CASES.items()}, {}
    for what in ("step", "evaluation"):
        seconds = harness.seconds_in_turn({name: made[name][what] for name in CASES}, rounds=options.rounds, warm_up=1)
        record[what] = {
            name: {
                "seconds": round(statistics.median(times), 4),
                **{f"over {base}": round(harness.ratio(seconds, name, base), 3) for base in CASES if base != name},
            }
            for name, times in seconds.items()
        }
    harness.write(options.out, record, "partial", blocks=SIZE.layers, rounds=options.rounds)


if __name__ == "__main__":
    main()
