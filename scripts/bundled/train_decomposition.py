"""Makes the bundled decomposition again: ``python -m scripts.bundled.train_decomposition --out DIR``.

It trains on windows of the standard library's training files, tokenised with the bundled tokenizer, for about an hour on
two cores, and evaluates the result (another ten minutes). ``--resume`` goes on with a run that was stopped.
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
from tl_vpd.bundled.recipe import CONFIG
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation import EvaluationConfig, evaluate
from tl_vpd.training import SavingConfig, decompose

CONTEXT = 128
ROWS = 40_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--model", type=Path, default=bundled.MODEL, help="folder of the model (default: the bundled one)"
    )
    parser.add_argument("--steps", type=int, default=CONFIG.steps)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    training, _ = corpus.split(corpus.files())
    stream = corpus.token_stream(corpus.load_tokenizer(arguments.model), training)
    rows = torch.from_numpy(corpus.windows(stream, CONTEXT, ROWS, seed=3).astype(np.int64))
    config = CONFIG.model_copy(update={"steps": arguments.steps})
    model = bundled.model(folder=arguments.model)
    run = decompose(model, rows, config, saving=SavingConfig(folder=arguments.out), resume=arguments.resume)
    if run.finished:
        finish(run.decomposition, model, arguments.model, arguments.out)


def finish(vpd: Decomposition, model: nn.Module, source: Path, folder: Path) -> None:
    """Evaluates on 8,192 validation tokens and puts record and training log beside the decomposition."""
    report = evaluate(
        vpd,
        model,
        bundled.tokens("validation", source)[:64],
        EvaluationConfig(starts={20: 3}, curve=bundled.training_record(source)["curve"]),
    )
    report.save(folder / "decomposition" / "metrics.json")
    log = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "decomposition" / "training.jsonl").write_text("".join([*log[::10], log[-1]]), encoding="utf-8")


if __name__ == "__main__":
    main()
