"""The first hour with a model: first tries on models of several sizes, with the clock, and two that go wrong.

    python -m benchmarks.first_hour --model toy block bundled collapsed dense defaults
    python -m benchmarks.first_hour --model smol middle           # pip install 'tl_vpd[real]'; about an hour on one core

Each run becomes an entry of benchmarks/results/first_hour.json: its settings, seconds by the clock and of the processor, the
yardstick (what ablating the sites costs), looks at the run under rounded masks, its metrics, and an evaluation on rows that it
was not trained on: rounded masks and L0, 20 steps of the standard adversary. An interrupted run continues from its folder in
build/.
The sizes that need another machine are computed by the planner and say so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from tl_vpd import bundled
from tl_vpd.evaluation import EvaluationConfig, evaluate
from tl_vpd.planning import Target, TransformerShape, first_try, footprint
from tl_vpd.training import ExecutionConfig, SavingConfig, VPDConfig, decompose

WORK = Path("build/first_hour")
HELD_OUT = 32
"""Rows of the evaluation."""
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "toy": ("toy", {"steps": 1_000, "batch_size": 32}),
    "block": ("bundled", {"steps": 300, "sites": "blocks.1.*", "yardstick": 1.45}),
    "bundled": ("bundled", {"steps": 300}),
    "collapsed": ("bundled", {"steps": 300, "minimality": 1_000.0}),
    "dense": ("bundled", {"steps": 300, "minimality": 1e-3}),
    "defaults": ("bundled", {"steps": 300, "batch_size": 4, "defaults": True}),
    "smol": ("smol", {"steps": 250, "sites": "blocks.29.*"}),
    "middle": ("smol", {"steps": 100, "sites": "blocks.15.*", "yardstick": 0.2}),
}
"""By name: the model, and options of ``settings``."""
GPT2 = TransformerShape(layers=12, d_model=768, heads=12, d_mlp=3072, vocabulary=50257, others=768 * 1024)
SMOLLM2 = TransformerShape(layers=30, d_model=576, heads=9, kv_heads=3, d_mlp=1536, gated=True, vocabulary=49152)
LLAMA_1B = TransformerShape(
    layers=16, d_model=2048, heads=32, kv_heads=8, d_mlp=8192, gated=True, vocabulary=128256, itemsize=2
)
COMPUTED = {
    "SmolLM2-135M, defaults": (SMOLLM2, VPDConfig(), 512, ExecutionConfig()),
    "SmolLM2-135M, a first try": (SMOLLM2, first_try(Target.of(SMOLLM2), steps=2_000), 64, ExecutionConfig()),
    "GPT-2 small, a first try on one block": (
        GPT2,
        first_try(Target.of(GPT2), sites="blocks.11.*"),
        64,
        ExecutionConfig(),
    ),
    "1B Llama-like, a first try on one block": (
        LLAMA_1B,
        first_try(Target.of(LLAMA_1B), sites="blocks.15.*"),
        64,
        ExecutionConfig(precision="bfloat16"),
    ),
}
"""Shape, settings, tokens in a row, execution."""


def settings(model: Any, *, minimality: float = 1.0, defaults: bool = False, **options: Any) -> VPDConfig:
    """A first try on a model, with other coefficients of the minimality losses, or the paper's settings in a short run."""
    if defaults:
        return VPDConfig(**options)
    config = first_try(model, **options)
    c = config.coefficients
    changed = {"importance": minimality * c.importance, "frequency": minimality * c.frequency}
    return config.model_copy(update={"coefficients": c.model_copy(update=changed)})


def toy() -> tuple[Any, Any, torch.Tensor]:
    """The two-layer induction model, trained if it is not stored."""
    from benchmarks.toys import WORK as TOYS_WORK
    from benchmarks.toys import target_of
    from tl_vpd.toys.recipes import TOYS

    model = target_of("induction", 0, TOYS_WORK)
    batches = TOYS["induction"].batches(32)
    return model, batches, TOYS["induction"].batches(HELD_OUT, seed=1).at(0)


