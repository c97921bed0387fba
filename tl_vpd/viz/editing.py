"""The page of an edit: what it changes, what it does beside its controls, and where."""

from __future__ import annotations

import os
from pathlib import Path

from tl_vpd.checks import instance
from tl_vpd.editing import EditEvaluation
from tl_vpd.viz.panel import Panel, page
from tl_vpd.viz.tables import table
from tl_vpd.viz.text import visible

INTRODUCTION = (
    "KL is the divergence of the edited model's prediction from the model's, in nats, over tokens: firing, where an edited "
    "subcomponent is important; near, on either side of those; elsewhere, wherever none is. The controls make the same change at "
    "a random other subcomponent of the weight and along a singular direction."
)


def edit_page(result: EditEvaluation, path: str | os.PathLike[str], *, title: str = "Edit") -> Path:
    """Writes the page of an edit, which opens offline; returns the path.

    Args:
        result: from ``evaluate_edit``.
        path: of the page.
        title: of the page.

    Raises:
        TypeError: the result is something else.
    """
    return page(edit_panels(result), title, path, introduction=INTRODUCTION)


def edit_panels(result: EditEvaluation) -> list[Panel]:
    """The panels of an edit's page.

    Args:
        result: from ``evaluate_edit``.

    Raises:
        TypeError: the result is something else.
    """
    instance("result", result, EditEvaluation)
    measured = f"{int(result.activity.real.sum()):,} tokens; 99th percentiles are in the columns _p99."
    panels = [
        table(
            result.edit.to_pandas(),
            "The edit",
            note="norm: of the change of the weight; relative: to the write direction.",
        ),
        table(result.table, "What it does", note=measured),
        table(
            result.frequencies(), "Where it acts", note="Frequency of tokens at which the subcomponent is important."
        ),
    ]
    if len(result.contexts):
        shown = result.contexts.copy()
        for column in ("context", "token", "before", "after"):
            shown[column] = [visible(text) for text in shown[column]]
        note = "The most likely next token of the model (before) and of the edited one (after)."
        panels.append(table(shown, "The most changed contexts", note=note))
    return panels
