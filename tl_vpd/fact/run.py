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
from tl_vpd.fact.measures import Text, measure
from tl_vpd.fact.page import fact_page, marks
from tl_vpd.fact.settings import FACTS, STEPS, Facts, config
from tl_vpd.files.atomic import make_folder
from tl_vpd.files.json_files import write_json
from tl_vpd.training import SavingConfig, TargetedConfig, decompose_targeted

Say = Callable[[str], None]
NAME = "SmolLM2-135M-Instruct"
QUICK_ROWS = 8
"""Rows of each kind of text on which the result that ships is measured again."""
NAIVE = 5
"""The naive run has this part of the steps."""


def run_fact(folder: Path, *, finished: bool = False, resume: bool = False, steps: int = STEPS, say: Say) -> None:
    """Decomposes the facts, or takes the result that ships, and writes the folder.

    Args:
        folder: for the output.
        finished: take the decomposition that ships, and measure it on a part of the text.
        resume: go on with a run that was interrupted.
        steps: of the run.
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
        say(f"\n2. The decomposition: {steps} steps, and a naive one (the target alone) of {max(1, steps // NAIVE)}")
        vpd, naive = decompositions(model, FACTS, data.training_rows(), folder, steps=steps, resume=resume)
        text = data.other_text()
        vpd.record["target"]["name"] = NAME  # in place of the folder in the user's cache
    vpd.save(folder / "decomposition")
    say(
        "\n3. What it does"
        + (f" (the shipped figures are of {data.finished_figures()['tokens']:,} tokens)" if finished else "")
    )
    report(vpd, model, text, FACTS, folder, naive=naive, say=say)


def decompositions(
    model: nn.Module,
    facts: Facts,
    rows: Tensor,
    folder: Path,
    *,
    steps: int,
    resume: bool,
    settings: TargetedConfig | None = None,
) -> tuple[Decomposition, Decomposition]:
    """The facts' decomposition without what they do not use, and that of the target stream alone.

    Args:
        model: the target.
        facts: that are decomposed.
        rows: the non-target stream.
        folder: for both runs.
        steps: of the first.
        resume: go on with them.
        settings: of the first, in place of ``config`` (None: those).
    """
    found = []
    for name, n, naive in (("run", steps, False), ("naive", max(1, steps // NAIVE), True)):
        how = config(steps=n, naive=naive)
        if settings is not None:
            how = TargetedConfig(**{**how.model_dump(), "sites": settings.sites, "C": settings.C})
        saving = SavingConfig(folder=folder / name, save_every=100)
        others = model.to_tokens(facts.prompts).repeat(8, 1) if naive else rows  # type: ignore[operator]
        start = resume and (folder / name / "state").is_dir()
        run = decompose_targeted(model, facts.prompts, others, how, saving=saving, resume=start)
        if not run.finished:
            raise KeyboardInterrupt
        found.append(run.decomposition.compact(model, facts.prompts))
    return found[0], found[1]


def report(
    decomposition: Decomposition,
    model: nn.Module,
    text: Text,
    facts: Facts,
    folder: Path,
    *,
    naive: Decomposition | None = None,
    say: Say,
) -> dict[str, Any]:
    """Measures, prints and writes ``figures.json`` and ``index.html``; returns the figures.

    Args:
        decomposition: of the facts.
        model: the target.
        text: other text by kind.
        facts: the facts.
        folder: for the files.
        naive: of the target stream alone.
        say: prints a text.
    """
    figures = measure(decomposition, model, text, facts, naive=naive)
    figures["marks"] = marks(figures).to_dict("records")
    write_json(folder / "figures.json", figures)
    say("   " + marks(figures).to_string(index=False).replace("\n", "\n   "))
    graph = attribution_graph(decomposition, model, facts.prompts[0])
    path = fact_page(figures, graph, folder / "index.html")
    say(f"\n4. Look at it: {path.resolve()}")
    return figures
