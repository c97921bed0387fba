"""Two harvests of the same subcomponents on different rows as one: the same as one harvest of all rows.

Sums are added, windows are the best of both, columns those of both. So rows can be harvested in several parts or processes.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from tl_vpd.analysis.harvest.columns import Columns
from tl_vpd.analysis.harvest.result import Harvest
from tl_vpd.analysis.harvest.tokens import total
from tl_vpd.checks import instance


def merge(first: Harvest, second: Harvest) -> Harvest:
    """The harvest of the rows of both; rows of the second part are numbered by ``HarvestConfig(first_row=...)``.

    Columns stay where they are: ``save`` brings them together.

    Args:
        first: a harvest.
        second: of the same subcomponents with the same config, on other rows.

    Raises:
        ValueError: they are of different decompositions, configs or lengths of rows, have rows in common, or only one has
            columns.
        TypeError: an argument is not a Harvest.
    """
    instance("first", first, Harvest)
    instance("second", second, Harvest)
    check_mergeable(first, second)
    if second.rows[0] < first.rows[0]:
        first, second = second, first
    runs = sorted(first.rows + second.rows)
    if any(start < stop for (_, stop), (start, _) in pairwise(runs)):
        raise ValueError(
            f"The harvests have rows in common, {first.rows} and {second.rows}: number the second part's rows by "
            "HarvestConfig(first_row=...)."
        )
    return joined(first, second)


def joined(first: Harvest, second: Harvest, limit: int | None = None) -> Harvest:
    """``merge`` without checks.

    Args:
        first: with the earlier rows.
        second: the other.
        limit: pairs of subcomponent and token that stay (None: all).
    """
    sums = ("n", "importance", "positive", "firings", "activation", "histogram", "together")
    columns = None
    if first.columns is not None and second.columns is not None:
        columns = Columns(first.columns.files + second.columns.files, first.context)
    return replace(
        first,
        **{name: getattr(first, name) + getattr(second, name) for name in sums},
        windows=first.windows.best(second.windows),
        samples=first.samples.best(second.samples),
        inputs=total([first.inputs, second.inputs], limit),
        outputs=total([first.outputs, second.outputs], limit),
        names={**first.names, **second.names},
        rows=_runs(first.rows + second.rows),
        columns=columns,
    )


def check_mergeable(first: Harvest, second: Harvest) -> None:
    """Raises ValueError unless two harvests are of the same subcomponents, configs and lengths of rows."""
    same = first.site_axis.counts == second.site_axis.counts and torch.equal(first.chosen, second.chosen)
    if not same or not torch.allclose(first.norm, second.norm, rtol=1e-4):
        raise ValueError("The harvests are of different decompositions or subcomponents: only rows may differ.")
    one, other = first.config.what(), second.config.what()
    if different := [name for name in one if one[name] != other[name]]:
        name = different[0]
        raise ValueError(
            f"The harvests were made with {name}={one[name]} and {name}={other[name]}: give both the same."
        )
    if first.context != second.context:
        raise ValueError(f"The harvests have rows of {first.context} and of {second.context} tokens: give equal ones.")
    if (first.columns is None) != (second.columns is None):
        raise ValueError(
            "One harvest has columns on the disk and the other has none: make both in folders, or neither."
        )


def _runs(rows: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Runs of rows in order, those that touch as one."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(rows):
        if runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], stop
        else:
            runs.append((start, stop))
    return tuple(runs)
