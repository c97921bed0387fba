"""How much of a masked cross-entropy comes from a Γ that sees the next token: bidirectional against causal, trained alike.

    python -m benchmarks.leak                        # benchmarks/results/leak.json; about 5 minutes per run on one core

Two runs on the bundled model, with the bundled recipe, the same seed, batches and number of steps; they differ in
``gamma.causal`` alone. ``--steps`` 500 with windows of ``--context`` 64 tokens are a thirtieth of the recipe's tokens: they show
which way it goes, not where it ends. Leak: cross-entropy with importances from the
prefix alone, less that with importances from the whole window, over ``--rows`` validation rows and ``--positions`` positions in
each. Finished runs are read from ``--work``; a stopped one continues.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from tl_vpd import bundled
from tl_vpd.bundled.recipe import CONFIG
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation import EvaluationConfig, evaluate
from tl_vpd.training import VPDConfig

GAMMAS = {"bidirectional": False, "causal": True}


def config_of(gamma: str, *, seed: int, steps: int) -> VPDConfig:
    """The bundled recipe with this Γ."""
    causal = CONFIG.gamma.model_copy(update={"causal": GAMMAS[gamma]})
    return CONFIG.model_copy(update={"gamma": causal, "seed": seed, "steps": steps})


def measured(vpd: Decomposition, tokens: torch.Tensor, positions: int) -> dict[str, Any]:
    """L0, and by mode KL, cross-entropy above the target's, and leak with its interval."""
    config = EvaluationConfig(
        measures=("future_leakage",), budgets=(), controls=False, leak_rows=len(tokens), leak_positions=positions
    )
    record = evaluate(vpd, bundled.model(), tokens, config).record
    modes = {
        mode: {
            "kl": record["kl"][mode],
            "ce_above_target": record[f"{mode}_ce"] - record["target_ce"],
            "leak": leak,
            "leak_interval": record["intervals"]["leak"][mode],
        }
        for mode, leak in record["leak"].items()
    }
    return {"l0": record["l0"], "importance_change": record["importance_change"], "modes": modes}


def table(record: dict[str, Any]) -> list[dict[str, str]]:
    """The file's runs as texts."""
    rows = []
    for name, run in record.items():
        if name != "settings":
            of_modes, rounded = run["modes"], run["modes"]["rounded"]
            rows.append(
                {
                    "Γ": name,
                    "L0": f"{run['l0']:.0f}",
                    "importance change": f"{run['importance_change']:.1g}",
                    "KL, rounded": f"{rounded['kl']:.3f}",
                    "CE over the target's": f"{rounded['ce_above_target']:+.3f}",
                    **{f"leak, {mode}": f"{round(of_modes[mode]['leak'], 4) + 0.0:.3f}" for mode in of_modes},
                }
            )
    return rows


def main() -> None:
    """Trains what is missing, measures and writes the record."""
    parser = harness.parser("leak", __doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--positions", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("build/leak"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens = bundled.tokens("validation")[: arguments.rows, : arguments.context].contiguous()
    record: dict[str, Any] = {}
    for seed in arguments.seeds:
        for gamma in GAMMAS:
            steps, context = arguments.steps, arguments.context
            folder = arguments.work / f"{gamma}-{seed}-{steps}x{context}"
            rows = bundled.tokens("training")[:, :context].contiguous()
            vpd = harness.trained(bundled.model(), rows, config_of(gamma, seed=seed, steps=steps), folder)
            record[f"{gamma}, seed {seed}"] = measured(vpd, tokens, arguments.positions)
    options = {name: value for name, value in vars(arguments).items() if name not in ("out", "work")}
    harness.write(arguments.out, record, "leak", **options)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
