"""Calls of ``tl_vpd.viz`` and ``tl_vpd.formats``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from tests.campaigns.calls.kinds import (
    choice,
    either,
    file_to_write,
    folder_to_write,
    how_many,
    integer,
    only,
    optional,
    sequence,
    subcomponents,
    text,
)
from tests.campaigns.calls.world import Call, K, Q, World, call
from tl_vpd import formats, viz
from tl_vpd.analysis import attention


def calls(w: World) -> list[Call]:
    """The table."""
    prompts = dict(decomposition=w.vpd, model=w.model, prompts=w.tokens, layer=0)
    norms, offsets = attention.head_norms(w.vpd, 0), attention.attention_by_offset(**prompts)
    static = attention.static_strengths(**prompts, subcomponents=[f"{Q}:1", f"{K}:2"], length=4)
    harvest, graph = w.harvest, w.graph
    title = ("A title", text)
    words = [str(i) for i in range(7)]
    one = subcomponents(w.counts, lists=False)
    pairs = [(f"{Q}:1", f"{K}:2")]
    terms = ("total", "faithfulness", "stochastic", "adversarial", "importance", "frequency", "l0")
    history = pd.DataFrame({"step": [1, 2], **{name: [2.0, 1.0] for name in terms}})
    panel = viz.table(history, "caption")
    return [
        call(viz.attention_by_offset, attention=(offsets, only(offsets))),
        call(
            viz.evaluation_page,
            report=(w.evaluation, only(w.evaluation)),
            path=(w.folder / "page.html", file_to_write),
            title=title,
        ),
        call(
            viz.graph,
            attribution=(graph, only(graph)),
            nodes=(3, integer(1)),
            edges=(3, integer(1)),
            harvest=(harvest, optional(only(harvest))),
            labels=({f"{Q}:1": "a label"}, lambda v: v is None or (None if isinstance(v, dict) else False)),
            title=title,
        ),
        call(viz.head_norms, norms=(norms, only(norms)), top=(3, integer(1)), title=title),
        call(viz.importances, **w.of_prompt, subcomponents=([f"{Q}:1"], w.several), k=(6, how_many)),
        call(
            viz.pair_attention,
            terms=(w.terms, only(w.terms)),
            tokens=(words, optional(lambda v: _words(v, 7))),
            row=(0, lambda v: None if integer(-2, -1)(v) else integer(0, 1)(v)),
            heads=([0], optional(sequence(integer(0, 1)))),
        ),
        call(
            viz.static_strengths,
            strengths=(static, only(static)),
            pairs=(pairs, optional(either(only(pairs)))),
            top=(6, integer(1)),
            max_offset=(2, optional(integer(0))),
        ),
        call(
            viz.subcomponent,
            harvest=(harvest, only(harvest)),
            address=(harvest.to_pandas()["subcomponent"][0], one),
            note=title,
            windows=(2, optional(how_many)),
            tokens=(3, how_many),
        ),
        call(viz.table, df=(history, _frame), caption=title, note=title),
        call(viz.losses, history=(history, only(history)), title=title),
        call(
            viz.page,
            panels=([panel], either(sequence(only(panel)))),
            title=title,
            path=(w.folder / "page.html", file_to_write),
            introduction=title,
        ),
        call(panel.save, path=(w.folder / "panel.html", file_to_write)),
        call(
            lambda **o: Path(formats.to_circuit_tracer(**o)).name,
            "formats: to_circuit_tracer",
            graph=(graph, only(graph)),
            folder=(w.folder / "tracer", folder_to_write),
            slug=("a-slug", either(choice("a-slug", "x"))),
            scan=("x", either(choice("x"))),
            prompt=(None, optional(text)),
        ),
    ]


def _words(value: Any, n: int) -> bool | None:
    if not isinstance(value, list | tuple) or len(value) != n:
        return False
    return all(isinstance(v, str) for v in value)


def _frame(value: Any) -> bool:
    return isinstance(value, pd.DataFrame)
