"""Which choices of the recipe pay, at equal time, on the bundled model: each one beside the base it changes.

    python -m benchmarks.recipes --seconds 40 --seeds 0 1 2            # benchmarks/results/recipes.json, docs/training.md
    python -m benchmarks.recipes --choices base merged --seconds 240 --out benchmarks/results/recipes_long.json
    python -m benchmarks.recipes --page                                # only the table, from the file

The base is the recipe of the bundled decomposition, applied to block 1 with rows of 64 tokens and a Γ of one block, so that a
run is short; ``--whole`` decomposes both blocks with the recipe's Γ on rows of 128. Every run has one thread and the same
processor seconds: a choice's steps are timed first, which sets their number, so that schedules end when the time does.
Measured on 32 validation rows: L0 per token, KL of stochastic and rounded masks, of 20 steps of the fresh adversary (8 rows),
and the KL of rounded masks at the thresholds that leave the smallest run's L0, which compares runs of unequal L0. Runs in the
file are kept, so a stopped command goes on; ``--until`` ends it after so many seconds.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from benchmarks import harness
from scripts.site.tables import fill, markdown
from tl_vpd import bundled
from tl_vpd.bundled.recipe import CONFIG
from tl_vpd.evaluation import EvaluationConfig, evaluate
from tl_vpd.forward import MaskedModel
from tl_vpd.training import Run, SavingConfig, Trainer, VPDConfig, decompose, new_decomposition

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
SHORT: dict[str, Any] = {"sites": ("blocks.1.*",), "gamma": {"d_ci": 96, "n_blocks": 1}}
"""What is cheaper than the bundled recipe, unless ``--whole``."""
CHOICES: dict[str, dict[str, Any]] = {
    "base": {},
    "power": {"minimality": {}},
    "two ascents": {"adversary": {"inner_steps": 2, "betas": (0.5, 0.99)}},
    "Γ not clipped": {"optimizer": {"gamma_clip": None}},
    "merged": {"merged": 0.5},
    "merged, power": {"merged": 0.5, "minimality": {}},
    "muon": {"optimizer": {"kind": "muon"}},
    "bidirectional": {"gamma": {"causal": False}},
    "locality": {"coefficients": {"locality": 3e-5}},
    "late adversary": {"adversary": {"start": 0.2}},
    "residual": {"gamma": {"reads": "residual"}},
    "pool of 4": {"adversary": {"pool": 4}},
}
"""What each choice changes of the base; sections are merged field by field, except that ``power`` is the paper's minimality."""
COLUMNS = {
    "l0": "L0",
    "stochastic": "KL, stochastic",
    "rounded": "rounded",
    "pgd_20": "PGD-20",
    "at_l0": "rounded at equal L0",
}


def config_of(choice: str, *, steps: int, seed: int, whole: bool = False) -> VPDConfig:
    """The base's config with one choice."""
    fields = CONFIG.model_dump(exclude_unset=True)
    for change in ({} if whole else SHORT, CHOICES[choice]):
        for name, value in change.items():
            merge = isinstance(value, dict) and name != "minimality"
            fields[name] = {**fields.get(name, {}), **value} if merge else value
    return VPDConfig.model_validate({**fields, "steps": steps, "seed": seed})


def rows_of(split: str, *, whole: bool) -> Int[Tensor, "n pos"]:
    """The bundled rows, of 64 tokens unless ``whole``."""
    return bundled.tokens(split)[:, : 128 if whole else 64].contiguous()


def seconds_per_step(model: nn.Module, rows: Int[Tensor, "n pos"], config: VPDConfig) -> float:
    """The mean over a run of a step's processor time, of medians before and after its adversary has started."""
    start = config.adversary.start
    with_it = config.model_copy(update={"adversary": config.adversary.model_copy(update={"start": 0.0})})
    seconds = median_seconds(model, rows, with_it)
    return seconds if start == 0 else (1 - start) * seconds + start * median_seconds(model, rows, config)


def median_seconds(model: nn.Module, rows: Int[Tensor, "n pos"], config: VPDConfig) -> float:
    """The median processor time of a run's first steps."""
    size, times = config.batch_size, []
    with MaskedModel(new_decomposition(model, config), model, fused_attention=True) as masked_model:
        trainer = Trainer(masked_model, config, (size, rows.shape[1]))
        for i in range(9):
            start = time.process_time()
            trainer.step(rows[size * i : size * (i + 1)])
            times.append(time.process_time() - start)
    return statistics.median(times[2:])


def trained(model: nn.Module, rows: Int[Tensor, "n pos"], config: VPDConfig) -> tuple[Run, float]:
    """A finished run and its processor seconds."""
    start = time.process_time()
    run = decompose(model, rows, config, saving=SavingConfig(log_every=100), progress=False)
    return run, time.process_time() - start


