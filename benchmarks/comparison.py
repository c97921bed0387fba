"""VPD, per-layer and cross-layer transcoders of the bundled model's MLPs, at equal compute, on the same axes.

    python -m benchmarks.comparison                  # benchmarks/results/comparison.json; the short form, one core
    python -m benchmarks.comparison --minutes 12     # the same in pieces: run it again until the table comes
    python -m benchmarks.comparison --tflops 200     # long trainings

Three sizes of each method (half, one and two times as many pieces), three seeds, and at the middle size transcoders that were
trained end to end in each of the three ways; every training gets the same number of FLOPs (matrix products). VPD decomposes the
MLPs' matrices alone, with the bundled recipe and its schedules stretched over its steps; the bundled decomposition, which had far
more compute, is a row of its own. Finished trainings are kept in ``--runs`` and not repeated.

VPD starts at the weights' channels, the same for every seed, so that short trainings of other seeds look alike.

Recorded: the tables of ``tl_vpd.baselines.compare``, with 95% intervals over validation rows and, by method and size, the range
over seeds, splitting and the consistency of seeds. Seconds are CPU time of one thread. ``python -m scripts.site.figures`` writes
the page's table.
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
)
from tl_vpd.baselines.transcoders.cost import training_flops
from tl_vpd.baselines.transcoders.replaced_model import ReplacedModel
from tl_vpd.baselines.transcoders.training import new_transcoders
from tl_vpd.bundled.recipe import CONFIG
from tl_vpd.decomposition import Decomposition
from tl_vpd.planning import Target, footprint
from tl_vpd.training import FaithfulnessConfig, VPDConfig, decompose
from tl_vpd.training.config import counts_for
from tl_vpd.training.stored_config import upgraded

SIZES = (0.5, 1.0, 2.0)
LATENTS, K, ROWS = 384, 16.0, 16
"""Latents per layer at size 1, active ones per token and layer, and rows of a batch of transcoders."""
VPD_ROWS = 2
"""Rows of a batch of VPD: a quarter of the bundled recipe's, for four times as many steps at the same cost."""
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
            "batch_size": VPD_ROWS,
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
    """An artefact, from its folder if it was finished with the same settings; its seconds are of this process's CPU time."""
    if method == "vpd":
        config, flops = vpd_config(model, size, seed, flops)
    else:
        config = transcoder_config(model, tokens, method, size, seed, loss, flops)
    note, noted = folder / "cost.json", {"config": config.model_dump(mode="json")}
    if note.is_file() and (found := json.loads(note.read_text()))["config"] == noted["config"]:
        load = Decomposition.load if method == "vpd" else Transcoders.load
        return load(folder), TrainingCost(found["flops"], found["seconds"])
    start = time.process_time()
    if method == "vpd":
        artefact: Any = decompose(model, tokens, config, progress=False).decomposition
    else:
        artefact = train_transcoders(model, tokens, config, progress=False)
        flops = artefact.record["flops"]
    cost = TrainingCost(flops, time.process_time() - start)
    artefact.save(folder)
    note.write_text(json.dumps({**noted, "flops": cost.flops, "seconds": cost.seconds}))
    return artefact, cost


def main() -> None:
    """Trains what is not there yet, compares, and writes the record."""
    parser = harness.parser("comparison", __doc__)
    parser.add_argument("--tflops", type=float, default=0.4, help="FLOPs of each training, in units of 10¹²")
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--losses", nargs="*", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--rows", type=int, default=16, help="validation rows")
    parser.add_argument("--budgets", type=int, nargs="*", default=[20], help="steps of the attack, on the first 4 rows")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"))
    parser.add_argument(
        "--minutes", type=float, default=None, help="start no training later than this (None: any time)"
    )
    parser.add_argument("--html", type=Path, default=None, help="also write the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokens = bundled.model(), bundled.tokens("training")
    artefacts: dict[str, Any] = {}
    costs: dict[str, TrainingCost] = {}
    methods: dict[str, str] = {}
    start = time.monotonic()
    for name, method, settings in plan(arguments):
        if arguments.minutes is not None and time.monotonic() - start > 60 * arguments.minutes:
            print(f"{len(artefacts)} trainings are there: run it again for the rest.")
            return
        folder = arguments.runs / name.replace(" ", "_")
        artefacts[name], costs[name] = trained(model, tokens, folder, method, arguments.tflops * 1e12, **settings)
        methods[name] = f"{method}, {settings['loss']}" if "loss" in settings else method
        print(f"{name}: {costs[name].flops:.3g} FLOPs, {costs[name].seconds:.0f} s", flush=True)
    artefacts["bundled"], methods["bundled"] = bundled.decomposition(), "bundled"
    recipe = VPDConfig(**upgraded(artefacts["bundled"].record["training"]))
    step = footprint(Target.of(model), recipe, context=model.cfg.n_ctx).step_flops
    costs["bundled"] = TrainingCost(float(step * recipe.steps))
    config = ComparisonConfig(thresholds=(0.0, 0.5), budgets=tuple(arguments.budgets), attack_rows=4)
    rows = bundled.tokens("validation")[: arguments.rows]
    result = compare(model, rows, artefacts, config, costs=costs, methods=methods)
    noted = {name: getattr(arguments, name) for name in ("tflops", "sizes", "seeds", "losses", "rows", "budgets")}
    harness.write(arguments.out, result.as_json(), "comparison", **noted)
    if arguments.html is not None:
        viz.comparison_page(result, arguments.html, title="VPD and transcoders of the bundled model")
    columns = ["method", "threshold", "built", "artefacts", "alive", "l0", "kl", "clean_input_kl", "single_layer_kl"]
    print(result.to_pandas("methods")[columns].to_string(), flush=True)


if __name__ == "__main__":
    main()
