"""Seconds and memory of attribution graphs against nodes and prompt length, and milliseconds of a pruning step.

    python -m benchmarks.graph                       # writes benchmarks/results/graph.json

The model is a random HookedTransformer of two layers (``d_model`` 64, four heads, ``d_mlp`` 256) with 64 subcomponents a site;
which of them are nodes is set by the threshold. ``seconds`` is the median of ``repeats``, ``cpu_seconds`` that of the process's
own time, which a shared machine disturbs less; ``peak_mb`` the process's peak while graphs are made, ``before_mb`` what it held
before. ``prune_step_ms`` is a step with an adversary of four, from recorded passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from tl_vpd import VPDConfig, bundled
from tl_vpd.analysis.graph import attribution_graph
from tl_vpd.analysis.pruning import PruneConfig
from tl_vpd.analysis.pruning.behaviours import behaviour_of
from tl_vpd.analysis.pruning.masked import MaskedModel
from tl_vpd.analysis.pruning.prune import _Pruning
from tl_vpd.training import new_decomposition

RESULT = Path(__file__).parent / "results" / "graph.json"
D_MODEL, C = 64, 64
SIZES = ((8, 100), (8, 1000), (8, 3100), (8, 5000), (32, 1000), (32, 5000), (128, 1000), (128, 5000))
"""Tokens and nodes; 8 and 3,100 is the public tool's work."""


def target() -> tuple[Any, Any]:
    """The model and an untrained decomposition, whose importances are spread over [0, 1]."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=D_MODEL,
            n_heads=4,
            d_head=D_MODEL // 4,
            d_mlp=4 * D_MODEL,
            d_vocab=1000,
            n_ctx=128,
            act_fn="gelu",
            normalization_type="LN",
            positional_embedding_type="rotary",
            seed=0,
        )
    )
    vpd = new_decomposition(model, VPDConfig(C=C, gamma={"d_ci": 64, "n_blocks": 1, "n_heads": 4}))
    with torch.no_grad():
        vpd.gamma.unembed.weight.mul_(0.5)
        vpd.gamma.unembed.bias.fill_(0.5)
    return model, vpd


def memory(field: str) -> float:
    """A line of the process's status, in MB: ``VmRSS`` now, ``VmHWM`` the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def row(model: Any, vpd: Any, length: int, nodes: int, repeats: int) -> dict[str, Any]:
    """One size."""
    tokens = torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(0))
    g = vpd.causal_importances(model, tokens).concatenated.flatten().sort(descending=True).values
    threshold = float(g[nodes])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmRSS")
    seconds, cpu = [], []
    for i in range(repeats + 1):
        start, own = time.perf_counter(), time.process_time()
        graph = attribution_graph(vpd, model, tokens, [0], threshold=threshold)
        if i:
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - own)
        edges, targets = len(graph.weight), int(graph.is_subcomponent.sum()) + 1
        del graph
    return {
        "tokens": length,
        "nodes": targets + length,
        "targets": targets,
        "edges": edges,
        "seconds": round(statistics.median(seconds), 4),
        "cpu_seconds": round(statistics.median(cpu), 4),
        "peak_mb": round(memory("VmHWM")),
        "before_mb": round(before),
        "repeats": repeats,
    }


def prune_step(model: Any, vpd: Any, tokens: Any, repeats: int, *, recorded: bool) -> float:
    """Milliseconds of a pruning step with an adversary of four, the median."""
    with MaskedModel(vpd, model) as masked:
        logits, inputs = masked.clean(tokens)
        z = masked.weights.pre_sigmoid(inputs, None)[0].detach()
        behaviour = behaviour_of(masked.adapter, logits[0], 9, -1)
        pruning = _Pruning(masked, tokens, z, behaviour, torch.tensor([0.05]), PruneConfig(), recorded)
        wall = []
        for i in range(repeats + 5):
            start = time.perf_counter()
            pruning.gradient()
            if i >= 5:
                wall.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(wall), 2)


def prune_steps(model: Any, vpd: Any, repeats: int) -> dict[str, float]:
    """Of eight tokens: the benchmark's model and the bundled one, from recordings and running the model."""
    small = torch.arange(8)[None]
    shipped = bundled.model(kind="hooked_transformer"), bundled.decomposition()
    tokens = shipped[0].to_tokens("foo(x)[0")
    return {
        "prune_step_ms": prune_step(model, vpd, small, repeats, recorded=True),
        "prune_step_running_the_model_ms": prune_step(model, vpd, small, repeats, recorded=False),
        "prune_step_bundled_ms": prune_step(*shipped, tokens, repeats, recorded=True),
        "prune_step_bundled_running_the_model_ms": prune_step(*shipped, tokens, repeats, recorded=False),
    }


def main() -> None:
    """Runs all sizes."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    chosen = parser.parse_args()
    model, vpd = target()
    rows = []
    for length, nodes in SIZES:
        rows.append(row(model, vpd, length, nodes, chosen.repeats))
        print(rows[-1])
    (like,) = (own for own in rows if (own["tokens"], own["targets"]) == (8, 3101))
    found = {
        **{key: like[key] for key in ("nodes", "targets", "edges", "seconds", "cpu_seconds", "peak_mb")},
        **prune_steps(model, vpd, 10 * chosen.repeats),
        "rows": rows,
        "settings": {
            "command": "python -m benchmarks.graph",
            "layers": 2,
            "d_model": D_MODEL,
            "C": C,
            "transformer_lens": version("transformer_lens"),
            **machine(),
        },
    }
    chosen.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
