"""``tl-vpd eval``: a decomposition, a model and tokens by name, and the report as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from tl_vpd.evaluation import LADDER, MEASURES, Evaluation, EvaluationConfig, evaluate
from tl_vpd.recipe.data import DataRecipe
from tl_vpd.recipe.named import Named

N = TypeVar("N", int, float)


def evaluate_by_name(
    named: Named, config: EvaluationConfig, *, off_distribution: Mapping[str, str], others: Mapping[str, str]
) -> Evaluation:
    """Evaluates a decomposition; of other text (files by name) as many rows are used, ``others`` are folders by name."""
    vpd, model, tokens = named.load()

    def text(files: str) -> Int[Tensor, "_ pos"]:
        recipe = DataRecipe(tokens=files, key=named.data.key if files.endswith(".safetensors") else None)
        return recipe.first(model, named.rows, default_key="validation")

    return evaluate(
        vpd,
        model,
        tokens,
        config,
        off_distribution={name: text(files) for name, files in off_distribution.items()},
        others={name: named.decomposition_of(folder) for name, folder in others.items()},
    )


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """An evaluation's verdict and tables as text."""
    record = evaluation.record
    lines = [f"! {warning}" for warning in evaluation.warnings] or ["No known fault was found."]
    lines.append("\n" + evaluation.table().round(4).to_string())
    for name, rows in record["tables"].items():
        if rows:
            lines.append(f"\n{name}\n" + evaluation.to_pandas(name).round(4).to_string(index=False))
    lines.append("\n" + evaluation.sites_table().round(3).to_string())
    target = f"target CE {record['target_ce']:.4f}   " if record.get("target_ce") is not None else ""
    lines.append(
        f"{target}L0 {record['l0']:.1f} per token of {record['alive']} alive, "
        f"{record['built']} built, {record['summed_rank']} summed ranks   {record['tokens']} tokens"
    )
    return lines + [f"{name} left out: {reason}" for name, reason in record["left_out"].items()]


def measures_of(text: str) -> Sequence[str]:
    """``all``, ``none``, or names with commas."""
    return {"all": MEASURES, "none": ()}.get(text) or [name for name in text.split(",") if name not in ("", "none")]


def budgets_of(text: str) -> tuple[Sequence[int], Sequence[int]]:
    """Steps of the standard adversary and of the other kinds: ``ladder`` (the others: 20 and 80), or numbers with commas."""
    steps = LADDER if text == "ladder" else numbers("--budgets", text, int)
    return steps, (20, 80) if text == "ladder" else steps


def numbers(option: str, text: str, kind: type[N]) -> list[N]:
    """Numbers with commas; raises ValueError where one is not a number of that kind."""
    try:
        return [kind(number) for number in text.split(",") if number.strip()]
    except ValueError as error:
        which = "whole numbers with commas, such as 20,320" if kind is int else "numbers with commas, such as 0.5,1,2"
        raise ValueError(f"{option} {text!r}: give {which}.") from error


def by_name(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    """``NAME=VALUE`` options; raises ValueError where one has no name or no value."""
    result = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        if not (name and value):
            raise ValueError(f"{option} {text!r}: give a name and a path, such as {option} prose=text.txt.")
        result[name] = value
    return result


def check_writable(*paths: Path | None) -> None:
    """Raises OSError for paths of files that could not be written, before anything is computed."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: {path.parent} is not a folder.")
        if path is not None and path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: give the name of a file.")
