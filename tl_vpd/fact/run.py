"""``tl-vpd fact``: decomposes two facts of SmolLM2-135M, measures what was found, and writes a page.

In the output folder afterwards: ``index.html`` (opens offline), ``figures.json``, ``decomposition/`` and, of a run, ``run/`` and
``naive/`` with their metrics and states.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tl_vpd.analysis import attribution_graph
from tl_vpd.bundled import smollm2
from tl_vpd.decomposition import Decomposition
from tl_vpd.fact import data
from tl_vpd.fact.measures import measure
from tl_vpd.fact.page import fact_page, marks
from tl_vpd.fact.settings import FACTS, STEPS, Facts, config
from tl_vpd.files.atomic import make_folder
from tl_vpd.files.json_files import write_json
from tl_vpd.training import SavingConfig, TargetedConfig, decompose_targeted

Say = Callable[[str], None]
NAME = "SmolLM2-135M-Instruct"
QUICK_ROWS = 8
"""Rows of each kind of text on which the result that ships is measured again."""
CHOOSING_EVERY = 25
"""Edits are chosen on every so-many-th row of the non-target stream."""


def run_fact(
    folder: Path, *, finished: bool = False, resume: bool = False, steps: int = STEPS, seed: int = 0, say: Say
) -> None:
    """Decomposes the facts, or takes the result that ships, and writes the folder.

    Args:
        folder: for the output.
        finished: take the decomposition that ships, and measure it on a part of the text.
        resume: go on with a run that was interrupted.
        steps: of the run.
        seed: of the run.
        say: prints a text.

    Raises:
        ImportError: the extra ``real`` is not installed.
        OSError: the folder cannot be written.
        FileExistsError: it has a run, and ``resume`` is False.
    """
    make_folder(folder)
    say("1. The model: SmolLM2-135M-Instruct")
    model, naive = smollm2(), None
    if finished:
        say("\n2. The decomposition that ships")
        vpd, text = data.finished(), data.other_text(QUICK_ROWS)
    else:
        say(f"\n2. The decomposition: {steps} steps, and a naive one, of the target alone")
        settings = config(steps=steps, seed=seed), config(steps=steps, seed=seed, naive=True)
        vpd, naive = (
            decomposed(model, FACTS, how, folder / name, resume=resume)
            for name, how in zip(("run", "naive"), settings, strict=True)
        )
        text = data.other_text()
        vpd.record["target"]["name"] = NAME  # in place of the folder in the user's cache
    vpd.save(folder / "decomposition")
    say(
        "\n3. What it does"
        + (f" (the shipped figures are of {data.finished_figures()['tokens']:,} tokens)" if finished else "")
    )
    figures = measure(vpd, model, text, FACTS, data.training_rows()[::CHOOSING_EVERY], naive=naive)
    report(vpd, model, figures, FACTS, folder, say=say)


def decomposed(
    model: nn.Module, facts: Facts, settings: TargetedConfig, folder: Path, *, rows: Tensor | None = None, resume: bool
) -> Decomposition:
    """The facts' decomposition without what they do not use.

    Args:
        model: the target.
        facts: that are decomposed.
        settings: of the run.
        folder: for it.
        rows: the non-target stream (None: that of the run that ships; where it has no loss, the prompts, which cost less).
        resume: go on with it, where it has begun.
    """
    if rows is None:
        naive = not settings.coefficients.nontarget
        rows = model.to_tokens(facts.prompts).repeat(8, 1) if naive else data.training_rows()  # type: ignore[operator]
    resume = resume and (folder / "state").is_dir()
    saving = SavingConfig(folder=folder, save_every=20)
    run = decompose_targeted(model, facts.prompts, rows, settings, saving=saving, resume=resume)
    if not run.finished:
        raise KeyboardInterrupt
    return run.decomposition.compact(model, facts.prompts)


def report(
    decomposition: Decomposition, model: nn.Module, figures: dict[str, Any], facts: Facts, folder: Path, *, say: Say
) -> None:
    """Prints, and writes ``figures.json`` and ``index.html``.

    Args:
        decomposition: of the facts.
        model: the target.
        figures: from ``measure``; ``marks`` are added.
        facts: the facts.
        folder: for the files.
        say: prints a text.
    """
    table = marks(figures)
    figures["marks"] = table.to_dict("records")
    write_json(folder / "figures.json", figures)
    say("   " + table.to_string(index=False).replace("\n", "\n   "))
    graph = attribution_graph(decomposition, model, facts.prompts[0])
    path = fact_page(figures, graph, folder / "index.html")
    say(f"\n4. Look at it: {path.resolve()}")
