"""VPD, per-layer and cross-layer transcoders of the bundled model's MLPs, at equal compute, on the same axes.

    python -m benchmarks.comparison                  # benchmarks/results/comparison.json; the short form, one core
    python -m benchmarks.comparison --tflops 200     # long trainings; stop and start it as you like

Three sizes of each method (half, one and two times as many pieces), three seeds, and at the middle size transcoders that were
trained end to end in each of the three ways; every training gets the same number of FLOPs (matrix products). VPD decomposes the
MLPs' matrices alone, with the bundled recipe and its schedules stretched over its steps; the bundled decomposition, which had far
more compute, is a row of its own. Finished trainings are kept in ``--runs`` and not repeated.

VPD starts at the weights' channels, the same for every seed, so that short trainings of other seeds look alike.

Recorded: the tables of ``tl_vpd.baselines.compare`` with 95% intervals over validation rows; how consistent seeds are (mean max
cosines beside random directions); the alive count of a size over that of half the size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from tl_vpd import bundled, viz
from tl_vpd.baselines import (
    ComparisonConfig,
    TrainingCost,
    TranscoderConfig,
    Transcoders,
    compare,
    train_transcoders,
    transcoder_consistency,
)
from tl_vpd.baselines.transcoders.cost import training_flops
from tl_vpd.baselines.transcoders.replaced_model import ReplacedModel
from tl_vpd.baselines.transcoders.training import new_transcoders
from tl_vpd.bundled.recipe import CONFIG
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation import consistency
from tl_vpd.planning import Target, footprint
from tl_vpd.training import FaithfulnessConfig, VPDConfig, decompose
from tl_vpd.training.config import counts_for

SIZES = (0.5, 1.0, 2.0)
LATENTS, K, ROWS = 384, 16.0, 16
"""Latents per layer at size 1, active ones per token and layer, and rows of a batch of transcoders."""
LOSSES = ("cascading", "parallel", "independent")


def plan(arguments: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, method and settings of every training."""
    for method in ("vpd", "plt", "clt"):
        for size in arguments.sizes:
            for seed in range(arguments.seeds):
                yield f"{method} x{size:g} seed {seed}", method, {"size": size, "seed": seed}
    for method in ("plt", "clt"):
        for loss in arguments.losses:
            yield f"{method} {loss}", method, {"size": 1.0, "seed": 0, "loss": loss}


def vpd_config(model: Any, size: float, seed: int, flops: float) -> tuple[VPDConfig, float]:
    """The config of a decomposition of the MLPs' matrices that costs so many FLOPs, and what it costs."""
    sites = {n: s for n, s in ((s.name, s) for s in Target.of(model).sites) if ".mlp." in n}
    counts = counts_for(CONFIG.model_copy(update={"sites": ("*.mlp.*",), "C": {"*.mlp.*": CONFIG.C["*.W_in"]}}), sites)
    config = CONFIG.model_copy(
        update={
            "sites": ("*.mlp.*",),
            "C": {name: round(size * n) for name, n in counts.items()},
            "seed": seed,
            "faithfulness": FaithfulnessConfig(warm_up_steps=0),  # init="channels" starts faithful
        }
    )
    per_step = footprint(Target.of(model), config, context=model.cfg.n_ctx).step_flops
    steps = max(1, round(flops / per_step))
    return config.model_copy(update={"steps": steps}), float(steps * per_step)


def transcoder_config(model: Any, tokens: Any, method: str, size: float, seed: int, loss: str, flops: float) -> Any:
    """The config of transcoders that cost so many FLOPs."""
    n = round(size * LATENTS)
    config = TranscoderConfig(
        n_latents=n, k=min(K, n), cross_layer=method == "clt", loss=loss, seed=seed, batch_size=ROWS
    )
    with ReplacedModel(model) as replaced:
        rows = tokens[:2]
        started = new_transcoders(replaced.clean(rows), config, torch.ones_like(rows, dtype=torch.bool))
    per_token = training_flops(model, started, config, tokens.shape[1])
    return config.model_copy(update={"steps": max(1, round(flops / (per_token * ROWS * tokens.shape[1])))})


