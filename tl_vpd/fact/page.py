"""The page of a fact: what was reached beside the marks, where the subcomponents are, what edits do there and elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tl_vpd import viz
from tl_vpd.analysis import AttributionGraph
from tl_vpd.fact.measures import IN_PART

INTRODUCTION = (
    "SmolLM2-135M-Instruct (30 blocks, its weights read from 4 bits), decomposed for two prompts alone: {prompts}. The "
    "matrices of {blocks} were split into rank-one subcomponents that these prompts use and a rest, Δ, that does everything "
    "else; the other blocks are as they were.\n\n"
    "In the full model, where Δ is on, a few of these subcomponents are then removed, or two of them exchange what they write. "
    "KL is the divergence of the changed model's prediction from the model's, in nats per token, on {tokens:,} tokens of other "
    "text."
)
KINDS = {"W_Q": "attn", "W_K": "attn", "W_V": "attn", "W_O": "attn", "W_gate": "mlp", "W_in": "mlp", "W_out": "mlp"}


def marks(figures: Mapping[str, Any]) -> pd.DataFrame:
    """What was reached beside what was asked for, a row for each figure: ``figure``, ``reached``, ``asked`` and ``met``.

    Args:
        figures: from ``measure``.
    """
    alone, answers = pd.DataFrame(figures["alone"]), pd.DataFrame(figures["answers"])
    kl = pd.DataFrame(figures["elsewhere"]).set_index(["edit", "text"]).xs("all", level="text")
    trained = answers[answers["trained"]].set_index(["edit", "subject"])["answer"]
    wanted = answers["subject"].map(dict(zip(alone["subject"], figures["facts"]["answers"][::-1], strict=True)))
    other = answers[["first", "top"]].eq(wanted, axis=0).groupby(answers["edit"]).mean()  # shares of all prompts
    erased = [f"without {subject}" for subject in alone["subject"]]
    left = max(trained[f"without {s}", s] / trained["model", s] for s in alone["subject"])
    rows = [
        (
            "subcomponents alone: probability of the answer, of the model's",
            (alone["rounded"] / alone["model"]).min(),
            ">= 0.8",
        ),
        ("the same under attack", (alone["attacked"] / alone["model"]).min(), ">= 0.6"),
        ("fact erased: probability of the answer, of the model's", left, "<= 0.05"),
        ("fact erased: mean KL elsewhere", kl.loc[erased, "kl"].max(), "<= 0.01"),
        ("fact erased: 99th percentile of KL elsewhere", kl.loc[erased, "p99"].max(), "<= 0.1"),
        (
            "facts exchanged: the other answer is first of the capitals, share of all prompts",
            other.loc["exchanged", "first"],
            ">= 1",
        ),
        (
            "facts exchanged: the other answer is the likeliest token, share of all prompts",
            other.loc["exchanged", "top"],
            ">= 1",
        ),
        ("facts exchanged: mean KL elsewhere", kl.loc["exchanged", "kl"], "<= 0.001"),
        (
            "exchanged in part: the other answer is first of the capitals, share of all prompts",
            other.loc[IN_PART, "first"],
            ">= 1",
        ),
        ("exchanged in part: mean KL elsewhere", kl.loc[IN_PART, "kl"], "<= 0.001"),
    ]
    if naive := [name for name in kl.index if name.endswith("naive")]:
        ratio = kl.loc[naive[0], "kl"] / max(kl.loc[erased[0], "kl"], 1e-12)
        rows.append(("naive run: mean KL elsewhere of its erased fact, times that of this one", ratio, ">= 10"))
    table = pd.DataFrame(rows, columns=["figure", "reached", "asked"])
    limits = [(asked[:2], float(asked[3:])) for asked in table["asked"]]
    table["met"] = [
        "yes" if (x >= y if sign == ">=" else x <= y) else "no"
        for x, (sign, y) in zip(table["reached"], limits, strict=True)
    ]
    return table


def where(figures: Mapping[str, Any]) -> pd.DataFrame:
    """How many subcomponents each matrix has, a row for each decomposed block.

    Args:
        figures: from ``measure``.
    """
    blocks = sorted({int(name.split(".")[1]) for name in figures["alive"]})
    rows = [
        {
            "block": block,
            **{kind: figures["alive"].get(f"blocks.{block}.{part}.{kind}", 0) for kind, part in KINDS.items()},
        }
        for block in blocks
    ]
    return pd.DataFrame(rows).set_index("block")


def fact_page(figures: Mapping[str, Any], graph: AttributionGraph | None, path: Path) -> Path:
    """Writes the page, which opens offline; returns its path.

    Args:
        figures: from ``measure``.
        graph: of one of the prompts (None: left out).
        path: of the page.
    """
    panels = fact_panels(figures)
    if graph is not None:
        panels.append(viz.graph(graph, title=f"How {figures['facts']['prompts'][0]!r} is completed"))
    prompts = " and ".join(repr(prompt) for prompt in figures["facts"]["prompts"])
    blocks = f"block {where(figures).index[0]}" if len(where(figures)) == 1 else f"{len(where(figures))} blocks"
    introduction = INTRODUCTION.format(prompts=prompts, tokens=figures["tokens"], blocks=blocks)
    return viz.page(panels, "A fact, erased and rewired", path, introduction=introduction)


def fact_panels(figures: Mapping[str, Any]) -> list[viz.Panel]:
    """The page's tables.

    Args:
        figures: from ``measure``.
    """
    elsewhere, reached = pd.DataFrame(figures["elsewhere"]), marks(figures)
    reached["asked"] = reached["asked"].str.replace(">=", "at least").str.replace("<=", "at most")
    likeliest, right, other = after_edits(pd.DataFrame(figures["answers"]))
    edits = pd.DataFrame(
        [{"edit": name, **change} for name, changes in figures["changes"].items() for change in changes]
    )
    kinds = ["all", *(kind for kind in dict.fromkeys(elsewhere["text"]) if kind != "all")]
    kl = elsewhere.pivot(index="edit", columns="text", values="kl")
    kl = kl.loc[list(dict.fromkeys(elsewhere["edit"])), kinds].add_suffix(", mean")
    p99 = elsewhere.pivot(index="edit", columns="text", values="p99")[["all"]].add_suffix(", 99%")
    single = pd.DataFrame(figures["ablations"])
    if figures["ablations_elsewhere"]:
        more = pd.DataFrame(figures["ablations_elsewhere"]).rename(
            columns={"edit": "subcomponent", "kl": "KL elsewhere"}
        )
        single = single.merge(more[["subcomponent", "KL elsewhere", "p99"]], on="subcomponent")
    note = "Important at a token of the prompts; 8 at most for each matrix, one for each different token."
    return [
        viz.table(reached, "What was reached", note="The worse of both facts."),
        viz.table(where(figures), "Which matrices have how many subcomponents", note=note),
        viz.table(
            pd.DataFrame(figures["alone"]),
            "The answer's probability",
            note="rounded: important subcomponents alone, Δ off; attacked: the worst masks found in 20 steps; ablated: all off, "
            "Δ on; l0: important subcomponents per token.",
        ),
        viz.table(
            single,
            "Single subcomponents, ablated out of the full model",
            note="p: the answer's probability afterwards; of: log-probability that a fact loses more than the other.",
        ),
        viz.table(edits, "Edits"),
        viz.table(
            likeliest,
            "The likeliest token after each edit",
            note="Only the first prompt of each subject was trained on.",
        ),
        viz.table(right, "The right answer's probability after each edit"),
        viz.table(other, "The other answer's probability after an exchange"),
        viz.table(
            kl.join(p99),
            "What the edits change elsewhere",
            note=f"KL in nats per token, on {figures['tokens']:,} tokens. At random others: the same edit elsewhere.",
        ),
    ]


def after_edits(answers: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The likeliest token, the right answer's probability, and after exchanges that of the other fact's answer: a row for each
    prompt and a column for each edit.

    Args:
        answers: from ``probabilities``.
    """
    answers = answers.assign(prompt=answers["prompt"].str.replace("\n", "⏎ "), top=answers["top"].str.strip())
    prompts, edits = (list(dict.fromkeys(answers[column])) for column in ("prompt", "edit"))
    likeliest, right, other = (
        answers.pivot(index="prompt", columns="edit", values=value).loc[prompts, edits]
        for value in ("top", "answer", "other")
    )
    return likeliest, right, other[["model", "exchanged", IN_PART]]
