"""Circuits of edges before an adversary: how much of their published-style faithfulness is left, and what must be added.

    python -m benchmarks.audits                      # benchmarks/results/audits.json, and the table of docs/auditing.md

Six tasks: the toy ``Induction`` (four heads a layer), and five of the bundled model, each with pairs of a prompt and a corrupted
prompt of which another token is right. The metric is the logit of the right token minus that of the corrupted prompt's, so that
the corrupted run is at the bottom. By EAP and EAP-IG, on the first half of the pairs: the smallest number of edges of the largest
scores that recover ``--published`` with everything else at the corrupted values. On the other half: what this circuit recovers
under each ablation and each of the adversary's budgets (between the prompts' and the corrupted values; also with sources for
each position, and between the prompts' values and 0), and what as large circuits at random recover. ``repair_circuit``, again on
the first half, adds edges until 0.8 is left under 20 steps; what is left then on the other half is the last figure.

Tasks of the record that were measured on the same model and settings are kept (``--again`` measures them again).
``python -m scripts.site.figures`` writes the page's table.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks import harness
from tl_vpd import bundled
from tl_vpd.analysis import AuditConfig, CircuitAudit, RepairConfig, audit_circuit, repair_circuit
from tl_vpd.analysis.edge_attribution import EdgeAttributionConfig, EdgeScores, edge_attribution
from tl_vpd.analysis.edges import Edge
from tl_vpd.toys.induction import BOS, Induction
from tl_vpd.toys.toy import train

WORDS = ("name", "file", "value", "line", "code", "type", "list", "key", "path", "module", "string")
SIZES = (2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 72, 80, 90, 100, 110)


@dataclass(frozen=True)
class Pairs:
    """A task: prompts, corrupted prompts of the same length, and the tokens that are right on each ``[pair]``."""

    clean: Tensor
    corrupted: Tensor
    right: Tensor
    wrong: Tensor

    def metric(self) -> Callable[[Tensor], Tensor]:
        """The logit of the right token minus the corrupted prompt's, at the last position; the mean over pairs."""
        rows = torch.arange(len(self.right))
        return lambda logits: (logits[rows, -1, self.right] - logits[rows, -1, self.wrong]).mean()

    def halves(self) -> tuple[Pairs, Pairs]:
        """Every other pair, and the rest."""
        fields = (self.clean, self.corrupted, self.right, self.wrong)
        first, second = (Pairs(*(field[start::2] for field in fields)) for start in (0, 1))
        return first, second


def texts(task: str) -> list[tuple[str, str, str, str]]:
    """Prompt, corrupted prompt, right token and the corrupted prompt's right token, of a task of the bundled model."""
    pairs = list(itertools.permutations(WORDS, 2))
    if task == "bracket":
        return [(f"{a}({b})[0", f"{a}({b})(0", "]", ")") for a, b in pairs]
    if task == "repeated_name":
        start = "(self, {a}, {b}):\n        self.{c} ="
        return [(start.format(a=a, b=b, c=a), start.format(a=a, b=b, c=b), f" {a}", f" {b}") for a, b in pairs]
    if task == "indentation":
        lines = ("\n    if {} == {}:", "\n        if {} == {}:")
        return [(lines[0].format(a, b), lines[1].format(a, b), "\n        ", "\n            ") for a, b in pairs]
    if task == "keyword":
        return [(f"{a}\n    for {b}", f"{a}\n    if {b}", " in", " ==") for a, b in pairs]
    return [(f"{a}.get('{b}", f'{a}.get("{b}', "'", '"') for a, b in pairs]


