"""Trains toys, takes them apart and measures what was found against what is true, entry by entry into one file.

    python -m tl_vpd.toys.run --toy tms_5_2 --method vpd spd apd --seeds 0 1 2
    python -m tl_vpd.toys.run --toy grammar --only-target            trains (or reads) the model and says how well it does

An entry is a toy, a method and a seed; what the file already holds is skipped, and a run that was interrupted goes on. The target
is trained once a toy and kept, like the runs, in the folder --work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tl_vpd.baselines import METHODS, APDConfig
from tl_vpd.components.storage import library_versions, write_atomically, write_json
from tl_vpd.evaluation.ground_truth import GroundTruth, ground_truth
from tl_vpd.toys.recipes import TOYS, recipe
from tl_vpd.toys.toy import Toy, train
from tl_vpd.training.config import upgraded

RESULTS = Path("benchmarks/results/ground_truth.json")
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
out = Console(soft_wrap=True)


def target_of(name: str, seed: int, work: Path, *, steps: int | None = None, progress: bool = False) -> Any:
    """A toy's trained model: read from ``work``, or trained and kept there."""
    toy = TOYS[name]
    path = work / f"{name}-target{seed}{'' if steps is None else f'-{steps}'}.safetensors"
    if path.is_file():
        model = toy.build(seed)
        model.load_state_dict(load_file(path))
        return model.eval()
    model = train(toy, seed, steps=steps, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    write_atomically(path, lambda p: save_file(tensors, p))
    return model


def measure(
    name: str,
    method: str,
    seed: int,
    *,
    target_seed: int = 0,
    steps: int | None = None,
    target_steps: int | None = None,
    work: Path = WORK,
    progress: bool = False,
    compile: bool = False,
) -> dict[str, Any]:
    """One entry: trains or reads the target, decomposes, measures.

    Raises:
        KeyError, ValueError: there is no such toy, method or recipe.
    """
    config = recipe(name, method, seed=seed, steps=steps)
    toy, model = TOYS[name], target_of(name, target_seed, work, steps=target_steps, progress=progress)
    folder = work / f"{name}-{method}-{seed}-target{target_seed}-{config.steps}"
    # Data of the seed's own; the target was trained on others, and what is measured on is in neither.
    data = toy.batches(config.batch_size, seed=seed)
    start = time.perf_counter()
    found = METHODS[method].run(model, data, config, out=folder, progress=progress, compile=compile)
    seconds = time.perf_counter() - start
    inputs = toy.batches(ROWS, seed=-3).at(0)
    result = ground_truth(found, model, toy.truth(model), inputs, output=toy.output, seed=seed)
    return {
        "seed": seed,
        "target": {"seed": target_seed, **_rounded(toy.quality(model))},
        "settings": config.model_dump(mode="json", exclude={"seed"}),
        "seconds": round(seconds, 1),
        "compiled": compile,
        **_flat(result),
    }


def _flat(found: GroundTruth) -> dict[str, Any]:
    """A result as plain numbers: means over the sites with features, and every measure by site."""
    sites = found.sites.set_index("site")
    by_site = {
        column: {site: round(float(value), 5) for site, value in sites[column].dropna().items()}
        for column in sites.columns
    }
    flat: dict[str, Any] = {name: round(float(sites[name].mean()), 5) for name in ("mmcs", "ml2r") if by_site[name]}
    flat |= {name: {site: int(n) for site, n in by_site[name].items()} for name in ("alive", "true")}
    flat["by_site"] = {name: values for name, values in by_site.items() if name not in ("alive", "true") and values}
    flat["latents"] = {
        row["latent"]: {"subcomponent": row["subcomponent"], **_rounded({k: row[k] for k in ("overlap", "chance")})}
        for row in found.latents.to_dict("records")
    }
    needed = found.needed.set_index("site")
    flat["needed"] = {site: _rounded({str(k): v for k, v in row.items()}) for site, row in needed.iterrows()}
    flat["reconstruction"] = _rounded(found.reconstruction)
    return flat


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def add(path: Path, name: str, method: str, entry: dict[str, Any]) -> None:
    """Adds an entry to the file: lists over seeds, in the order in which they were made; settings and true counts once."""
    results = read(path)
    own = results.setdefault(name, {}).setdefault(method, {})
    _append(own, {key: value for key, value in entry.items() if key not in ("settings", "true")})
    own["settings"], own["true"], own["versions"] = entry["settings"], entry.get("true", {}), library_versions()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)


