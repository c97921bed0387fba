"""Makes the bundled decomposition again: ``python -m scripts.bundled.train_decomposition --out DIR``.

It trains on windows of the standard library's training files, tokenised with the bundled tokenizer, for an hour and a half on
one core (``--precision bfloat16 --compile``), goes on from the result for a quarter of an hour, and evaluates it (ten minutes).
``--resume`` goes on with a run that was stopped.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn

from scripts.bundled import corpus
from tl_vpd import bundled
from tl_vpd.bundled.recipe import CONFIG, SETTLING
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation import EvaluationConfig, evaluate
from tl_vpd.training import ExecutionConfig, SavingConfig, VPDConfig, decompose

CONTEXT = 128
ROWS = 40_000
STAGES: dict[str, tuple[VPDConfig, int]] = {"first": (CONFIG, 3), "settled": (SETTLING, 4)}
"""A folder each, with the seed of its windows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--model", type=Path, default=bundled.MODEL, help="folder of the model (default: the bundled one)"
    )
    parser.add_argument("--steps", type=int, default=CONFIG.steps, help="of the first run; the second has a fifth")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of matrix products")
    parser.add_argument("--compile", action="store_true", help="compile the step (needs a C++ compiler)")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    training, _ = corpus.split(corpus.files())
    stream = corpus.token_stream(corpus.load_tokenizer(arguments.model), training)
    model = bundled.model(folder=arguments.model)
    execution = ExecutionConfig(precision=arguments.precision, compile=arguments.compile)
    start: Decomposition | bool = False
    for name, (config, seed) in STAGES.items():
        folder = arguments.out / name
        resume = start if not (arguments.resume and (folder / "state").is_dir()) else True
        rows = torch.from_numpy(corpus.windows(stream, CONTEXT, ROWS, seed=seed).astype(np.int64))
        steps = max(1, config.steps * arguments.steps // CONFIG.steps)
        config = config.model_copy(update={"steps": steps})
        run = decompose(model, rows, config, execution=execution, saving=SavingConfig(folder=folder), resume=resume)
        if not run.finished:
            return
        start = run.decomposition
    finish(run.decomposition, model, arguments.model, arguments.out)


def finish(vpd: Decomposition, model: nn.Module, source: Path, folder: Path) -> None:
    """Writes what ships into ``folder / "shipped"``: the decomposition in half precision, its training log and its evaluation.

    Figures are of what was written, on 8,192 validation tokens.
    """
    shipped = vpd.save(folder / "shipped", dtype=torch.float16)
    logs = [(folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True) for name in STAGES]
    rows = [row for log in logs for row in dict.fromkeys([*log[::10], log[-1]])]
    (shipped / "training.jsonl").write_text("".join(rows), encoding="utf-8")
    config = EvaluationConfig(
        measures=("sparsity_sweep", "future_leakage"),
        budgets=(20, 40, 80),
        starts={20: 3},
        curve=bundled.training_record(source)["curve"],
    )
    report = evaluate(Decomposition.load(shipped), model, bundled.tokens("validation", source)[:64], config)
    report.save(shipped / "metrics.json")


if __name__ == "__main__":
    main()