def bundled_pairs(model: Any, task: str, n: int) -> Pairs:
    """Pairs whose words are one token each, chosen evenly."""
    chosen = texts(task)
    chosen = chosen[:: max(1, len(chosen) // n)][:n]
    clean, corrupted = (model.to_tokens([row[i] for row in chosen]) for i in (0, 1))
    right, wrong = (torch.tensor([model.to_single_token(row[i]) for row in chosen]) for i in (2, 3))
    if clean.shape != corrupted.shape:
        raise ValueError(f"Prompts of {task} are of several lengths: choose other words.")
    return Pairs(clean, corrupted, right, wrong)


def induction_pairs(toy: Induction, n: int, block: int = 12, seen: int = 6) -> Pairs:
    """A block of distinct tokens and its beginning; corrupted: the same beginning after the block's other order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(3 * n, toy.d_vocab - 1, generator=generator).argsort(-1)[:, :block] + 1
    other = torch.stack([row[torch.randperm(block, generator=generator)] for row in order])
    last = (other == order[:, seen - 1 : seen]).long().argmax(-1)
    right, wrong = order[:, seen], other[torch.arange(3 * n), (last + 1) % block]
    fits = ((last < block - 1) & (right != wrong)).nonzero()[:n, 0]
    start, repeated = torch.full((n, 1), BOS), order[fits, :seen]
    clean, corrupted = (torch.cat([start, rows[fits], repeated], 1) for rows in (order, other))
    return Pairs(clean, corrupted, right[fits], wrong[fits])


def published(model: Any, pairs: Pairs, scores: EdgeScores, level: float) -> tuple[tuple[Edge, ...], float]:
    """The circuit of the fewest edges that recovers ``level`` with all others at the corrupted values, and what it recovers."""
    config, recovered = AuditConfig(ablations=["corrupted"], controls=0), float("nan")
    circuit: tuple[Edge, ...] = ()
    for size in SIZES:
        try:
            circuit = scores.circuit(min(size, len(scores.edges)))
        except ValueError:  # no path yet
            continue
        recovered = float(audited(model, pairs, circuit, config).rows["recovered"][0])
        if recovered >= level:
            break
    return circuit, recovered


def measure(model: Any, pairs: Pairs, steps: int, arguments: Any) -> dict[str, Any]:
    """One method's circuit on one task; ``steps``: of EAP-IG (1: EAP)."""
    start = time.perf_counter()
    first, second = pairs.halves()
    scores = edge_attribution(
        model,
        first.clean,
        first.metric(),
        reference_prompts=first.corrupted,
        config=EdgeAttributionConfig(ig_steps=steps),
    )
    circuit, recovered = published(model, first, scores, arguments.published)
    plain = AuditConfig(
        ablations=["corrupted", "zero", "mean", "stochastic", "adversarial"],
        reference="corrupted",
        budgets=tuple(arguments.budgets),
    )
    last = AuditConfig(ablations=["adversarial"], reference="corrupted", controls=0, seed=1)
    audit = audited(model, second, circuit, plain)
    others = {
        "adversarial_per_position": audited(model, second, circuit, replace(last, per_position=True)),
        "adversarial_from_zero": audited(model, second, circuit, replace(last, reference="zero")),
    }
    repair = repair_circuit(
        None,
        model,
        first.clean,
        circuit,
        first.metric(),
        config=RepairConfig(target=0.8, max_added=arguments.max_added, reference="corrupted", restarts=1),
        reference_prompts=first.corrupted,
    )
    after = audited(model, second, repair.nodes, last)
    nothing = float(audit.rows["nothing"][0])
    rows = {f"{row.ablation}{'' if pd.isna(row.steps) else f'_{row.steps}'}": row for row in audit.rows.itertuples()}
    return {
        "edges": len(circuit),
        "of": len(scores.edges),
        "published": round(recovered, 3),
        "recovered": {name: round(row.recovered, 3) for name, row in rows.items()}
        | {name: round(float(other.rows["recovered"][0]), 3) for name, other in others.items()},
        "random": {
            name: round((row.random_mean - nothing) / (audit.whole - nothing), 3)
            for name, row in rows.items()
            if row.reference == "corrupted" and not pd.isna(row.random_mean)
        },
        "repair": {
            "added": len(repair.added),
            "holds": repair.holds,
            "edges": [str(edge) for edge in repair.added],
            "adversarial_20": round(float(after.rows["recovered"][0]), 3),
        },
        "circuit": [str(edge) for edge in circuit],
        "seconds": round(time.perf_counter() - start, 1),
    }


def audited(model: Any, pairs: Pairs, circuit: Sequence[Any], config: AuditConfig) -> CircuitAudit:
    """The audit of a circuit on pairs."""
    metric = pairs.metric()
    return audit_circuit(None, model, pairs.clean, circuit, metric, config=config, reference_prompts=pairs.corrupted)


def main() -> None:
    """Runs what the record does not have yet, and writes it after each task."""
    warnings.simplefilter("ignore")
    tasks = ("induction", "bracket", "repeated_name", "indentation", "keyword", "quote")
    parser = harness.parser("audits", __doc__)
    parser.add_argument("tasks", nargs="*", default=list(tasks), help="which tasks (others keep their figures)")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--published", type=float, default=0.85)
    parser.add_argument("--budgets", type=int, nargs="+", default=[5, 20, 80])
    parser.add_argument("--max-added", type=int, default=30)
    parser.add_argument("--toy-steps", type=int, default=3000, help="training steps of the toy")
    parser.add_argument("--again", action="store_true", help="measure what the record has, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = {name: entry for name, entry in harness.read(arguments.out).items() if name in tasks}
    weights = hashlib.sha256((Path(bundled.MODEL) / "model.safetensors").read_bytes()).hexdigest()[:12]
    settings = {name: getattr(arguments, name) for name in ("pairs", "published", "budgets", "max_added", "toy_steps")}
    for task in arguments.tasks:
        measured_on = {"weights": "trained here" if task == "induction" else weights, **settings}
        if record.get(task, {}).get("measured_on") == measured_on and not arguments.again:
            continue
        if task == "induction":
            toy = Induction(n_heads=4)
            model, pairs = train(toy, steps=arguments.toy_steps), induction_pairs(toy, arguments.pairs)
        else:
            model = bundled.model()
            pairs = bundled_pairs(model, task, arguments.pairs)
        with torch.no_grad():
            logits = model(pairs.clean)[:, -1], model(pairs.corrupted)[:, -1]
        rows = torch.arange(len(pairs.right))
        correct = [(x[rows, pairs.right] > x[rows, pairs.wrong]).double().mean() for x in logits]
        record[task] = {
            "prompt": "tokens" if task == "induction" else model.to_string(pairs.clean[0, 1:]),
            "right": [round(float(correct[0]), 3), round(1 - float(correct[1]), 3)],
            "eap": measure(model, pairs, 1, arguments),
            "eap_ig": measure(model, pairs, 5, arguments),
            "measured_on": measured_on,
        }
        harness.write(arguments.out, record, "audits", **settings)
        print(json.dumps({task: record[task]}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