def trained(
    model: Any, tokens: Any, folder: Path, method: str, flops: float, *, size: float, seed: int, loss: str = "local"
) -> tuple[Any, TrainingCost]:
    """An artefact, from its folder if it was finished with the same settings."""
    if method != "vpd":
        config = transcoder_config(model, tokens, method, size, seed, loss, flops)
        if (folder / "transcoders.safetensors").is_file():
            stored = Transcoders.load(folder)
            if stored.record["config"] == config.model_dump(mode="json"):
                return stored, TrainingCost(stored.record["flops"], stored.record["seconds"])
        transcoders = train_transcoders(model, tokens, config, progress=False)
        transcoders.save(folder)
        return transcoders, TrainingCost(transcoders.record["flops"], transcoders.record["seconds"])
    config, cost = vpd_config(model, size, seed, flops)
    note = folder / "cost.json"
    if note.is_file() and (noted := json.loads(note.read_text()))["config"] == config.model_dump(mode="json"):
        return Decomposition.load(folder), TrainingCost(cost, noted["seconds"])
    start = time.perf_counter()
    vpd = decompose(model, tokens, config, progress=False).decomposition
    seconds = time.perf_counter() - start
    vpd.save(folder)
    note.write_text(json.dumps({"config": config.model_dump(mode="json"), "seconds": seconds}))
    return vpd, TrainingCost(cost, seconds)


def of_seeds(artefacts: dict[str, Any], arguments: Any) -> list[dict[str, Any]]:
    """Mean max cosines of seed 0 with every other seed, by method and size."""
    rows = []
    for method in ("vpd", "plt", "clt"):
        for size in arguments.sizes:
            names = [f"{method} x{size:g} seed {seed}" for seed in range(arguments.seeds)]
            for name in names[1:]:
                one, other = artefacts[names[0]], artefacts[name]
                table = consistency(one, other) if method == "vpd" else transcoder_consistency(one, other)
                rows.append(
                    {"method": method, "size": size, "seeds": name, **table.loc["mean"].astype(float).to_dict()}
                )
    return rows


def splitting(summary: Any, arguments: Any) -> list[dict[str, Any]]:
    """Alive pieces of each size, over those of the smallest (seed 0)."""
    alive = summary.set_index("artefact")["alive"]
    rows = []
    for method in ("vpd", "plt", "clt"):
        first = max(int(alive[f"{method} x{arguments.sizes[0]:g} seed 0"]), 1)
        for size in arguments.sizes:
            n = int(alive[f"{method} x{size:g} seed 0"])
            rows.append({"method": method, "size": size, "alive": n, "growth": n / first})
    return rows


def main() -> None:
    """Trains what is not there yet, compares, and writes the record."""
    parser = harness.parser("comparison", __doc__)
    parser.add_argument("--tflops", type=float, default=0.4, help="FLOPs of each training, in units of 10¹²")
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--losses", nargs="*", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--rows", type=int, default=32, help="validation rows")
    parser.add_argument("--budgets", type=int, nargs="*", default=[20], help="steps of the attack, on the first 8 rows")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--html", type=Path, default=None, help="also write the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokens = bundled.model(), bundled.tokens("training")
    artefacts: dict[str, Any] = {"bundled": bundled.decomposition()}
    costs: dict[str, TrainingCost] = {}
    for name, method, settings in plan(arguments):
        folder = arguments.runs / name.replace(" ", "_")
        artefacts[name], costs[name] = trained(model, tokens, folder, method, arguments.tflops * 1e12, **settings)
        print(f"{name}: {costs[name].flops:.3g} FLOPs, {costs[name].seconds:.0f} s", flush=True)
    config = ComparisonConfig(thresholds=(0.0, 0.1, 0.5), budgets=tuple(arguments.budgets), attack_rows=8)
    result = compare(model, bundled.tokens("validation")[: arguments.rows], artefacts, config, costs=costs)
    summary = result.to_pandas()
    at_zero = summary[~(summary["threshold"] > 0)]
    record = {
        **result.as_json(),
        "consistency": of_seeds(artefacts, arguments),
        "splitting": splitting(at_zero, arguments),
    }
    noted = {name: getattr(arguments, name) for name in ("tflops", "sizes", "seeds", "losses", "rows", "budgets")}
    harness.write(arguments.out, record, "comparison", **noted)
    if arguments.html is not None:
        viz.comparison_page(result, arguments.html, title="VPD and transcoders of the bundled model")
    columns = ["artefact", "threshold", "alive", "l0", "parameters", "kl", "clean_input_kl", "single_layer_kl"]
    print(summary[columns].to_string(), flush=True)


if __name__ == "__main__":
    main()
