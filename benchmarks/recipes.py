"""Recipes of training at equal wall-clock time, on the bundled model: L0 against the KL divergence under attack.

    python -m benchmarks.recipes --minutes 10        # writes benchmarks/results/recipes.json (two runs at a time)

Every run has one core and the same minutes; its first steps are timed to set the number of steps, so that schedules end when
the time does. Each recipe is run with several importance coefficients, which gives its front. Measured on 2,048 validation
tokens: L0 per token, the KL of 20 steps of the fresh adversary, of stochastic and of rounded masks, and the unmasked KL.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from tl_vpd.bundled.recipe import CONFIG
from tl_vpd.training import AdversaryConfig, Coefficients, SavingConfig, VPDConfig

IMPORTANCE = {"paper": (3e-4, 1.2e-3), "newer": (3e-4, 1.2e-3)}
BASE: dict[str, Any] = {**CONFIG.model_dump(), "adversary": AdversaryConfig(lr=0.02)}


def config_of(recipe: str, importance: float, steps: int) -> VPDConfig:
    """The bundled decomposition's settings with one recipe's losses, passes and adversary."""
    if recipe == "paper":
        changes: dict[str, Any] = {
            "coefficients": Coefficients(
                delta=1e5, importance=importance, frequency=importance / 2, schedule=CONFIG.coefficients.schedule
            )
        }
    else:
        changes = {
            "merged": 0.5,
            "minimality": {
                "kind": "smooth_l0",
                "frequency_reference": 1024.0,
                "frequency_half_life": 200.0,
            },
            "faithfulness": {"kind": "relative"},
            "adversary": AdversaryConfig(lr=0.02, pool=8),
            "coefficients": Coefficients(
                delta=1e3, importance=importance, frequency=importance / 2, schedule=CONFIG.coefficients.schedule
            ),
        }
    return VPDConfig(**{**BASE, **changes, "steps": steps})


def one(recipe: str, importance: float, minutes: float, folder: Path) -> dict[str, Any]:
    """Trains and measures; the decomposition is left in ``folder``."""
    import numpy as np

    from scripts.bundled import corpus
    from scripts.bundled.train_decomposition import CONTEXT, ROWS
    from tl_vpd import bundled
    from tl_vpd.evaluation import EvaluationConfig, evaluate
    from tl_vpd.forward import MaskedModel
    from tl_vpd.training import Trainer, decompose, new_decomposition

    torch.set_num_threads(1)
    training, _ = corpus.split(corpus.files())
    stream = corpus.token_stream(corpus.load_tokenizer(bundled.MODEL), training)
    rows = torch.from_numpy(corpus.windows(stream, CONTEXT, ROWS, seed=3).astype(np.int64))
    model = bundled.model()
    trial = config_of(recipe, importance, 1000)
    with MaskedModel(new_decomposition(model, trial), model, fused_attention=True) as masked_model:
        trainer = Trainer(masked_model, trial, (trial.batch_size, CONTEXT))
        times = [harness.seconds_of(lambda i=i: trainer.step(rows[8 * i : 8 * i + 8])) for i in range(12)]
    seconds = statistics.median(times[2:])
    config = config_of(recipe, importance, max(1, int(minutes * 60 / seconds)))
    start = time.perf_counter()
    run = decompose(model, rows, config, saving=SavingConfig(log_every=100), progress=False)
    duration = time.perf_counter() - start
    run.decomposition.save(folder)
    record = evaluate(
        run.decomposition,
        model,
        bundled.tokens("validation")[:16],
        EvaluationConfig(budgets=(20,), controls=False, measures=()),
    ).record
    kl = {mode: record["kl"][mode] for mode in ("unmasked", "stochastic", "rounded")}
    return {
        "recipe": recipe,
        "importance": importance,
        "steps": config.steps,
        "minutes": round(duration / 60, 2),
        "l0": round(float(record["l0"]), 1),
        "pgd_20_kl": round(float(record["pgd_kl"]["20"]), 4),
        **{f"{mode}_kl": round(float(value), 4) for mode, value in kl.items()},
    }


def main() -> None:
    """Runs what is not there yet and writes the record after each."""
    parser = harness.parser("recipes", __doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="where the decompositions go")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "IMPORTANCE"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if arguments.one:
        recipe, importance = arguments.one
        folder = arguments.runs / f"{recipe}-{importance}"
        result = one(recipe, float(importance), arguments.minutes, folder)
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        return
    pairs = zip(*([(r, i) for i in coefficients] for r, coefficients in IMPORTANCE.items()), strict=True)
    runs = [run for pair in pairs for run in pair]
    results = {run: arguments.runs / f"{run[0]}-{run[1]}" / "result.json" for run in runs}
    running: list[subprocess.Popen[bytes]] = []
    for recipe, importance in [run for run in runs if not results[run].exists()]:
        command = [sys.executable, "-m", "benchmarks.recipes", "--one", recipe, str(importance)]
        command += ["--minutes", str(arguments.minutes), "--runs", str(arguments.runs)]
        running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        if len(running) == arguments.at_once:
            _finish(running)
    _finish(running)
    record = {"runs": [harness.read(path) for path in results.values()]}
    settings = {"minutes": arguments.minutes, "threads_per_run": 1, "seed": CONFIG.seed, "validation_tokens": 2048}
    harness.write(arguments.out, record, "recipes", **settings)
    print(json.dumps(record["runs"], indent=2))


def _finish(running: list[subprocess.Popen[bytes]]) -> None:
    while running:
        if running.pop(0).wait():
            raise SystemExit("A run has failed; the others' results stay.")


if __name__ == "__main__":
    main()
