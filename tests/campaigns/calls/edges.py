"""Calls of circuits of edges: ``tl_vpd.analysis.edge_attribution``, ``edges`` and ``tl_vpd.formats.load_circuit``."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.campaigns.calls.kinds import SEED, choice, how_many, integer, optional, own, path_to_read
from tests.campaigns.calls.world import Call, World, call, metric
from tl_vpd import analysis, formats

NODES = r"a\d+\.h\d+|m\d+"


def calls(w: World) -> list[Call]:
    """The table."""
    target = {name: value for name, value in w.of_prompts.items() if name != "decomposition"}
    zero = analysis.EdgeAttributionConfig(reference="zero")
    scores = analysis.edge_attribution(w.model, w.prompt, metric, config=zero)
    path = w.folder / "circuit.json"
    path.write_text(json.dumps(["input->m0", "m0->logits"]), encoding="utf-8")
    return [
        call(
            analysis.edge_attribution,
            **target,
            metric=(metric, own(metric)),
            reference_prompts=(None, optional(w.of_prompts["prompts"][1])),
            # Without a config, corrupted prompts are needed.
            config=(zero, lambda v: None if v is None else isinstance(v, analysis.EdgeAttributionConfig)),
        ),
        call(
            analysis.EdgeAttributionConfig,
            ig_steps=(3, integer(1)),
            reference=("zero", choice("zero", "mean", "resample", "corrupted")),
            seed=(3, SEED),
        ),
        call(
            analysis.Edge,
            source=("input", lambda v: _named(v, f"input|{NODES}")),
            target=("a0.h0", lambda v: None if _named(v, "m\\d+|logits") else _named(v, NODES)),
            reads=("q", optional(choice("q", "k", "v"))),
            pos=(3, optional(integer(0, 2**64 - 1, size=False))),
        ),
        call(scores.top, k=(3, how_many)),
        # Few edges may contain no path from the input to the logits.
        call(scores.circuit, k=(60, lambda v: None if integer(1)(v) is not False else False)),
        call(formats.load_circuit, path=(path, path_to_read(path)), top=(1, optional(integer(1)))),
    ]


def _named(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None
