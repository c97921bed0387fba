"""The redundancy test on a model that can do everything twice, and on one that cannot.

    python -m benchmarks.redundancy                  # benchmarks/results/redundancy.json

The toy ``Copying``: *twice* has two layers of attention trained under layer dropout 0.4, so that each can copy alone; *once* has
a single layer. Decompositions of each are tested: *by hand*, singular directions, of which those of the first layer are important
everywhere and no others anywhere; and *trained* at several importance coefficients (about 2 minutes each on one core), with the
same settings for both models: the higher the coefficient, the more a second way of doing the same is left out. Recorded: what the
model does with each layer alone; by site how many subcomponents were tested and have a hidden twin; a trained one's KL and L0.
Runs in the file are kept.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import harness
from scripts.site.tables import markdown
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation import EvaluationConfig, evaluate, redundancy
from tl_vpd.importance import GammaConfig
from tl_vpd.toys.copying import Copying, first_layer_alone
from tl_vpd.toys.toy import train
from tl_vpd.training import (
    Coefficients,
    FaithfulnessConfig,
    OptimizerConfig,
    VPDConfig,
    decompose,
)

MODELS = {"twice": Copying(), "once": Copying(n_layers=1, layer_dropout=0.0)}
CONFIG = VPDConfig(
    batch_size=16,
    C=32,
    init="channels",
    gamma=GammaConfig(d_ci=32, n_blocks=1, n_heads=2, output_bias=1.0),
    coefficients=Coefficients(
        delta=1e4,
        importance=2e-3,
        frequency=1e-3,
        schedule={"importance": ((0, 0), (0.3, 1)), "frequency": ((0, 0), (0.3, 1))},
    ),
    optimizer=OptimizerConfig(lr=3e-3),
    faithfulness=FaithfulnessConfig(warm_up_steps=0),
)


def trained(
    toy: Copying, model: Any, tokens: torch.Tensor, importance: float, *, seed: int, steps: int
) -> dict[str, Any]:
    """A decomposition trained at an importance coefficient, evaluated and tested."""
    coefficients = CONFIG.coefficients.model_copy(update={"importance": importance, "frequency": importance / 2})
    config = CONFIG.model_copy(update={"steps": steps, "seed": seed, "coefficients": coefficients})
    vpd = decompose(model, toy.batches(config.batch_size, seed=seed), config, progress=False).decomposition
    record = evaluate(vpd, model, tokens, EvaluationConfig(measures=(), budgets=(20,), controls=False)).record
    return {
        "kl": {mode: record["kl"][mode] for mode in ("unmasked", "stochastic", "rounded", "zero")},
        "pgd_20": record["pgd_kl"]["20"],
        "l0": record["l0"],
        **tested(vpd, model, tokens),
    }


def tested(vpd: Decomposition, model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """Counts of the redundancy test, and its first subcomponents."""
    result = redundancy(vpd, model, tokens)
    table = result.to_pandas()
    site = table.index.str.rsplit(":", n=1).str[0]
    return {
        "tested": table.groupby(site, sort=False).size().to_dict(),
        "hurt_alone": int((table["alone"] > 0.2).sum()),
        "twins": {name: int(n) for name, n in table["has_twin"].groupby(site, sort=False).sum().items()},
        "top": result.top(5).round(4).reset_index().to_dict("records"),
    }


def table(record: dict[str, Any]) -> str:
    """The file in Markdown."""
    rows = []
    for model in MODELS:
        of_model = {"by hand": record[model]["by_hand"], **dict(sorted(record[model]["trained"].items(), key=_number))}
        for name, figures in of_model.items():
            learned = "kl" in figures
            rows.append(
                {
                    "layers": "two, each copies alone" if model == "twice" else "one",
                    "decomposition": f"trained, importance {float(name):g}" if learned else name,
                    "L0": f"{figures['l0']:.1f}" if learned else "",
                    "KL, rounded": f"{figures['kl']['rounded']:.3f}" if learned else "",
                    "PGD-20": f"{figures['pgd_20']:.3f}" if learned else "",
                    "tested": str(sum(figures["tested"].values())),
                    "hurt alone": str(figures["hurt_alone"]),
                    "have a twin": str(sum(figures["twins"].values())),
                }
            )
    return markdown(rows)


def _number(entry: tuple[str, Any]) -> float:
    return float(entry[0])


def main() -> None:
    """Trains, tests and writes the record."""
    parser = harness.parser("redundancy", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--importances", nargs="*", type=float, default=[2e-3, 6e-3, 2e-2])
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = {name: value for name, value in harness.read(arguments.out).items() if name != "settings"}
    seed, steps = arguments.seed, arguments.steps
    for name in arguments.models:
        toy = MODELS[name]
        model, tokens = train(toy, seed), toy.batches(arguments.rows, seed=-3).at(0)
        entry = record.setdefault(name, {"trained": {}})
        entry |= {"quality": toy.quality(model), "by_hand": tested(first_layer_alone(model), model, tokens)}
        for importance in arguments.importances:
            if str(importance) not in entry["trained"]:
                entry["trained"][str(importance)] = trained(toy, model, tokens, importance, seed=seed, steps=steps)
                harness.write(arguments.out, record, "redundancy", steps=steps, seed=seed, rows=arguments.rows)


if __name__ == "__main__":
    main()
