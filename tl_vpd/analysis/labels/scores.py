"""Scores of labels: how often a judge is right, beside chance and beside nulls.

>>> scores = score_labels(fires, TokenJudge())                                          # doctest: +SKIP
>>> scores.by_site(nulls={"shuffled": score_labels(fires.shuffled(), TokenJudge())})    # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from tl_vpd.analysis.labels.firings import Firings
from tl_vpd.analysis.labels.judges import Judge
from tl_vpd.analysis.labels.trials import CHANCE, Test, TrialMaker
from tl_vpd.checks import check_fields, config_of, instance, integer, number
from tl_vpd.evaluation.intervals import CONFIDENCE, PerRow
from tl_vpd.site import Subcomponent, nearest


@dataclass(frozen=True)
class ScoreConfig:
    """Which trials are made, of which rows.

    Attributes:
        radius: tokens of an excerpt on each side of its centre.
        per_test: for each address, intruder trials, and excerpts of each kind for detection and fuzzing.
        test_share: the fraction of rows that trials are made of; the others are training rows.
        tests: which of ``intruder``, ``detection`` and ``fuzzing``.
        seed: of the rows, excerpts and their order.

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of range.
    """

    radius: int = 10
    per_test: int = 10
    test_share: float = 0.5
    tests: Sequence[str] = ("intruder", "detection", "fuzzing")
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, radius=1, per_test=2, test_share=(0, 1))
        number("test_share", self.test_share, above=0, maximum=0.95)
        if not self.tests or len(set(self.tests)) < len(self.tests) or set(self.tests) - set(CHANCE):
            raise ValueError(f"tests={self.tests!r}: give some of {', '.join(CHANCE)}, each once.")


@dataclass(frozen=True)
class Score:
    """How often a judge was right.

    Attributes:
        test: ``intruder``, ``detection`` or ``fuzzing``.
        right: answers that were right; of detection and fuzzing, one for each excerpt.
        n: answers, at least one.

    Raises:
        TypeError: a number is not an integer.
        ValueError: there are no answers, or more are right than there are.
    """

    test: Test
    right: int
    n: int

    def __post_init__(self) -> None:
        integer("right", self.right, minimum=0, maximum=integer("n", self.n, minimum=1))

    @property
    def value(self) -> float:
        """The fraction right."""
        return self.right / self.n

    @property
    def chance(self) -> float:
        """The fraction that guesses get right."""
        return CHANCE[self.test]

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the fraction."""
        low, high = binomtest(self.right, self.n).proportion_ci(CONFIDENCE, method="wilson")
        return float(low), float(high)


