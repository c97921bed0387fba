"""``tl-vpd card`` and ``tl-vpd push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tl_vpd.console import command, say

Folder = Annotated[Path, typer.Argument(help="Folder of a decomposition.")]
ReportFile = Annotated[Path | None, typer.Option(help="Its report (default: metrics.json in the folder, if any).")]
Licence = Annotated[str | None, typer.Option(help="Of the decomposition, as the Hub names it, such as mit.")]
BaseModel = Annotated[str | None, typer.Option(help="The target's name on the Hub.")]
TargetLicence = Annotated[str | None, typer.Option(help="Of the target.")]
Datasets = Annotated[list[str] | None, typer.Option("--dataset", help="Name on the Hub of the text; may be repeated.")]
TextLicence = Annotated[str | None, typer.Option(help="Of the text.")]


@command
def card(
    folder: Folder,
    report: ReportFile = None,
    out: Annotated[Path | None, typer.Option(help="File for the card (default: printed).")] = None,
    repository: Annotated[str | None, typer.Option(help="user/repo where it will be loaded from.")] = None,
    licence: Licence = None,
    base_model: BaseModel = None,
    target_licence: TargetLicence = None,
    dataset: Datasets = None,
    text_licence: TextLicence = None,
) -> None:
    """The card of a decomposition: what it is, how to load it, what was measured and what may be claimed."""
    from tl_vpd.files.atomic import write_text

    names = {"licence": licence, "base_model": base_model, "target_licence": target_licence}
    decomposition, evaluation, config = _ready(folder, report, **names, datasets=dataset, text_licence=text_licence)
    text = str(decomposition.model_card(repository, report=evaluation, card=config))
    if out is None:
        typer.echo(text)
    else:
        write_text(out, text)
        say(f"Written: {out}")


@command
def push(
    folder: Folder,
    repository: Annotated[str, typer.Argument(help="user/repo on the Hugging Face Hub; made if needed.")],
    report: ReportFile = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees it (default: as it is, or as the account says).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if needed (default: the main one).")] = None,
    licence: Licence = None,
    base_model: BaseModel = None,
    target_licence: TargetLicence = None,
    dataset: Datasets = None,
    text_licence: TextLicence = None,
) -> None:
    """Push a decomposition to the Hugging Face Hub, with its report and its card, in one commit."""
    names = {"licence": licence, "base_model": base_model, "target_licence": target_licence}
    decomposition, evaluation, config = _ready(folder, report, **names, datasets=dataset, text_licence=text_licence)
    address = decomposition.push_to_hub(repository, report=evaluation, card=config, private=private, revision=revision)
    say(f"Pushed: {address}")


def _ready(folder: Path, report: Path | None, **card: Any) -> tuple[Any, Any, Any]:
    """What ``card`` and ``push`` work on: the decomposition, its report, and the card's config."""
    from tl_vpd.publishing import CardConfig
    from tl_vpd.recipe.publishing import decomposition_and_report

    config = CardConfig(**{**card, "datasets": tuple(card["datasets"] or ())})
    return *decomposition_and_report(folder, report), config
