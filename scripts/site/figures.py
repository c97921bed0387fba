"""Writes the tables of pages from results files (of docs/scaling.md: from the planner): ``python -m scripts.site.figures``.

A table stands between ``<!-- name -->`` and ``<!-- end -->``; a test compares the pages with what this makes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import editing, evidence, leak, recipes, redundancy, seeds, w_out
from scripts.site import comparisons, costs, first_hour, plans
from scripts.site.tables import fill, formatted, markdown

ROOT = Path(__file__).parents[2]
PAGES: dict[str, tuple[str, ...]] = {
    "graphs": ("graph_cost",),
    "pruning": ("circuits",),
    "your_own_model": ("hour", "sizes", "looks"),
    "released_runs": ("imports",),
    "auditing": ("audits",),
    "comparison": ("comparison",),
    "components": ("clustering",),
    "labels": ("labels",),
    "targeted": ("topic",),
    "dashboard": ("harvest",),
    "hooks": ("generation",),
    "performance": ("step", "first_step", "growth", "hooks", "modes", "throughput", "neighbour"),
    "scaling": ("plans",),
    "training": ("recipes", "recipes_long"),
    "evaluation": ("leak", "redundancy"),
    "editing": ("editing_write", "editing_self", "editing_others", "editing_real", "editing_undone"),
    "evidence": (
        "ground_truth",
        "distances",
        "w_out",
        "needed",
        "latents",
        "stability_sizes",
        "stability_seeds",
        "seeds_runs",
        "seeds_shared",
    ),
}
"""Pages, each with the names of its tables in their order."""
RECORDS = {
    "graph_cost": {
        "tokens": "{tokens}",
        "targets": "{targets:,}",
        "edges": "{edges:,}",
        "seconds": "{cpu_seconds:.2g}",
        "peak MB (before)": "{peak_mb} ({before_mb})",
    },
    "imports": {
        "": "`{model_class}`",
        "model and decomposition take": "{kept_gb:.2f} GB",
        "peak": "{peak_gb:.1f} GB",
        "seconds": "{seconds:.0f}",
        "seconds of processor": "{cpu_seconds:.0f}",
    },
    "clustering": {
        "α": "{alpha:g}",
        "components": "{components:,.0f}",
        "of several members": "{of_several:,.0f}",
        "of several, null": "{null_of_several:,}",
        "distance of seeds, bits": "{distance:.2f}",
    },
}
"""Tables with a row per record of a results file, and the template of each column."""
PLACES = {"graph_cost": ("graph", "rows"), "imports": ("import", "imports"), "clustering": ("clustering", "bundled")}
"""Results files of these tables, and where their records are."""
CIRCUITS = {"unpruned": "all that is important", "adversarial": "adversarial", "importances_only": "importances only"}
MASKS = {
    "importances": "importances",
    "stochastic": "stochastic",
    "adversarial": "adversarial",
    "fresh": "adversarial_fresh",
    "fresh, worst": "adversarial_fresh_worst",
}


def results(name: str) -> dict[str, Any]:
    """A results file of the benchmarks."""
    record: dict[str, Any] = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))
    return record


def circuits() -> str:
    """Probabilities of pruned circuits' behaviours under each kind of masks."""
    rows = []
    for name, record in results("pruning").items():
        if name == "settings":
            continue
        prompt = record["prompt"].replace("\n", "⏎").replace(" ", "·")
        for kind, text in CIRCUITS.items():
            circuit, first = record[kind], kind == "unpruned"
            coefficient = f", λ {circuit['coefficient']:g}" if "coefficient" in circuit else ""
            p = {mask: circuit[f"p_{name}"] for mask, name in MASKS.items()}
            rows.append(
                {
                    "prompt → token": f"`{prompt}` → `{record['token']}`" if first else "",
                    "circuit": text + coefficient,
                    "nodes": str(circuit["nodes"]),
                    "target p": f"{record['target_p']:.3f}" if first else "",
                    **{mask: f"{x:.3f}" if x >= 5e-4 else "< 0.0005" for mask, x in p.items()},
                }
            )
    return markdown(rows)


def audits() -> str:
    """Circuits of EAP-IG before an adversary."""
    return markdown(comparisons.audits(results("audits")))


def comparison() -> str:
    """VPD beside transcoders, by method and size, and with more compute."""
    short, long = results("comparison"), results("comparison_long")
    times = f"With {long['settings']['tflops']:g}·10¹² FLOPs each (one size and seed):"
    return f"{markdown(comparisons.comparison(short))}\n{times}\n\n{markdown(comparisons.comparison(long))}"


