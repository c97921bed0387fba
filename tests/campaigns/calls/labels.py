"""Calls of labels, firings, endpoints and scores. No endpoint is asked: what is asked of them is tried by their tests."""

from __future__ import annotations

from typing import Any

import pandas as pd

from tests.analysis.labels.synthetic import ruled
from tests.campaigns.calls.analysis import config
from tests.campaigns.calls.configs import fields
from tests.campaigns.calls.kinds import (
    SEED,
    Kind,
    boolean,
    choice,
    file_to_write,
    how_many,
    integer,
    number,
    only,
    path_to_read,
    sequence,
    subcomponents,
)
from tests.campaigns.calls.world import Call, World, call
from tl_vpd import analysis
from tl_vpd.analysis.labels import Score

URL = "http://127.0.0.1:9/v1"


def calls(w: World) -> list[Call]:
    """The table."""
    fires = analysis.firings(w.vpd, w.model, w.tokens)
    rules = ruled()
    counts = {"blocks.0.mlp.W_in": 11, "blocks.1.mlp.W_in": 12}
    listed = set(rules.addresses)
    some: Kind = lambda v: subcomponents(counts, none=True)(v) and (v is None or _all_in(v, listed))  # noqa: E731
    endpoint = analysis.Endpoint(base_url=URL, model="small", input_price=1.0, output_price=1.0)
    labels = analysis.label(rules)
    saved = labels.save(w.folder / "labels.json")
    score, judge = Score("intruder", 3, 10), analysis.TokenJudge()
    scores = analysis.LabelScores("judge", {rules.addresses[0]: {"intruder": score}})
    source, judged = {"source": (rules, only(rules))}, {"firings": (rules, only(rules))}
    line: Kind = lambda v: isinstance(v, str) and bool(v.strip()) and v.isprintable() and len(v) <= 200  # noqa: E731
    form: Kind = lambda v: None if isinstance(v, str) else False  # noqa: E731
    named = {**source, "subcomponents": (list(rules.addresses[:2]), some), "config": config(analysis.LabelConfig)}
    return [
        call(analysis.firings, **w.of_prompts, subcomponents=(None, w.several), config=config(analysis.FiringsConfig)),
        call(
            analysis.null_firings,
            **w.target,
            firings=(fires, only(fires)),
            null=("shuffled", choice("untrained", "random directions", "shuffled")),
            seed=(3, SEED),
            batch_size=(2, integer(1)),
            max_bytes=(4096, integer(1)),
        ),
        call(rules.shuffled, "analysis: Firings.shuffled", seed=(3, SEED)),
        call(analysis.FiringsConfig, threshold=(0.25, number(0, 1)), batch_size=(2, integer(1))),
        call(
            lambda **o: dict(analysis.label(**o)),
            "analysis: label",
            **named,
            model=(None, only(None)),
            progress=(False, boolean),
        ),
        call(
            lambda **o: str(analysis.label_cost(**o)),
            "analysis: label_cost",
            **named,
            endpoint=(endpoint, only(endpoint)),
        ),
        call(
            analysis.LabelConfig,
            windows=(3, integer(1)),
            tokens=(3, integer(1)),
            radius=(3, integer(0)),
            max_words=(3, integer(1)),
            max_length=(50, integer(1, 200)),
            seed=(3, SEED),
        ),
        call(
            lambda **o: analysis.score_labels(**o).to_pandas(),
            "analysis: score_labels",
            **judged,
            judge=(judge, only(judge)),
            subcomponents=(rules.addresses[0], some),
            labels=(None, only(None)),
            config=config(analysis.ScoreConfig, per_test=2, radius=3),
        ),
        call(
            analysis.ScoreConfig,
            radius=(3, integer(1)),
            per_test=(3, integer(2)),
            test_share=(0.5, lambda v: None if number(0, 1)(v) and not 0 < float(v) <= 0.95 else number(0, 1)(v)),
            tests=(["fuzzing"], sequence(choice("intruder", "detection", "fuzzing"))),
            seed=(3, SEED),
        ),
        call(lambda **o: analysis.TokenJudge(**o).seed, "analysis: TokenJudge", seed=(3, SEED)),
        call(
            lambda **o: analysis.LanguageJudge(**o).name,
            "analysis: LanguageJudge",
            model=(endpoint, only(endpoint)),
            progress=(False, boolean),
        ),
        call(
            lambda **o: vars(analysis.Label(**o)),
            "analysis: Label",
            text=("a label", line),
            source=("by hand", line),
            scores=(
                {"intruder": score},
                lambda v: isinstance(v, dict) and (v == {"intruder": score} or (None if not v else False)),
            ),
        ),
        call(
            analysis.Labels,
            by_address=(
                dict(labels),
                lambda v: isinstance(v, dict) and (v == dict(labels) or (None if not v else False)),
            ),
        ),
        call(labels.text, "analysis: Labels.text", address=(rules.addresses[0], _any_address)),
        call(labels.top, "analysis: Labels.top", k=(2, how_many)),
        call(labels.beside, "analysis: Labels.beside", table=(fires.to_pandas(), any_of_type(pd.DataFrame))),
        call(labels.with_scores, "analysis: Labels.with_scores", scores=(scores, only(scores))),
        call(labels.save, "analysis: Labels.save", path=(w.folder / "new_labels.json", file_to_write)),
        call(lambda path: dict(analysis.Labels.load(path)), "analysis: Labels.load", path=(saved, path_to_read(saved))),
        call(scores.top, "analysis: LabelScores.top", k=(2, how_many)),
        call(analysis.Endpoint, **{**fields(analysis.Endpoint), "base_url": (URL, form), "model": ("small", form)}),
    ]


def any_of_type(kind: type) -> Kind:
    """Whatever is of a type."""
    return lambda v: isinstance(v, kind)


def _all_in(value: Any, listed: set[str]) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return all(str(v) in listed for v in values)


def _any_address(value: Any) -> bool | None:
    return None if isinstance(value, str) or hasattr(value, "site") else False
