"""Tokens per second of the processor in functions that read data, as a share of what the model and Γ alone allow.

    python -m benchmarks.throughput               # writes benchmarks/results/throughput.json (about two minutes)

On the bundled model and decomposition, in turn, medians over rounds, in the processor's seconds, which other work on the machine
changes little:

``model_and_gamma``   the model's clean pass and Γ, batch by batch: what the others cannot do without
``importances``       ``causal_importances``
``modes``             ``evaluate`` with its table of modes alone: no attack, no control

``share`` is the time of ``model_and_gamma`` over a function's. Harvest is in ``harvest.json`` (``benchmarks.harvest``).
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import torch

import tl_vpd
from benchmarks import harness
from tl_vpd.evaluation import EvaluationConfig, evaluate
from tl_vpd.forward import MaskedModel

BATCH = 16
MODES = EvaluationConfig(measures=(), budgets=(), controls=False, batch_size=BATCH)


def functions(rows: int) -> tuple[int, dict[str, Callable[[], object]]]:
    """How many tokens are read, and what reads them."""
    model, vpd, tokens = (
        tl_vpd.bundled.model(),
        tl_vpd.bundled.decomposition(),
        tl_vpd.bundled.tokens("validation")[:rows],
    )
    batches = tokens.split(BATCH)

    @torch.no_grad()
    def model_and_gamma() -> None:
        with MaskedModel(vpd, model) as masked_model:
            for batch in batches:
                vpd.importances(masked_model.clean(batch)[1])

    return tokens.numel(), {
        "model_and_gamma": model_and_gamma,
        "importances": lambda: [vpd.causal_importances(model, batch) for batch in batches],
        "modes": lambda: evaluate(vpd, model, tokens, MODES),
    }


def main() -> None:
    """Measures and writes the record."""
    parser = harness.parser("throughput", __doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    n, variants = functions(arguments.rows)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, function in variants.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    record = {
        name: {
            "tokens_per_cpu_second": round(n / statistics.median(times)),
            "share": round(harness.ratio(seconds, "model_and_gamma", name), 3),
        }
        for name, times in seconds.items()
    }
    harness.write(arguments.out, record, "throughput", tokens=n, rounds=arguments.rounds)
    print(record)


if __name__ == "__main__":
    main()