def labels() -> str:
    """Means over sites of the offline judge's scores, beside chance and the nulls; by what sites read."""
    rows = pd.DataFrame(results("labels")["by_site"])
    read_tokens = rows["site"].isin([f"blocks.0.attn.W_{x}" for x in "QKV"])
    groups = {"all": rows, "block 0's W_Q, W_K, W_V": rows[read_tokens], "the others": rows[~read_tokens]}
    columns = ["chance", "score", "untrained", "random directions", "shuffled"]
    means = {name: group.groupby("test", sort=False)[columns].mean() for name, group in groups.items()}
    return markdown(
        [
            {"test": str(test), "sites": name, **{c.replace("score", "bundled"): f"{row[c]:.2f}" for c in columns}}
            for test in rows["test"].unique()
            for name, row in ((name, of_group.loc[test]) for name, of_group in means.items() if test in of_group.index)
        ]
    )


def topic() -> str:
    """A decomposition of one topic, on the topic and on other files."""
    record = results("targeted")["tables"]["targeted"]
    sets, kl = record["sets"], record["kl"]

    def row(text: str, tables: float, other: float, digits: int = 2) -> dict[str, str]:
        ratio = "" if text.startswith(("the important", "nothing")) else f"{tables / other:.1f}"
        return {"": text, "tables": f"{tables:.{digits}f}", "other files": f"{other:.{digits}f}", "ratio": ratio}

    texts = {
        "alone": "the important subcomponents alone, Δ off",
        "nothing": "nothing, Δ off",
        "all ablated": f"the model without all {record['alive']} subcomponents",
    }
    for times in (10, 20, 40):
        rare, random = (f"{kind} ({times})" for kind in ("rare elsewhere", "random others"))
        count = sets[rare]["subcomponents"]
        texts[f"without {rare}"] = (
            f"without the {count} that are {times} times as often important on the target as elsewhere"
        )
        texts[f"without {random}"] = f"without {sets[random]['subcomponents']} random others"
    rows = [row(text, kl["tables"][key], kl["other"][key]) for key, text in texts.items()]
    return markdown([*rows, row("important per token", record["l0"]["tables"], record["l0"]["other"], 0)])


def harvest() -> str:
    """Processor's time and memory of harvests, by the number of tokens and what is collected."""
    rows = []
    for entry in (results("harvest")[n] for n in ("32768", "1000000")):
        figures = {"the model and Γ alone": entry["passes"], **{k: v for k, v in entry.items() if isinstance(v, dict)}}
        for i, (what, row) in enumerate((k, v) for k, v in figures.items() if k != "passes"):
            beyond = row.get("beyond_minutes_per_million")
            rows.append(
                {
                    "tokens": "" if i else f"{entry['tokens']:,}",
                    "collected": what,
                    "seconds": f"{row['cpu_seconds']:.3g}",
                    "minutes per million tokens, beyond": "" if beyond is None else f"{beyond}",
                    "MB": f"{row['peak_mb']:,}",
                    "MB on the disk": f"{row['disk_mb']:,}" if "disk_mb" in row else "",
                }
            )
    return markdown(rows)


def generation() -> str:
    """Tokens per second of generation, by mode, prefix and cache."""
    rates = {mode: rates for mode, rates in results("generation").items() if mode != "settings"}
    return markdown([{"masks": mode, **{c: f"{x:,.0f}" for c, x in rates[mode].items()}} for mode in rates])


def _from(file: str, rows: Callable[[dict[str, Any]], list[dict[str, str]]]) -> Callable[[], str]:
    return lambda: markdown(rows(results(file)))


TABLES: dict[str, Callable[[], str]] = {
    **{f.__name__: f for f in (circuits, audits, comparison, labels, topic, harvest, generation)},
    **{f.__name__: _from(f.__name__, f) for f in costs.TABLES},
    **{f.__name__: _from("first_hour", f) for f in first_hour.TABLES},
    **{f.__name__: _from("ground_truth", f) for f in evidence.OF_TOYS},
    **{f.__name__: _from("stability", f) for f in evidence.OF_STABILITY},
    **{name: lambda name=name: seeds.tables(results("seeds"))[name] for name in ("seeds_runs", "seeds_shared")},
    **{name: lambda name=name: editing.tables(results("editing"))[name] for name in PAGES["editing"]},
    "leak": _from("leak", leak.table),
    "plans": lambda: markdown(plans.plans()),
    **{name: lambda name=name: recipes.table(results(name)) for name in PAGES["training"]},
    "redundancy": lambda: redundancy.table(results("redundancy")),
    "w_out": _from("w_out", w_out.table),
}


def table(name: str) -> str:
    """The table of a name."""
    if name not in RECORDS:
        return TABLES[name]()
    file, key = PLACES[name]
    return formatted(results(file)[key], RECORDS[name])


def main() -> None:
    for page in PAGES:
        fill(ROOT / "docs" / f"{page}.md", table)


if __name__ == "__main__":
    main()
