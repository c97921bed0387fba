"""Calls of ``tl_vpd.evaluation``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import tl_vpd
from tests.campaigns.calls.analysis import config
from tests.campaigns.calls.kinds import (
    SEED,
    Kind,
    any_of,
    boolean,
    choice,
    either,
    equal,
    file_to_write,
    how_many,
    integer,
    number,
    only,
    optional,
    path_to_read,
    plain,
    sequence,
)
from tests.campaigns.calls.world import Call, World, call
from tl_vpd import evaluation


def calls(w: World) -> list[Call]:
    """The table."""
    return [*_whole(w), *_of_a_sample(w), *_of_decompositions(w), *_configs(w)]


def _whole(w: World) -> list[Call]:
    data = {**w.target, "tokens": w.of_prompts["prompts"]}
    report = w.evaluation
    tables = choice(*(k for k, v in report.record.items() if isinstance(v, list) and v and isinstance(v[0], dict)))
    return [
        call(
            lambda **o: _timeless(tl_vpd.evaluate(**o).record),
            "evaluation: evaluate",
            **data,
            config=(w.cheap, optional(only(w.cheap))),
            off_distribution=({}, _empty),
            others=(None, _empty),
            nulls=(None, _empty),
        ),
        call(report.save, path=(w.folder / "new.json", file_to_write)),
        call(
            lambda path: tl_vpd.Evaluation.load(path).record,
            "evaluation: Evaluation.load",
            path=(w.saved_evaluation, path_to_read(w.saved_evaluation)),
        ),
        call(evaluation.checks, record=(report, _report(report))),
        call(evaluation.warnings_of, record=(report, _report(report))),
        call(lambda table: _table(report, table), "evaluation: Evaluation.to_pandas", table=("none", either(tables))),
    ]


def _empty(value: Any) -> bool | None:
    return True if value is None else (None if isinstance(value, dict) and not value else False)


def _table(report: Any, name: Any) -> Any:
    """A table that this report does not have is refused; the right name is refused by name, too."""
    if isinstance(name, str) and name == "none":
        return None
    return report.to_pandas(name)


def _report(report: Any) -> Kind:
    return lambda value: True if value is report else (None if isinstance(value, dict) else False)


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if "seconds" not in k and "version" not in k}


USUAL = object()
"""Stands for the sample of the two rows, which is closed after each call."""


def _of_a_sample(w: World) -> list[Call]:
    def measured(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(sample: Any, **options: Any) -> Any:
            with w.sample() as usual:
                return function(usual if sample is USUAL else sample, **options)

        return call

    def sampled(**options: Any) -> Any:
        with evaluation.sampled(**options) as sample:
            return len(sample.rows)

    sample = {"sample": (USUAL, only(USUAL))}
    threshold = {**sample, "threshold": (0.25, number(0, 1))}
    adversary = evaluation.Adversary(steps=1)
    one: Kind = lambda v: isinstance(v, evaluation.Adversary)  # noqa: E731
    return [
        call(
            sampled,
            "evaluation: sampled",
            **w.target,
            tokens=w.of_prompts["prompts"],
            batch_size=(2, integer(1)),
            seed=(3, SEED),
            keep_bytes=(1000, integer(0)),
        ),
        call(
            measured(evaluation.adversaries),
            "evaluation: adversaries",
            **sample,
            kinds=([adversary], optional(either(sequence(one)))),
            budgets=([1], lambda v: None if equal([], ())(v) else sequence(integer(1))(v)),
            rows=(1, optional(either(integer(1, 2)))),
        ),
        call(
            measured(lambda s, adversary: evaluation.attack(s, adversary).kl),
            "evaluation: attack",
            **sample,
            adversary=(adversary, one),
        ),
        call(
            measured(evaluation.future_leakage),
            "evaluation: future_leakage",
            **sample,
            positions=([2], either(sequence(integer(1, 5)))),
            modes=(["rounded"], either(sequence(choice("rounded", "ci", "unmasked")))),
        ),
        call(measured(evaluation.hidden_errors), "evaluation: hidden_errors", **threshold),
        call(
            measured(evaluation.mask_transfer), "evaluation: mask_transfer", **threshold, single_sites=(False, boolean)
        ),
        call(
            measured(evaluation.sparsity_sweep),
            "evaluation: sparsity_sweep",
            **sample,
            thresholds=([0.5], sequence(number(0, 1))),
        ),
        call(
            measured(evaluation.union_test),
            "evaluation: union_test",
            **threshold,
            sizes=([2], either(sequence(integer(2, 2)))),
        ),
        call(measured(evaluation.union_test_pairs), "evaluation: union_test_pairs", **threshold),
    ]


def _of_decompositions(w: World) -> list[Call]:
    data = {**w.target, "tokens": w.of_prompts["prompts"]}
    both = {"a": w.vpd, "b": w.vpd}
    other = {"other": w.tokens}
    return [
        call(evaluation.alive_subcomponents, **data, above=(0.25, number(0, 1)), batch_size=(2, integer(1))),
        call(
            evaluation.cancelling_pairs,
            decomposition=(w.vpd, only(w.vpd)),
            below=(-0.5, number(-1, 1)),
            smallest=(0.25, either(number(0, 1))),
            k=(3, how_many),
        ),
        call(
            evaluation.consistency,
            one=(w.vpd, only(w.vpd)),
            other=(w.vpd, only(w.vpd)),
            alive=(None, lambda v: v is None),
            seed=(3, SEED),
        ),
        call(
            evaluation.feature_splitting,
            decompositions=(both, only(both)),
            model=data["model"],
            tokens=data["tokens"],
            batch_size=(2, integer(1)),
            seed=(3, SEED),
            keep_bytes=(1000, integer(0)),
        ),
        call(
            evaluation.off_distribution, **w.target, data=(other, only(other)), config=config(tl_vpd.EvaluationConfig)
        ),
        call(evaluation.scrambled, model=data["model"], tokens=data["tokens"], seed=(3, SEED)),
        call(
            evaluation.compute_recovered,
            ce=(2.5, lambda v: number()(v) or (None if isinstance(plain(v), float) else False)),
            curve=([[1, 3.0], [2, 2.0]], either(_curve)),
        ),
    ]


def _curve(value: Any) -> bool | None:
    if not isinstance(value, list | tuple) or len(value) < 1:
        return False
    points = all(isinstance(p, list | tuple) and len(p) == 2 and all(number()(x) for x in p) for p in value)
    return points and all(a[0] < b[0] for a, b in itertools.pairwise(value))


def _configs(w: World) -> list[Call]:
    budgets = sequence(integer(1), minimum=0)
    measures = sequence(choice(*evaluation.MEASURES), minimum=0)
    return [
        call(
            tl_vpd.EvaluationConfig,
            measures=(["hidden"], measures),
            budgets=([3], budgets),
            starts=(3, any_of(integer(1), equal({}))),
            adversary_budgets=([3], budgets),
            attack_rows=(3, optional(integer(1))),
            controls=(False, boolean),
            control_budgets=([3], budgets),
            batch_size=(3, integer(1)),
            seed=(3, SEED),
            curve=(None, optional(either(_curve))),
            keep_bytes=(1000, integer(0)),
            leak_rows=(3, integer(1)),
            leak_positions=(3, integer(1)),
        ),
        call(
            evaluation.Adversary,
            scope=("shared", choice("shared", "position", "token")),
            steps=(3, either(integer(1))),
            step_size=(0.5, optional(number(above=0))),
            momentum=(0.5, lambda v: None if number(1, 1)(v) else number(0, 1)(v)),
            starts=(3, integer(1)),
            explanations=(3, optional(integer(1))),
        ),
    ]
