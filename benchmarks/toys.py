"""Trains toys, decomposes them and compares with the truth, entry by entry into one file.

    python -m benchmarks.toys --toy tms_5_2 --method vpd spd apd --seeds 0 1 2
    python -m benchmarks.toys --toy grammar --only-target            trains (or reads) the model and measures its quality

An entry is a toy, a method and a seed; entries in the file are skipped, and an interrupted run continues. The target is
trained once per toy; it and the runs are stored in the folder --work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import toy_results as results
from tl_vpd.baselines import METHODS
from tl_vpd.evaluation.ground_truth import GroundTruth, ground_truth
from tl_vpd.files.atomic import make_folder
from tl_vpd.files.tensor_file import open_tensors, write_tensors
from tl_vpd.toys.recipes import TOYS, recipe
from tl_vpd.toys.toy import train

WORK = Path("build/toys")
ROWS = 128
"""Rows of data, never trained on, that counts and reconstruction are measured on."""
ESTIMATES = """
minutes on one core   target     vpd     spd     apd
  tms_5_2                0.2       3       9       2
  tms_5_2_id             0.2       3      12       3
  tms_40_10              1        13      23       6
  tms_40_10_id           1         8      45       ?
  compressed             0.6      25      75       -
  compressed_2           0.8      40     490       -
  compressed_3          10        55   36000       -
  induction              0.8      15      25       -
  grammar                1        37     110       -
(one seed; from the runs themselves, or a few steps times the recipe's; ? not timed, - no recipe)
"""
_out = Console(soft_wrap=True)


def target_of(name: str, seed: int, work: Path, *, steps: int | None = None, progress: bool = False) -> Any:
    """A toy's trained model: read from ``work``, or trained (``steps`` None: the toy's) and stored there."""
    toy = TOYS[name]
    path = work / f"{name}-target{seed}{'' if steps is None else f'-{steps}'}.safetensors"
    if path.exists():
        model = toy.build(seed)
        with open_tensors(path) as file:
            model.load_state_dict(model.state_dict() | {key: file.read(key) for key in file.shapes})
        return model.eval()
    model = train(toy, seed, steps=steps, progress=progress)
    make_folder(path.parent)
    # Only parameters: TransformerLens has -inf in a buffer, and what is stored must be finite.
    write_tensors(path, dict(model.named_parameters()), {"toy": name, "seed": seed, "steps": steps})
    return model


def measure(name: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One entry: trains or reads the target, decomposes, measures."""
    config, toy = recipe(name, method, seed=seed, steps=options.steps), TOYS[name]
    progress = not options.quiet
    model = target_of(name, options.target_seed, options.work, steps=options.target_steps, progress=progress)
    folder = options.work / f"{name}-{method}-{seed}-target{options.target_seed}-{config.steps}"
    # Three streams of data: of the target's training, of the decomposition, and of the measurement.
    data = toy.batches(config.batch_size, seed=seed)
    start = time.perf_counter()
    result = METHODS[method].run(model, data, config, folder=folder, progress=progress, compile=options.compile)
    seconds = time.perf_counter() - start
    inputs = toy.batches(ROWS, seed=-3).at(0)
    measures = ground_truth(result, model, inputs, toy.truth(model), output=toy.output, seed=seed)
    return {
        "seed": seed,
        "target": {"seed": options.target_seed, **_rounded(toy.quality(model))},
        "settings": config.model_dump(mode="json", exclude={"seed"}),
        "seconds": round(seconds, 1),
        "compiled": options.compile,
        **_flat(measures),
    }


def _flat(measures: GroundTruth) -> dict[str, Any]:
    """Measures as plain numbers: means over the sites with features, and every measure by site."""
    sites = measures.sites.set_index("site")
    by_site = {
        column: {site: round(float(value), 5) for site, value in sites[column].dropna().items()}
        for column in sites.columns
    }
    flat: dict[str, Any] = {name: round(float(sites[name].mean()), 5) for name in ("mmcs", "ml2r") if by_site[name]}
    flat |= {name: {site: int(n) for site, n in by_site[name].items()} for name in ("alive", "true")}
    flat["by_site"] = {name: values for name, values in by_site.items() if name not in ("alive", "true") and values}
    flat["latents"] = {
        row["latent"]: {"subcomponent": row["subcomponent"], **_rounded({k: row[k] for k in ("overlap", "chance")})}
        for row in measures.latents.to_dict("records")
    }
    needed = measures.needed.set_index("site")
    flat["needed"] = {site: _rounded({str(k): v for k, v in row.items()}) for site, row in needed.iterrows()}
    flat["reconstruction"] = _rounded(measures.reconstruction)
    return flat


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.toys",
        description=__doc__,
        epilog=ESTIMATES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    file = results.RESULTS
    parser.add_argument("--toy", nargs="+", required=True, choices=list(TOYS), help="which toys")
    parser.add_argument("--method", nargs="+", default=["vpd"], choices=list(METHODS), help="which methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the decomposition and its data")
    parser.add_argument("--target-seed", type=int, default=0, help="seed of the target")
    parser.add_argument("--steps", type=int, help="steps of the decomposition instead of the recipe's")
    parser.add_argument("--target-steps", type=int, help="steps of the target's training instead of the toy's")
    parser.add_argument("--out", type=Path, default=file, help=f"results (default {file})")
    parser.add_argument("--work", type=Path, default=WORK, help=f"targets and unfinished runs (default {WORK})")
    parser.add_argument("--only-target", action="store_true", help="train or read the targets and show their quality")
    parser.add_argument("--compile", action="store_true", help="compile the passes (vpd and spd; needs a C++ compiler)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.toy:
        if options.only_target:
            model = target_of(name, options.target_seed, options.work, steps=options.target_steps)
            quality = TOYS[name].quality(model)
            _out.print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in quality.items()), markup=False)
            continue
        for method in options.method:
            for seed in options.seeds:
                settings = recipe(name, method, steps=options.steps).model_dump(mode="json", exclude={"seed"})
                if results.is_measured(options.out, name, method, seed, settings):
                    continue
                results.add(options.out, name, method, measure(name, method, seed, options))
                measured = results.read(options.out)[name][method]
                _out.print(results.table({name: {method: measured}}).to_string(index=False), markup=False)


if __name__ == "__main__":
    main()
