"""Seconds and memory of attribution graphs against nodes and prompt length, and milliseconds of a pruning step.

    python -m benchmarks.graph                       # writes benchmarks/results/graph.json

The model is a random HookedTransformer of two layers (``d_model`` 64, four heads, ``d_mlp`` 256) with 64 subcomponents per site;
which of them are nodes is set by the threshold. ``seconds`` is the median of ``repeats``, ``cpu_seconds`` that of this process's
time, which a shared machine disturbs less; ``peak_mb`` the process's peak while graphs are made, ``before_mb`` its memory before.
``prune_step_ms`` is a step with an adversary of four, from recorded passes.
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import torch

from benchmarks import harness
from benchmarks.models import hooked_transformer
from tl_vpd import VPDConfig, bundled
from tl_vpd.analysis.graph import GraphConfig, attribution_graph
from tl_vpd.analysis.pruning import PruneConfig
from tl_vpd.analysis.pruning.behaviours import behaviour_of
from tl_vpd.analysis.pruning.gradients import PromptLoss
from tl_vpd.analysis.pruning.importance_training import ImportanceTraining
from tl_vpd.forward import MaskedModel
from tl_vpd.training import new_decomposition

LAYERS, D_MODEL, C = 2, 64, 64
LIKE = (8, 3100)
"""The public tool's work, in tokens and nodes."""
SIZES = ((8, 100), (8, 1000), LIKE, (8, 5000), (32, 1000), (32, 5000), (128, 1000), (128, 5000))


def target() -> tuple[Any, Any]:
    """The model and an untrained decomposition, whose importances are spread over [0, 1]."""
    model = hooked_transformer(
        layers=LAYERS, d_model=D_MODEL, heads=4, vocabulary=1000, context=128, positional_embedding_type="rotary"
    )
    vpd = new_decomposition(model, VPDConfig(C=C, gamma={"d_ci": 64, "n_blocks": 1, "n_heads": 4}))
    with torch.no_grad():
        vpd.gamma.unembed.weight.mul_(0.5)
        vpd.gamma.unembed.bias.fill_(0.5)
    return model, vpd


def row(model: Any, vpd: Any, length: int, nodes: int, repeats: int) -> dict[str, Any]:
    """The figures of one size."""
    tokens = torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(0))
    g = vpd.causal_importances(model, tokens).concatenated.flatten().sort(descending=True).values
    threshold = float(g[nodes])
    harness.restart_peak()
    before = harness.resident_mb()
    seconds, cpu = [], []
    for i in range(repeats + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        graph = attribution_graph(vpd, model, tokens, [0], config=GraphConfig(threshold=threshold))
        if i:
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
        edges, targets = len(graph.weight), int(graph.is_subcomponent.sum()) + 1
        del graph
    return {
        "tokens": length,
        "nodes": targets + length,
        "targets": targets,
        "edges": edges,
        "seconds": round(statistics.median(seconds), 4),
        "cpu_seconds": round(statistics.median(cpu), 4),
        "peak_mb": round(harness.peak_mb()),
        "before_mb": round(before),
        "repeats": repeats,
    }


def prune_step(model: Any, vpd: Any, tokens: Any, repeats: int, *, recorded: bool) -> float:
    """Milliseconds of a pruning step with an adversary of four, the median."""
    with MaskedModel(vpd, model, fused_attention=True) as masked_model:
        logits, inputs = masked_model.clean(tokens)
        z = vpd.pre_sigmoid(inputs)[0].detach()
        loss = PromptLoss(masked_model, tokens, behaviour_of(masked_model.adapter, logits[0], 9, -1))
        training = ImportanceTraining(loss, z, torch.tensor([0.05]), PruneConfig(recorded=recorded))
        seconds = harness.seconds_in_turn({"step": training.gradient}, rounds=repeats, warm_up=5)["step"]
    return round(1000 * statistics.median(seconds), 2)


def prune_steps(model: Any, vpd: Any, repeats: int) -> dict[str, float]:
    """Steps on prompts of eight tokens: the benchmark's model and the bundled one, recorded and running the model."""
    random = model, vpd, torch.arange(8)[None]
    shipped = bundled.model(kind="hooked_transformer"), bundled.decomposition()
    shipped = *shipped, shipped[0].to_tokens("foo(x)[0")
    return {
        "prune_step_ms": prune_step(*random, repeats, recorded=True),
        "prune_step_running_the_model_ms": prune_step(*random, repeats, recorded=False),
        "prune_step_bundled_ms": prune_step(*shipped, repeats, recorded=True),
        "prune_step_bundled_running_the_model_ms": prune_step(*shipped, repeats, recorded=False),
    }


def main() -> None:
    """Runs all sizes and writes the record."""
    warnings.simplefilter("ignore")
    parser = harness.parser("graph", __doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smallest", action="store_true", help="the smallest size and the public tool's alone")
    arguments = parser.parse_args()
    model, vpd = target()
    rows = {}
    for size in (SIZES[0], LIKE) if arguments.smallest else SIZES:
        rows[size] = row(model, vpd, *size, arguments.repeats)
        print(rows[size], flush=True)
    like = {key: rows[LIKE][key] for key in ("nodes", "targets", "edges", "seconds", "cpu_seconds", "peak_mb")}
    record = {**like, **prune_steps(model, vpd, 10 * arguments.repeats), "rows": list(rows.values())}
    harness.write(arguments.out, record, "graph", layers=LAYERS, d_model=D_MODEL, C=C)
    print(record)


if __name__ == "__main__":
    main()