def small() -> tuple[Any, Any, torch.Tensor]:
    """The bundled model and its tokens."""
    return bundled.model(), bundled.tokens("training"), bundled.tokens("validation")[:HELD_OUT]


def smol() -> tuple[Any, Any, torch.Tensor]:
    """SmolLM2 and rows of 64 tokens of the standard library's source."""
    from scripts.bundled import corpus
    from tl_vpd.recipe import text_windows

    model = bundled.smollm2()
    training, validation = corpus.split(corpus.files())
    rows, others = (
        text_windows(model, [path.read_text(encoding="utf-8") for path in paths], 64)
        for paths in (training[::8], validation[::8])
    )
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))
    return model, rows, others[order[:HELD_OUT]]


MODELS: dict[str, Callable[[], tuple[Any, Any, torch.Tensor]]] = {"toy": toy, "bundled": small, "smol": smol}


def one(name: str) -> dict[str, Any]:
    """Runs and measures one entry."""
    model_name, changes = RUNS[name]
    clock = [time.perf_counter()]
    model, tokens, held_out = MODELS[model_name]()
    clock.append(time.perf_counter())
    config, folder = settings(model, **changes), WORK / name
    resume = any((folder / "state").glob("step-*"))
    warnings = _Messages()
    logging.getLogger("tl_vpd").addHandler(warnings)
    cpu = time.process_time()
    saving = SavingConfig(folder=folder, save_every=50, log_every=max(1, config.steps // 100))
    run = decompose(model, tokens, config, saving=saving, resume=resume)
    cpu = time.process_time() - cpu
    clock.append(time.perf_counter())
    logging.getLogger("tl_vpd").removeHandler(warnings)
    record = evaluate(
        run.decomposition,
        model,
        held_out,
        EvaluationConfig(measures=(), budgets=(20,), attack_rows=8, controls=False, batch_size=4),
    ).record
    clock.append(time.perf_counter())
    zero = record["kl"]["zero"]
    return {
        "config": config.model_dump(mode="json"),
        "resumed": resume,
        "seconds": {
            stage: round(b - a, 1)
            for stage, (a, b) in zip(("prepare", "train", "evaluate"), pairwise(clock), strict=True)
        },
        "cpu_seconds_of_training": round(cpu, 1),
        "peak_mb": round(harness.peak_mb()),
        "subcomponents": run.decomposition.site_axis.total,
        "yardstick": round(zero, 4),
        "rounded_share": round(record["kl"]["rounded"] / zero, 4),
        "stochastic_share": round(record["kl"]["stochastic"] / zero, 4),
        "attacked_share": round(next(iter(record["pgd_kl"].values())) / zero, 4),
        "l0": round(record["l0"], 2),
        "warnings": warnings.texts,
        "checks": _columns(run.checks),
        "history": _columns(run.history[["step", "stochastic", "adversarial", "l0"]]),
    }


class _Messages(logging.Handler):
    """Collects warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _columns(table: Any) -> dict[str, list[float]]:
    return {name: [float(f"{x:.4g}") for x in values] for name, values in table.to_dict("list").items()}


def computed() -> dict[str, Any]:
    """What the planner says of sizes that were not run."""
    record = {}
    for name, (shape, config, context, execution) in COMPUTED.items():
        cost = footprint(Target.of(shape), config, context=context, execution=execution)
        record[name] = {
            "batch": [config.batch_size, context],
            "gib": round(cost.total / 2**30, 1),
            "tflop_per_step": round(cost.step_flops / 1e12, 3),
            "steps": config.steps,
        }
    return record


def main() -> None:
    parser = harness.parser("first_hour", __doc__)
    parser.add_argument("--model", nargs="+", choices=tuple(RUNS), default=[], help="which runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.model:
        entry = one(name)
        record = harness.read(options.out)
        record.pop("settings", None)
        runs = {**record.get("runs", {}), name: entry}
        harness.write(
            options.out, {"runs": {n: runs[n] for n in RUNS if n in runs}, "computed": computed()}, "first_hour"
        )


if __name__ == "__main__":
    main()
