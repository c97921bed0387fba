"""Recipes of training at equal wall-clock, on the bundled model: importances needed (L0) against the attack's KL.

    python -m benchmarks.recipes --minutes 10        # writes benchmarks/results/recipes.json (two runs at a time)

Every run has one core and the same minutes; how many steps fit in is found from its own first ones, so that schedules end when
the time does. Each recipe is run with several importance coefficients, which gives its front. Measured on 2,048 validation
tokens: L0 a token, the KL of 20 steps of the fresh adversary, of stochastic and of rounded masks, and the unmasked KL.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tl_vpd.bundled.recipe import CONFIG
from tl_vpd.training import AdversaryConfig, Coefficients, SavingConfig, VPDConfig

RESULT = Path(__file__).parent / "results" / "recipes.json"
IMPORTANCE = {"paper": (3e-4, 1.2e-3), "newer": (3e-4, 1.2e-3)}
BASE: dict[str, Any] = {**CONFIG.model_dump(), "adversary": AdversaryConfig(lr=0.02)}


def config_of(recipe: str, importance: float, steps: int) -> VPDConfig:
    """The bundled decomposition's settings with one recipe's losses, passes and adversary."""
    if recipe == "paper":
        own: dict[str, Any] = {"coefficients": Coefficients(delta=1e5, importance=importance, frequency=importance / 2)}
    else:
        own = {
            "merged": True,
            "minimality": {
                "kind": "smooth_l0",
                "frequency_reference": 1024.0,
                "frequency_half_life": 200.0,
                "warm_up": CONFIG.minimality.warm_up,
            },
            "faithfulness": {"kind": "relative"},
            "adversary": AdversaryConfig(lr=0.02, pool=8),
            "coefficients": Coefficients(delta=1e3, importance=importance, frequency=importance / 2),
        }
    return VPDConfig(**{**BASE, **own, "steps": steps})


def one(recipe: str, importance: float, minutes: float, folder: Path) -> dict[str, Any]:
    """Trains and measures; the decomposition is left in ``folder``."""
    import numpy as np

    from scripts.bundled import corpus
    from scripts.bundled.train_decomposition import CONTEXT, ROWS
    from tl_vpd import bundled
    from tl_vpd.evaluation import evaluate
    from tl_vpd.forward import MaskedModel
    from tl_vpd.training import Trainer, decompose, new_decomposition

    torch.set_num_threads(1)
    training, _ = corpus.split(corpus.files())
    stream = corpus.token_stream(corpus.load_tokenizer(bundled.MODEL), training)
    rows = torch.from_numpy(corpus.windows(stream, CONTEXT, ROWS, seed=3).astype(np.int64))
    model = bundled.model()
    trial = config_of(recipe, importance, 1000)
    with MaskedModel(new_decomposition(model, trial), model, fused_attention=True) as masked_model:
        trainer, times = Trainer(masked_model, trial, (trial.batch_size, CONTEXT)), []
        for i in range(12):
            start = time.perf_counter()
            trainer.step(rows[8 * i : 8 * i + 8])
            times.append(time.perf_counter() - start)
    seconds = sorted(times[2:])[5]
    config = config_of(recipe, importance, max(1, int(minutes * 60 / seconds)))
    start = time.perf_counter()
    run = decompose(model, rows, config, saving=SavingConfig(log_every=100), progress=False)
    taken = time.perf_counter() - start
    run.decomposition.save(folder)
    found = evaluate(
        run.decomposition, model, bundled.tokens("validation")[:16], budgets=(20,), controls=False, measures=()
    ).record
    kl = {mode: found["kl"][mode] for mode in ("unmasked", "stochastic", "rounded")}
    return {
        "recipe": recipe,
        "importance": importance,
        "steps": config.steps,
        "minutes": round(taken / 60, 2),
        "l0": round(float(found["l0"]), 1),
        "pgd_20_kl": round(float(found["pgd_kl"]["20"]), 4),
        **{f"{mode}_kl": round(float(value), 4) for mode, value in kl.items()},
    }


def main() -> None:
    """Runs what is not there yet and writes the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
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
    wanted = [
        (r, i) for pair in zip(*([(r, i) for i in own] for r, own in IMPORTANCE.items()), strict=True) for r, i in pair
    ]
    missing = [(r, i) for r, i in wanted if not (arguments.runs / f"{r}-{i}" / "result.json").exists()]
    running: list[subprocess.Popen[bytes]] = []
    for recipe, importance in missing:
        command = [sys.executable, "-m", "benchmarks.recipes", "--one", recipe, str(importance)]
        command += ["--minutes", str(arguments.minutes), "--runs", str(arguments.runs)]
        running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        if len(running) == arguments.at_once:
            _finish(running)
    _finish(running)
    runs = [json.loads((arguments.runs / f"{r}-{i}" / "result.json").read_text(encoding="utf-8")) for r, i in wanted]
    settings = {"minutes": arguments.minutes, "threads": 1, "seed": CONFIG.seed, "validation_tokens": 2048}
    settings |= {"torch": torch.__version__, "transformer_lens": version("transformer_lens")}
    arguments.out.write_text(json.dumps({"runs": runs, "settings": settings}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(runs, indent=2))


def _finish(running: list[subprocess.Popen[bytes]]) -> None:
    while running:
        if running.pop(0).wait():
            raise SystemExit("A run has failed; the others' results are kept.")


if __name__ == "__main__":
    main()