def measured(run: Run, model: nn.Module, rows: Int[Tensor, "n pos"]) -> dict[str, Any]:
    """A run's figures, with its sweep of (L0, KL) over thresholds."""
    settings = EvaluationConfig(budgets=(20,), attack_rows=8, controls=False, measures=("sparsity_sweep",))
    record = evaluate(run.decomposition, model, rows, settings).record
    sweep = [[row["l0"], row["kl"]] for row in record["tables"]["sparsity_sweep"]]
    figures = {
        "l0": record["l0"],
        "alive": record["alive"],
        "zero": record["kl"]["zero"],
        "pgd_20": record["pgd_kl"]["20"],
    }
    figures |= {mode: record["kl"][mode] for mode in ("unmasked", "stochastic", "rounded")}
    return {**{name: float(f"{value:.5g}") for name, value in figures.items()}, "sweep": np.round(sweep, 5).tolist()}


def kl_at(sweep: list[list[float]], l0: float) -> float:
    """The sweep's KL at an L0, between its points linear in log L0 and KL; NaN outside of it."""
    x, kl = np.array(sorted(sweep)).T
    x = np.log(np.maximum(x, 1e-9))
    reached = x[0] <= math.log(l0) <= x[-1] + 1e-3  # records are rounded
    return float(np.interp(math.log(l0), x, kl)) if reached else math.nan


def table(record: dict[str, Any]) -> str:
    """The file's runs in Markdown: means over seeds with the smallest and the largest."""
    runs = {name: list(entry["seeds"].values()) for name, entry in record["choices"].items() if entry["seeds"]}
    l0 = min(run["l0"] for of_seeds in runs.values() for run in of_seeds)
    rows = []
    for name, of_seeds in runs.items():
        values: dict[str, list[float]] = {key: [run[key] for run in of_seeds] for key in COLUMNS if key != "at_l0"}
        values["at_l0"] = [kl_at(run["sweep"], l0) for run in of_seeds]
        cells = {title: _range(values[key], 0 if key == "l0" else 3) for key, title in COLUMNS.items()}
        rows.append({"choice": name, "seeds": str(len(of_seeds)), "steps": str(of_seeds[0]["steps"]), **cells})
    return markdown(rows)


def _range(values: list[float], digits: int) -> str:
    finite = [v for v in values if not math.isnan(v)]
    if len(finite) < len(values):
        return "not reached"
    mean, low, high = (f"{v:.{digits}f}" for v in (statistics.mean(finite), min(finite), max(finite)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    """The command."""
    parser = harness.parser("recipes", __doc__)
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=list(CHOICES), help="which choices")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the decompositions")
    parser.add_argument("--seconds", type=float, default=40, help="processor seconds per run")
    parser.add_argument("--until", type=float, default=math.inf, help="start no run after so many seconds")
    parser.add_argument("--whole", action="store_true", help="both blocks, the recipe's Γ and rows of 128 tokens")
    parser.add_argument("--page", action="store_true", help="only write the table into docs/training.md")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    model, start = bundled.model(), time.monotonic()
    data = {split: rows_of(split, whole=options.whole) for split in ("training", "validation")}
    settings = {"seconds": options.seconds, "whole": options.whole}
    record = harness.read(options.out) or {"choices": {}, "settings": settings}
    if not options.page and {name: record["settings"][name] for name in settings} != settings:
        parser.error(f"{options.out} was measured with {record['settings']}: choose another --out.")
    for seed in [] if options.page else options.seeds:
        for choice in options.choices:
            entry = record["choices"].get(choice, {"seeds": {}})
            if str(seed) in entry["seeds"] or time.monotonic() - start > options.until:
                continue
            config = config_of(choice, steps=1000, seed=seed, whole=options.whole)
            per_step = entry.get("seconds_per_step") or seconds_per_step(model, data["training"], config)
            steps = max(1, round(options.seconds / per_step))
            run, seconds = trained(model, data["training"], config.model_copy(update={"steps": steps}))
            figures = measured(run, model, data["validation"][:32])
            record = harness.read(options.out) or record  # another process may have written meanwhile
            entry = record["choices"].setdefault(choice, {"seconds_per_step": per_step, "seeds": {}})
            entry["seeds"][str(seed)] = {"steps": steps, "cpu_seconds": round(seconds, 1), **figures}
            record.pop("settings")
            harness.write(options.out, record, "recipes", **settings)
            record = harness.read(options.out)
    if options.out.parent == harness.RESULTS:
        fill(PAGE, lambda name: table(harness.read(harness.RESULTS / f"{name}.json")))  # "recipes" and "recipes_long"


if __name__ == "__main__":
    main()