@dataclass(frozen=True)
class LabelScores:
    """The scores of many subcomponents or components by one judge.

    Attributes:
        judge: its name.
        scores: by address and test; an address of which no trial can be made has none.
        seed: of the intervals over addresses.
    """

    judge: str
    scores: Mapping[str, Mapping[Test, Score]]
    seed: int = 0

    def __getitem__(self, address: str | Subcomponent) -> Mapping[Test, Score]:
        text = str(Subcomponent.parse(address))
        if text not in self.scores:
            raise KeyError(f"{text} was not scored{nearest(text, self.scores)}.")
        return self.scores[text]

    def to_pandas(self) -> pd.DataFrame:
        """One row per address and test: subcomponent, site, test, score, low, high, n, chance."""
        rows = [
            {
                "subcomponent": address,
                "site": Subcomponent.parse(address).site,
                "test": test,
                "score": score.value,
                **dict(zip(("low", "high"), score.interval, strict=True)),
                "n": score.n,
                "chance": score.chance,
            }
            for address, by_test in self.scores.items()
            for test, score in by_test.items()
        ]
        columns = ["subcomponent", "site", "test", "score", "low", "high", "n", "chance"]
        return pd.DataFrame(rows, columns=columns)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` addresses of the largest mean score, each with its score of every test."""
        k = integer("k", k, minimum=0)
        table = self.to_pandas().pivot(index="subcomponent", columns="test", values="score")
        order = table.mean(axis=1).sort_values(ascending=False, kind="stable").index
        return table.loc[order].head(k).reset_index().rename_axis(columns=None)

    def by_site(self, nulls: Mapping[str, LabelScores] | None = None) -> pd.DataFrame:
        """Mean scores by site and test, and over all sites, with how much higher they are than those of nulls.

        Intervals are bootstrapped over addresses. Each null is compared on the addresses that have a score in both.

        Args:
            nulls: scores of the same addresses by name, from ``null_firings``.

        Returns:
            site, test, addresses, score, score_low, score_high, chance; for each null its score and ``over NAME`` with interval.
        """
        table, others = self.to_pandas(), {name: null.to_pandas() for name, null in (nulls or {}).items()}
        rows = []
        for site in [*table["site"].unique(), "all"]:
            for test in table["test"].unique():
                here = _of(table, site, test)
                if not len(here):
                    continue
                row = {"site": site, "test": test, "addresses": len(here), **self._columns("score", here)}
                row["chance"] = CHANCE[test]
                for name, other in others.items():
                    both = pd.concat([here, _of(other, site, test)], axis=1, join="inner", keys=["this", "null"])
                    row[name] = both["null"].mean() if len(both) else float("nan")
                    row |= self._columns(f"over {name}", both["this"] - both["null"])
                rows.append(row)
        return pd.DataFrame(rows)

    def _columns(self, name: str, values: pd.Series) -> dict[str, float]:
        return PerRow(values.to_numpy(float), np.ones(len(values))).columns(name, seed=self.seed)


def _of(table: pd.DataFrame, site: str, test: str) -> pd.Series:
    """The scores of one site (or all) and test, by address."""
    chosen = (table["test"] == test) & ((table["site"] == site) | (site == "all"))
    return table[chosen].set_index("subcomponent")["score"]


def score_labels(
    firings: Firings,
    judge: Judge,
    subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None = None,
    *,
    labels: Mapping[str, object] | None = None,
    config: ScoreConfig | None = None,
) -> LabelScores:
    """Lets a judge answer intruder, detection and fuzzing trials.

    Trials are made of half of the rows (``config.test_share``), and the judge may learn from the others. Give ``firings`` of
    other rows than those that the labels were made from.

    Args:
        firings: of subcomponents or components; intruders come from all of these.
        judge: ``TokenJudge()``, ``LanguageJudge(...)``, or an object with ``answers``.
        subcomponents: which addresses are scored (None: all).
        labels: by address; needed by judges that read them, and refused by those that do not.
        config: the trials (None: the defaults).

    Raises:
        TypeError: an argument is of another type.
        ValueError: there are labels where none are read, none where they are needed, or there are fewer than two rows.
        KeyError: an address is not among the firings.
        OSError: of the judge's language model.
    """
    config = config_of(ScoreConfig, config)
    instance("firings", firings, Firings)
    instance("judge", judge, Judge)  # type: ignore[type-abstract]
    texts = _texts(judge, labels)
    numbers = firings.numbers(subcomponents)
    if judge.needs_labels:
        numbers = [i for i in numbers if firings.addresses[i] in texts]
    tests: list[Any] = list(config.tests)  # checked by the config to be names of tests
    judged, training = split(len(firings.tokens), config)
    maker = TrialMaker(firings.in_rows(judged), radius=config.radius, per_test=config.per_test, seed=config.seed)
    trials = [pair for i in numbers for test in tests for pair in maker.trials(i, test)]
    answers = judge.answers([trial for trial, _ in trials], firings.in_rows(training), texts)
    counts: dict[str, dict[Test, list[int]]] = {firings.addresses[i]: {} for i in numbers}
    for (trial, truth), answer in zip(trials, answers, strict=True):
        count = counts[trial.address].setdefault(trial.test, [0, 0])
        count[0] += sum(a == b for a, b in zip(answer, truth, strict=True)) if answer else 0
        count[1] += len(truth)
    scores = {a: {test: Score(test, *count) for test, count in tests.items()} for a, tests in counts.items()}
    return LabelScores(judge.name, scores, config.seed)


def split(n_rows: int, config: ScoreConfig) -> tuple[np.ndarray, np.ndarray]:
    """The rows of trials, and those that judges learn from."""
    if n_rows < 2:
        raise ValueError(
            "The firings are of one row of tokens: some rows make trials and others teach the judge, give more."
        )
    order = np.random.default_rng(config.seed % (1 << 64)).permutation(n_rows)
    n = min(max(round(n_rows * config.test_share), 1), n_rows - 1)
    return np.sort(order[:n]), np.sort(order[n:])


def _texts(judge: Judge, labels: Mapping[str, object] | None) -> dict[str, str]:
    if labels is None:
        if judge.needs_labels:
            raise ValueError(f"The judge {judge.name!r} reads labels: give labels=label(firings, ...).")
        return {}
    if not judge.needs_labels:
        raise ValueError(f"labels would do nothing: the judge {judge.name!r} does not read them.")
    checked = instance("labels", labels, Mapping)  # type: ignore[type-abstract]
    return {str(address): str(label) for address, label in checked.items()}
