"""Trials and the judge without a language model, on firings by known rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.analysis.labels.synthetic import firings_where, ruled, text
from tl_vpd.analysis.labels import Excerpt, LabelScores, Score, ScoreConfig, TokenJudge, score_labels
from tl_vpd.analysis.labels.offline import Context, Statistics, discriminant, shape, threshold
from tl_vpd.analysis.labels.trials import TrialMaker

CONFIG = ScoreConfig(radius=6)


@pytest.fixture(scope="module")
def scores():
    return score_labels(ruled(), TokenJudge(), config=CONFIG)


def test_known_rules_score_nearly_1_and_shuffled_windows_chance(scores):
    table = scores.by_site({"shuffled": score_labels(ruled().shuffled(1), TokenJudge(), config=CONFIG)})
    table = table[table["site"] == "all"].set_index("test")
    assert table["addresses"].tolist() == [12, 12, 12]
    assert table["score"].min() > 0.95
    assert table["shuffled"].to_dict() == pytest.approx({"intruder": 0.2, "detection": 0.5, "fuzzing": 0.5}, abs=0.1)
    assert (table["over shuffled_low"] > 0.3).all()
    assert (table["score_low"] <= table["score"]).all() and (table["score"] <= table["score_high"]).all()


def test_a_judge_sees_neither_importances_nor_the_rows_of_trials():
    """Trials have tokens and marks alone; what a judge learns from are firings of other rows."""
    seen = {}

    class Spy:
        name, needs_labels = "spy", False

        def answers(self, trials, training, labels):
            seen.update(trials=trials, training=training, labels=labels)
            return [None] * len(trials)

    fires = ruled()
    result = score_labels(fires, Spy(), config=CONFIG)
    assert {s.right for by_test in result.scores.values() for s in by_test.values()} == {0}
    rows = {tuple(row) for row in seen["training"].tokens.tolist()}
    assert len(rows) == 30
    assert seen["labels"] == {}
    for trial in seen["trials"]:
        assert vars(trial).keys() == {"test", "address", "excerpts"}
        for excerpt in trial.excerpts:
            assert vars(excerpt).keys() == {"tokens", "texts", "marks"}
            assert (excerpt.marks is None) == (trial.test == "detection")
            joined = ",".join(map(str, excerpt.tokens))
            assert not any(joined in ",".join(map(str, row)) for row in rows if len(excerpt.tokens) > 8)


def test_trials_are_what_they_say():
    fires = ruled()
    maker = TrialMaker(fires, radius=6, per_test=10, seed=0)
    for i in (0, 5, 10):
        on = maker.fires(i)
        places = {tuple(fires.tokens.reshape(-1)[slice(*maker.span(c))]): maker.span(c) for c in range(on.size)}
        for trial, (answer,) in maker.trials(i, "intruder"):
            spans = [places[e.tokens] for e in trial.excerpts]
            assert [not on[slice(*s)].any() for s in spans] == [k == answer for k in range(5)]
            assert all(any(e.marks) for e in trial.excerpts)
            for k, (excerpt, span) in enumerate(zip(trial.excerpts, spans, strict=True)):
                assert (list(excerpt.marks) == on[slice(*span)].tolist()) == (k != answer)
        assert {answer for _, (answer,) in maker.trials(i, "intruder")} > {1}
        detection = [pair for t, a in maker.trials(i, "detection") for pair in zip(t.excerpts, a, strict=True)]
        assert sum(answer for _, answer in detection) == 10 and len(detection) == 20
        assert all(on[slice(*places[e.tokens])].any() == answer for e, answer in detection)
        fuzzing = [pair for t, a in maker.trials(i, "fuzzing") for pair in zip(t.excerpts, a, strict=True)]
        assert sum(answer for _, answer in fuzzing) * 2 == len(fuzzing) == 20
        for excerpt, answer in fuzzing:
            right = on[slice(*places[excerpt.tokens])]
            marks = np.array(excerpt.marks)
            assert marks.sum() == right.sum()
            assert (marks == right).all() if answer else not (marks & right).any()
    assert maker.trials(3, "fuzzing") == TrialMaker(fires, radius=6, per_test=10, seed=0).trials(3, "fuzzing")
    assert maker.trials(3, "fuzzing") != TrialMaker(fires, radius=6, per_test=10, seed=1).trials(3, "fuzzing")


def test_excerpts_stop_at_rows_and_padding():
    tokens, real = text()[:2], np.ones((2, 40), dtype=bool)
    real[0, 30:] = False
    maker = TrialMaker(firings_where(tokens, {"component:0": real}, real), radius=5, per_test=2, seed=0)
    assert maker.span(0) == (0, 6)
    assert maker.span(28) == (23, 30)
    assert maker.span(40) == (40, 46)
    assert maker.span(79) == (74, 80)


def test_what_fires_nowhere_or_everywhere_has_no_trials():
    tokens = text()
    sparse = tokens == 3
    where = {"component:0": np.zeros_like(sparse), "component:1": np.ones_like(sparse), "component:2": sparse}
    scores = score_labels(firings_where(tokens, where), TokenJudge(), config=CONFIG)
    assert scores.scores["component:0"] == scores.scores["component:1"] == {}
    assert set(scores.scores["component:2"]) == {"detection", "fuzzing"}  # nothing else is about as frequent
    assert set(scores.to_pandas()["subcomponent"]) == {"component:2"}


def test_llr_by_hand_and_without_the_row_itself():
    # Two rows; it fires at token 2 (twice in row 0, once in row 1) and once at token 1.
    tokens = np.array([[0, 2, 1, 2, 0, 1], [2, 1, 0, 0, 1, 0]])
    fires = np.array([[0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=bool)
    training = firings_where(tokens, {"component:0": fires})
    context = Context(training)
    known = Statistics(context, TrialMaker(training, radius=2, per_test=2, seed=0), 0)
    at = context.places[:, [1, 6]]  # both are token 2: in row 0 and row 1
    token = 2  # the feature of the token itself
    p = (3 + 1) / (12 + 3 + 1)
    assert_allclose(known.ratios(at)[token], math.log((3 + 2 * p) / (4 + 2)) - math.log(p))
    others = known.ratios(at, np.array([0, 1]))[token]
    assert others == pytest.approx([math.log((1 + 2 * p) / (1 + 2) / p), math.log((2 + 2 * p) / (3 + 2) / p)])
    # A token that training does not have counts as frequent as one that was seen once less than never.
    new, _ = context.of([Excerpt((99,), (" w99",), None)])
    assert known.ratios(new)[token, 0, 0] == pytest.approx(math.log(2 / (4 + 2)))


def test_the_discriminant_weighs_what_differs():
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(size=(3, 400)), rng.normal(size=(3, 400))
    positive[1] += 3
    weights = discriminant(positive, negative)
    assert abs(weights[1]) > 5 * max(abs(weights[0]), abs(weights[2]))
    scale = np.sqrt((np.cov(positive) + np.cov(negative)).diagonal() / 2)
    assert weights[1] == pytest.approx(3 / scale[1] ** 2 / 1.3, rel=0.1)
    assert discriminant(positive[:, :0], negative).tolist() == [1, 1, 1]


def test_thresholds_part_best():
    assert threshold(np.array([0.0, 1.0, 2.0, 3.0]), np.array([False, False, True, True])) == 1.5
    assert threshold(np.array([3.0, 0.0, 9.0]), np.array([True, False, False])) == 1.5
    assert threshold(np.array([]), np.array([], dtype=bool)) == 0


def test_shapes_of_tokens():
    assert shape(" the") == shape(" of") != shape("the")
    assert shape("12") == shape("2024") != shape("a2")
    assert len({shape(t) for t in ("(", ")", "\n", " ", "  ", "Word", "WORD", "")}) == 8
    assert shape("\n\n  ") == shape("\n")


def test_scores_by_hand():
    score = Score("intruder", 7, 10)
    # Wilson's interval, z = 1.959964: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    z, n, p = 1.959964, 10, 0.7
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert score.interval == pytest.approx(
        ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)), abs=1e-6
    )
    assert (score.value, score.chance) == (0.7, 0.2)
    a, b = "blocks.0.mlp.W_in:1", "blocks.0.mlp.W_in:2"
    scores = LabelScores("judge", {a: {"intruder": score}, b: {"intruder": Score("intruder", 3, 10)}, "c:3": {}})
    null = LabelScores("judge", {b: {"intruder": Score("intruder", 2, 10)}})
    table = scores.by_site({"null": null})
    assert table["site"].tolist() == ["blocks.0.mlp.W_in", "all"]
    assert table["score"].tolist() == pytest.approx([0.5, 0.5])
    assert table["over null"].tolist() == pytest.approx([0.1, 0.1])  # on the address that both have
    assert scores.top(1)["subcomponent"].tolist() == [a]
    assert scores[a]["intruder"] is score
    with pytest.raises(KeyError, match=r"W_in:3 was not scored"):
        scores["blocks.0.mlp.W_in:3"]


def test_what_is_wrong_is_said():
    fires = ruled()
    with pytest.raises(ValueError, match="labels would do nothing"):
        score_labels(fires, TokenJudge(), labels={})
    with pytest.raises(KeyError, match="is not among the 12"):
        score_labels(fires, TokenJudge(), "blocks.0.mlp.W_in:99")
    with pytest.raises(ValueError, match="one row"):
        score_labels(fires.in_rows(np.array([0])), TokenJudge())
    for option in (
        {"tests": ()},
        {"tests": ("intruder", "guess")},
        {"test_share": 0.0},
        {"per_test": 1},
        {"radius": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(option))):
            ScoreConfig(**option)