def _append(lists: dict[str, Any], entry: dict[str, Any]) -> None:
    for key, value in entry.items():
        if isinstance(value, dict):
            _append(lists.setdefault(key, {}), value)
        else:
            lists.setdefault(key, []).append(value)


def read(path: Path) -> dict[str, Any]:
    """The results in a file (none, if there is no file)."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def done(path: Path, name: str, method: str, seed: int, settings: dict[str, Any]) -> bool:
    """Whether the file holds the entry.

    Raises:
        ValueError: it holds entries of this toy and method that were made with other settings.
    """
    own = read(path).get(name, {}).get(method)
    if own is None:
        return False
    # Settings that were added since have their defaults there.
    config = METHODS[method].config
    stored = own["settings"] if config is APDConfig else upgraded(own["settings"])
    same = config(**stored).model_dump(mode="json", exclude={"seed"}) == settings
    if not same:
        raise ValueError(f"{path} holds {name} by {method} with other settings: choose another file with --out.")
    return seed in own["seed"]


def table(results: dict[str, Any]) -> pd.DataFrame:
    """A row an entry: MMCS, ML2R, alive of true by site, errors of importance patterns, reconstruction."""
    rows = []
    for name, methods in results.items():
        for method, own in methods.items():
            for i, seed in enumerate(own["seed"]):
                row: dict[str, Any] = {"toy": name, "method": method, "seed": seed}
                row |= {key: own[key][i] for key in ("mmcs", "ml2r") if key in own}
                row |= {f"alive {site}": f"{own['alive'][site][i]}/{n}" for site, n in own["true"].items()}
                errors = own["by_site"].get("pattern_errors", {})
                row |= {"pattern errors": int(sum(values[i] for values in errors.values()))} if errors else {}
                known = {**own.get("latents", {}), **own.get("needed", {})}
                overlaps = [values["overlap"][i] for values in known.values()]
                row |= {"overlap": round(sum(overlaps) / len(overlaps), 3)} if overlaps else {}
                row |= {key: own["reconstruction"][key][i] for key in ("stochastic", "adversarial")}
                rows.append(row | {"seconds": own["seconds"][i]})
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tl_vpd.toys.run",
        description=__doc__,
        epilog=ESTIMATES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--toy", nargs="+", required=True, choices=list(TOYS), help="which toys")
    parser.add_argument("--method", nargs="+", default=["vpd"], choices=list(METHODS), help="which methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the decomposition and its data")
    parser.add_argument("--target-seed", type=int, default=0, help="seed of the target")
    parser.add_argument("--steps", type=int, help="steps of the decomposition in the place of the recipe's")
    parser.add_argument("--target-steps", type=int, help="steps of the target's training in the place of the recipe's")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"results (default {RESULTS})")
    parser.add_argument("--work", type=Path, default=WORK, help=f"targets and unfinished runs (default {WORK})")
    parser.add_argument("--only-target", action="store_true", help="train or read the targets and show their quality")
    parser.add_argument("--compile", action="store_true", help="compile the passes (vpd and spd; needs a C++ compiler)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    own = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in own.toy:
        if own.only_target:
            show_target(TOYS[name], target_of(name, own.target_seed, own.work, steps=own.target_steps), name)
            continue
        for method in own.method:
            for seed in own.seeds:
                config = recipe(name, method, seed=seed, steps=own.steps)
                settings = config.model_dump(mode="json", exclude={"seed"})
                if done(own.out, name, method, seed, settings):
                    continue
                entry = measure(
                    name,
                    method,
                    seed,
                    target_seed=own.target_seed,
                    steps=own.steps,
                    target_steps=own.target_steps,
                    work=own.work,
                    progress=not own.quiet,
                    compile=own.compile,
                )
                add(own.out, name, method, entry)
                out.print(table({name: {method: read(own.out)[name][method]}}).to_string(index=False), markup=False)


def show_target(toy: Toy, model: Any, name: str) -> None:
    """Prints how well a target does what it was trained for."""
    out.print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in toy.quality(model).items()), markup=False)


if __name__ == "__main__":
    main()
