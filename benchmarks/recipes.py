"""Which choices of the recipe pay, at equal time, on the bundled model: each one beside the base it changes.

    python -m benchmarks.recipes --minutes 6 --seeds 0 1 2              # benchmarks/results/recipes.json
    python -m benchmarks.recipes --choices base one_ascent --minutes 6

The base is the recipe of the bundled decomposition with the paper's losses, passes and adversary. Every run has one thread and
the same processor minutes: its first steps are timed, which sets the number of steps, so that schedules end when the time does.
Measured on 4,096 validation tokens: L0 per token, the KL of stochastic and of rounded masks, of 20 steps of the fresh adversary,
the unmasked KL, and the KL of rounded masks at the thresholds that leave ``L0_AT`` subcomponents per token, which compares runs
of unequal L0. Runs in the file are kept, so a stopped command goes on.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from benchmarks import harness
from scripts.bundled import corpus
from scripts.bundled.train_decomposition import CONTEXT, ROWS
from tl_vpd import bundled
from tl_vpd.bundled.recipe import CONFIG
from tl_vpd.evaluation import EvaluationConfig, evaluate
from tl_vpd.forward import MaskedModel
from tl_vpd.training import SavingConfig, Trainer, VPDConfig, decompose, new_decomposition

BASE: dict[str, Any] = {
    "merged": 0.0,
    "minimality": {"kind": "power"},
    "adversary": {"lr": 0.02, "inner_steps": 2, "betas": (0.5, 0.99)},
    "optimizer": {"lr": 1e-3},
}
ONE_ASCENT = {**BASE["adversary"], "inner_steps": 1, "betas": (0.01, 0.99)}
SMOOTH = {"kind": "smooth_l0", "normalised": True}
CHOICES: dict[str, dict[str, Any]] = {
    "base": {},
    "bidirectional": {"gamma": {"causal": False}},
    "one_ascent": {"adversary": ONE_ASCENT},
    "merged": {"merged": 0.5},
    "merged, one ascent": {"merged": 0.5, "adversary": ONE_ASCENT},
    "merged 0.9, one ascent": {"merged": 0.9, "adversary": ONE_ASCENT},
    "smooth_l0": {"minimality": SMOOTH},
    "gamma_clip": {"optimizer": {**BASE["optimizer"], "gamma_clip": 0.1}},
    "muon": {"optimizer": {**BASE["optimizer"], "kind": "muon"}},
    "locality": {"coefficients": {"locality": 3e-5}},
    "residual": {"gamma": {"reads": "residual"}},
    "late adversary": {"adversary": {**BASE["adversary"], "start": 0.2}},
    "pool of 4": {"adversary": {**BASE["adversary"], "pool": 4}},
}
"""What each choice changes of the base; sections are merged field by field."""
L0_AT = (60, 100)


def config_of(choice: str, *, steps: int, seed: int) -> VPDConfig:
    """The base's config with one choice."""
    fields = {**CONFIG.model_dump(exclude_unset=True), **BASE}
    fields["gamma"] = {**fields["gamma"], "causal": True}
    for name, change in CHOICES[choice].items():
        fields[name] = {**fields.get(name, {}), **change} if name in ("gamma", "coefficients") else change
    return VPDConfig.model_validate({**fields, "steps": steps, "seed": seed})


def seconds_per_step(model: nn.Module, rows: Int[Tensor, "n pos"], config: VPDConfig) -> float:
    """The median processor time of a step."""
    size = config.batch_size
    with MaskedModel(new_decomposition(model, config), model, fused_attention=True) as masked_model:
        trainer = Trainer(masked_model, config, (size, rows.shape[1]))
        times = []
        for i in range(10):
            start = time.process_time()
            trainer.step(rows[size * i : size * (i + 1)])
            times.append(time.process_time() - start)
    return statistics.median(times[2:])


def kl_at(sweep: pd.DataFrame, l0: float) -> float:
    """The sweep's KL at an L0, between its points linear in log L0 and KL; NaN outside of it."""
    points = sweep.sort_values("l0")
    x = np.log(points["l0"].clip(lower=1e-9))
    inside = x.iloc[0] <= math.log(l0) <= x.iloc[-1]
    return float(np.interp(math.log(l0), x, points["kl"])) if inside else math.nan


def measured(
    model: nn.Module, rows: Int[Tensor, "n pos"], choice: str, *, seed: int, minutes: float
) -> dict[str, float | int | None]:
    """Trains one choice for the minutes and gives its figures."""
    seconds = seconds_per_step(model, rows, config_of(choice, steps=1000, seed=seed))
    config = config_of(choice, steps=max(1, round(60 * minutes / seconds)), seed=seed)
    start = time.process_time()
    run = decompose(model, rows, config, saving=SavingConfig(log_every=100), progress=False)
    cpu_minutes = (time.process_time() - start) / 60
    settings = EvaluationConfig(budgets=(20,), controls=False, measures=("sparsity_sweep",))
    record = evaluate(run.decomposition, model, bundled.tokens("validation")[:32], settings).record
    sweep = pd.DataFrame(record["tables"]["sparsity_sweep"])
    figures = {
        "l0": record["l0"],
        **{f"{mode}_kl": record["kl"][mode] for mode in ("unmasked", "stochastic", "rounded")},
        "pgd_20_kl": record["pgd_kl"]["20"],
        **{f"kl_at_l0_{l0}": kl_at(sweep, l0) for l0 in L0_AT},
    }
    rounded = {name: None if math.isnan(value) else round(float(value), 4) for name, value in figures.items()}
    return {"steps": config.steps, "cpu_minutes": round(cpu_minutes, 2), **rounded}


def main() -> None:
    """The command."""
    parser = harness.parser("recipes", __doc__)
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=list(CHOICES), help="which choices")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the decompositions")
    parser.add_argument("--minutes", type=float, default=6, help="processor minutes per run")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    model = bundled.model()
    training, _ = corpus.split(corpus.files())
    stream = corpus.token_stream(corpus.load_tokenizer(bundled.MODEL), training)
    rows = torch.from_numpy(corpus.windows(stream, CONTEXT, ROWS, seed=3).astype(np.int64))
    record = harness.read(options.out)
    for seed in options.seeds:
        for choice in options.choices:
            runs = record.setdefault("choices", {}).setdefault(choice, {})
            if str(seed) not in runs:
                runs[str(seed)] = measured(model, rows, choice, seed=seed, minutes=options.minutes)
                record.pop("settings", None)
                harness.write(options.out, record, "recipes", minutes=options.minutes, validation_tokens=4096)


if __name__ == "__main__":
    main()
