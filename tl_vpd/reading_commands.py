"""``tl-vpd dashboard`` and ``tl-vpd label``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_vpd.console import DecompositionName, Device, Key, ModelKind, ModelName, Tokens, Trust, command, named, say

Components = Annotated[Path | None, typer.Option(help="File that Clustering.save wrote.")]


@command
def dashboard(
    decomposition: DecompositionName,
    out: Annotated[Path, typer.Option(help="New folder of the pages.")],
    model: ModelName = "bundled",
    kind: ModelKind = None,
    device: Device = "cpu",
    tokens: Tokens = "bundled",
    key: Key = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of tokens to look at.")] = 512,
    alpha: Annotated[float, typer.Option(min=0, help="Of the components, as in docs/components.md; 0 for none.")] = 3.0,
    components: Components = None,
    labels: Annotated[
        Path | None, typer.Option(help="File of tl-vpd label (.json), or subcomponent, label and numbers (.csv).")
    ] = None,
    graph_rows: Annotated[int, typer.Option(min=0, help="Rows that edges are computed on; 0 for no edges.")] = 4,
    prompts: Annotated[int, typer.Option(min=0, help="Rows to look at token by token; 0 for none.")] = 12,
    trust_remote_code: Trust = False,
) -> None:
    """Pages about every subcomponent, with search and sorting, that open offline."""
    from tl_vpd.recipe.dashboards import Pages, dashboard_by_name

    pages = Pages(alpha, components, labels, graph_rows, prompts)
    what = named(decomposition, model, kind, device, tokens, key, rows, trust_remote_code)
    say(f"Written: open {dashboard_by_name(what, out, pages)}")


@command
def label(
    decomposition: DecompositionName,
    out: Annotated[Path, typer.Option(help="New file of the labels (.json).")],
    model: ModelName = "bundled",
    kind: ModelKind = None,
    device: Device = "cpu",
    tokens: Tokens = "bundled",
    key: Key = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows of tokens: half for labels, half for scores.")] = 128,
    most: Annotated[int | None, typer.Option(min=1, help="How many, of the largest importance (default: all).")] = None,
    components: Components = None,
    endpoint: Annotated[str | None, typer.Option(help="OpenAI-compatible address, up to /v1 (default: none).")] = None,
    language_model: Annotated[str | None, typer.Option(help="Its name there.")] = None,
    key_variable: Annotated[str, typer.Option(help="Environment variable of its key.")] = "OPENAI_API_KEY",
    prices: Annotated[str | None, typer.Option(help="Of a million tokens sent and answered, as 0.4,1.6.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="What may cost more is not asked.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Folder of answers (default: beside --out).")] = None,
    local: Annotated[Path | None, typer.Option(help="Folder of a language model that labels here.")] = None,
    judge: Annotated[str, typer.Option(help="Of the labels: tokens, model or none.")] = "tokens",
    cost: Annotated[bool, typer.Option("--cost", help="Say what the endpoint's labels would cost, and stop.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Labels of subcomponents and components, with scores: by token statistics, an endpoint, or a model in this process."""
    from tl_vpd.recipe.labelling import Labelling, endpoint_of, label_by_name

    asked = endpoint_of(
        endpoint, language_model, key_variable, prices, max_cost, answers or out.with_suffix(".answers")
    )
    labelling = Labelling(most, components, asked, local, judge)
    what = named(decomposition, model, kind, device, tokens, key, rows, trust_remote_code)
    labels = label_by_name(what, out, labelling, only_cost=cost, say=say)
    if not cost:
        table = labels.to_pandas()
        say(table.drop(columns=["label", "source"]).mean(numeric_only=True).round(3).to_string())
        say(f"{len(labels)} labels.  Written: {out}")
