"""The fact of a real model: what ``tl-vpd fact`` measured, with two seeds, and nested targets.

    tl-vpd fact --out fact && tl-vpd fact --seed 1 --out fact-1         # 10 minutes of one core each
    python -m benchmarks.targeted_fact --runs fact fact-1 --nested nested    # into benchmarks/results/targeted.json

``real_model`` are the figures of the first run, ``real_model_seeds`` the marks of each. With ``--nested``, each fact is
decomposed alone too, with the settings of both together and 80 steps. ``real_model_agreement`` has a row for each pair:
of the first decomposition's subcomponents the mean of the largest cosine of the rank-one matrix to any of the second's at the
same site, and the part of them above ``MATCHED``; the same for as many random directions. {a} against {b} is the null in which
only tokens that both prompts have can agree, and the naive run one that starts elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from tl_vpd import Decomposition, SavingConfig, bundled, decompose_targeted
from tl_vpd.evaluation.consistency import max_cosines
from tl_vpd.fact import data
from tl_vpd.fact.settings import FACTS, config

MATCHED = 0.8
NESTED_STEPS = 80


def alone(model: Any, i: int, folder: Path) -> Decomposition:
    """One fact's decomposition, trained where it is not in the folder."""
    path, prompts = folder / f"fact {i}", [FACTS.prompts[i]]
    if not (path / "compact").is_dir():
        saving = SavingConfig(folder=path, save_every=20)
        resume = (path / "state").is_dir()
        settings = config(steps=NESTED_STEPS)
        run = decompose_targeted(model, prompts, data.training_rows(), settings, saving=saving, resume=resume)
        run.decomposition.compact(model, prompts).save(path / "compact")
    return Decomposition.load(path / "compact")


@torch.no_grad()
def agreement(one: Decomposition, other: Decomposition) -> dict[str, float | int]:
    """How far the first's subcomponents are among the second's."""
    generator, cosines, null = torch.Generator().manual_seed(0), list[torch.Tensor](), list[torch.Tensor]()
    for name in one.sites:
        V, U = other.V[name], other.U[name]
        random = (torch.randn(t.shape, generator=generator) for t in (V, U))
        if not len(U):
            cosines.append(torch.zeros(one.counts[name]))
            continue
        cosines.append(max_cosines(one.V[name], one.U[name], V, U)["rank_one"])
        null.append(max_cosines(one.V[name], one.U[name], *random)["rank_one"])
    found, chance = torch.cat(cosines), torch.cat(null)
    return {
        "subcomponents": len(found),
        "others": other.site_axis.total,
        "rank_one": float(found.mean()),
        "rank_one_random": float(chance.mean()),
        "matched": float((found > MATCHED).float().mean()),
        "matched_random": float((chance > MATCHED).float().mean()),
    }


def main() -> None:
    """The command."""
    parser = harness.parser("targeted", __doc__)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="folders of tl-vpd fact, seed by seed")
    parser.add_argument("--nested", type=Path, help="folder of the runs of each fact alone")
    options = parser.parse_args()
    record = harness.read(options.out)
    figures = [json.loads((run / "figures.json").read_text(encoding="utf8")) for run in options.runs]
    vpds = {f"{{a, b}}, seed {i}": Decomposition.load(run / "decomposition") for i, run in enumerate(options.runs)}
    pairs = [(one, other) for one in vpds for other in vpds if one != other]
    first, naive = next(iter(vpds)), options.runs[0] / "naive" / "decomposition"
    if naive.is_dir():
        vpds["naive"] = Decomposition.load(naive)
        pairs.append((first, "naive"))
    if options.nested is not None:
        model = bundled.smollm2()
        vpds |= {name: alone(model, i, options.nested) for i, name in enumerate(("{a}", "{b}"))}
        pairs += [("{a}", first), ("{b}", first), ("{a}", "{b}"), ("{b}", "{a}")]
    record["real_model"] = figures[0]
    record["real_model_seeds"] = [{name: f[name] for name in ("tokens", "marks", "alive", "edits")} for f in figures]
    record["real_model_agreement"] = [{"of": a, "in": b, **agreement(vpds[a], vpds[b])} for a, b in pairs]
    record.pop("settings", None)
    harness.write(options.out, record, "targeted_fact")


if __name__ == "__main__":
    main()
