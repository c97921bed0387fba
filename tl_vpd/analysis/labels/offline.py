"""A judge without a language model: it knows the tokens at and around firings, by their statistics in other rows.

For each feature f of a token's neighbourhood (the tokens at −2 … +2, the pairs at (−1, 0) and (0, +1), the shapes of the
tokens at −1, 0, +1, such as " Aa" or "0"), with n of its N training firings at the value v, of background frequency p,

    llr_f(v) = ln [ (n + 2 p) / (N + 2) ] − ln p,        score = w · llr,      w = (S + 0.3 I)⁻¹ (μ₊ − μ₋)

where w is the linear discriminant between training firings and other training tokens (features standardised, S their pooled
covariance). Firings in a token's row do not count in that token's ratios: w and the thresholds are fitted to rows that the
counts leave out.

*Intruder*: the excerpt with the lowest mean score of its marked tokens. *Detection*: the largest score in the excerpt is above
the threshold that parts training excerpts best; *fuzzing*: the same with the mean score of the marked tokens.

What it measures is whether a few surrounding tokens say where a subcomponent fires. A rule of meaning or of a longer
context scores low, and a direction that means nothing scores high if it reads tokens, as the nulls show.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_vpd.analysis.labels.firings import Firings
from tl_vpd.analysis.labels.trials import Answer, Excerpt, Test, Trial, TrialMaker
from tl_vpd.checks import seed_of

OFFSETS = (-2, -1, 0, 1, 2)
PAIRS = ((-1, 0), (0, 1))
SHAPES = (-1, 0, 1)
PRIOR = 2.0
RIDGE = 0.3
OTHERS = 1000
"""Tokens without a firing that the discriminant sees."""
N_FEATURES = len(OFFSETS) + len(PAIRS) + len(SHAPES)


class TokenJudge:
    """Judges by token statistics of training rows; also says which tokens they are, as a label (``statistics_label``).

    Args:
        seed: of the training excerpts that set its thresholds.
    """

    name, needs_labels = "token statistics", False

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed_of(seed)

    def answers(self, trials: Sequence[Trial], training: Firings, labels: Mapping[str, str]) -> list[Answer | None]:
        """The answers; see ``Judge``. Labels are not read."""
        context = Context(training)
        radius = max((len(e.tokens) for trial in trials for e in trial.excerpts), default=1) // 2
        maker = TrialMaker(training, radius=radius, per_test=15, seed=self.seed)
        known: dict[str, Statistics] = {}
        answers: list[Answer | None] = []
        for trial in trials:
            if trial.address not in known:
                known[trial.address] = Statistics(context, maker, training.number(trial.address))
            answers.append(known[trial.address].answer(trial))
        return answers


class Context:
    """The features of all training tokens, and how frequent their values are.

    Attributes:
        values: of every feature that occur, ascending.
        places: of every token's value among these, ``[feature, token]``.
        log_p: of every value, and of one that does not occur.
    """

    def __init__(self, training: Firings) -> None:
        self.size = max(training.names, default=0) + 2
        self.shapes = np.zeros(self.size, dtype=np.int64)
        for token, text in training.names.items():
            self.shapes[token + 1] = shape(text)
        keys = self.keys(np.where(training.real, training.tokens, -1)).reshape(N_FEATURES, -1)
        self.values, self.log_p = [], []
        for feature in keys[:, training.real.reshape(-1)]:
            values, counts = np.unique(feature, return_counts=True)
            self.values.append(values)
            self.log_p.append(np.log(np.append(counts, 0) + 1.0) - np.log(counts.sum() + len(counts) + 1.0))
        self.places = self.places_of(keys)

    def keys(self, tokens: Int[np.ndarray, "row pos"]) -> Int[np.ndarray, "feature row pos"]:
        """The value of every feature at every token; 0 stands for no token, and for one that is not in training."""
        reach = max(map(abs, OFFSETS))
        padded = np.pad(np.where(tokens + 1 < self.size, tokens + 1, 0).astype(np.int64), ((0, 0), (reach, reach)))
        at = {o: padded[:, reach + o : reach + o + tokens.shape[1]] for o in OFFSETS}
        pairs = [at[a] * self.size + at[b] for a, b in PAIRS]
        return np.stack([*at.values(), *pairs, *(self.shapes[at[o]] for o in SHAPES)])

    def places_of(self, keys: Int[np.ndarray, "feature *n"]) -> Int[np.ndarray, "feature *n"]:
        """The places of values among those that occur in training; after the last for one that does not."""
        result = np.empty_like(keys)
        for place, feature, values in zip(result, keys, self.values, strict=True):
            nearest = np.minimum(np.searchsorted(values, feature), len(values) - 1)
            place[...] = np.where(values[nearest] == feature, nearest, len(values))
        return result

    def of(self, excerpts: Sequence[Excerpt]) -> tuple[Int[np.ndarray, "feature n pos"], Bool[np.ndarray, "n pos"]]:
        """The places of excerpts' tokens, and where there are tokens: shorter ones end earlier."""
        tokens = np.full((len(excerpts), max(len(e.tokens) for e in excerpts)), -1)
        for row, excerpt in zip(tokens, excerpts, strict=True):
            row[: len(excerpt.tokens)] = excerpt.tokens
        return self.places_of(self.keys(tokens)), tokens >= 0


class Statistics:
    """What is known of one address: counts by value, weights of the features, and thresholds."""

    def __init__(self, context: Context, maker: TrialMaker, i: int) -> None:
        training = maker.firings
        at = training.at[training.of(i)]
        self.context, self.n_rows, rows = context, len(training.tokens), at // maker.n_pos
        self.total, self.in_row = len(at), np.bincount(rows, minlength=self.n_rows)
        at_firings = context.places[:, at]
        self.counts = [np.bincount(p, minlength=len(q)) for p, q in zip(at_firings, context.log_p, strict=True)]
        self.by_row = [np.unique(place * self.n_rows + rows, return_counts=True) for place in at_firings]
        generator = np.random.default_rng([zlib.crc32(training.addresses[i].encode()), maker.seed % (1 << 64)])
        fires = maker.fires(i)
        others = generator.permutation(maker.centres[~fires[maker.centres]])[:OTHERS]
        self.weights = discriminant(
            self.ratios(at_firings, rows), self.ratios(context.places[:, others], others // maker.n_pos)
        )
        self.thresholds: dict[Test, float] = {}
        positives = maker.spaced(i, generator)
        for test in ("detection", "fuzzing"):
            made = maker.excerpts(test, fires, positives, generator)
            values = self.values(
                test, [e for _, e, _ in made], np.array([c // maker.n_pos for c, *_ in made], dtype=int)
            )
            self.thresholds[test] = threshold(values, np.array([true for *_, true in made], dtype=bool))

    def ratios(
        self, places: Int[np.ndarray, "feature *m"], rows: Int[np.ndarray, "*m"] | None = None
    ) -> Float[np.ndarray, "feature *m"]:
        """``llr_f`` of tokens; those in training rows (``rows``) without the firings of their row."""
        total = np.asarray(self.total if rows is None else self.total - self.in_row[rows])
        result = np.empty(places.shape)
        for f, place in enumerate(places):
            n, log_p = self.counts[f][place], self.context.log_p[f][place]
            if rows is not None:
                keys, counts = self.by_row[f]
                wanted = place * self.n_rows + rows
                nearest = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
                n = n - np.where(keys[nearest] == wanted, counts[nearest], 0)
            result[f] = np.log((n + PRIOR * np.exp(log_p)) / (total + PRIOR)) - log_p
        return result

    def values(
        self, test: Test, excerpts: Sequence[Excerpt], rows: Int[np.ndarray, " n"] | None = None
    ) -> Float[np.ndarray, " n"]:
        """What a test compares: the largest score in each excerpt, or the mean of the marked tokens'."""
        if not excerpts:
            return np.zeros(0)
        places, there = self.context.of(excerpts)
        at_rows = None if rows is None else np.broadcast_to(rows[:, None], there.shape)
        scores = np.einsum("f,fnp->np", self.weights, self.ratios(places, at_rows))
        if test == "detection":
            return np.where(there, scores, -np.inf).max(1)
        marked = np.zeros_like(there)
        for row, excerpt in zip(marked, excerpts, strict=True):
            row[: len(excerpt.tokens)] = excerpt.marks
        return (scores * marked).sum(1) / marked.sum(1)

    def answer(self, trial: Trial) -> Answer:
        """The answer to a trial of this address."""
        values = self.values(trial.test, trial.excerpts)
        if trial.test == "intruder":
            return (int(np.argmin(values)),)
        return tuple((values > self.thresholds[trial.test]).astype(int).tolist())


def shape(text: str) -> int:
    """A number for the shape of a token's text: its first space, the case of its letters, digits, or the sign itself."""
    for pattern, sign in (("[a-z]+", "a"), ("[A-Z]+", "A"), ("[0-9]+", "0"), (r"\n\s*", "\n"), ("  +", "  ")):
        text = re.sub(pattern, sign, text)
    return zlib.crc32(text.encode("utf-8", "replace"))


def discriminant(
    positive: Float[np.ndarray, "feature n"], negative: Float[np.ndarray, "feature m"]
) -> Float[np.ndarray, " feature"]:
    """``(S + 0.3 I)⁻¹ (μ₊ − μ₋)`` of standardised features; equal weights where there is nothing to compare."""
    if not positive.shape[1] or not negative.shape[1]:
        return np.ones(len(positive))
    both = [positive - positive.mean(1, keepdims=True), negative - negative.mean(1, keepdims=True)]
    covariance = sum(x @ x.T / x.shape[1] for x in both) / 2
    scale = np.sqrt(np.diag(covariance)) + 1e-6
    ridged = covariance / np.outer(scale, scale) + RIDGE * np.eye(len(scale))
    return np.linalg.solve(ridged, (positive.mean(1) - negative.mean(1)) / scale) / scale


def threshold(values: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float:
    """Between two values, where the fraction right is largest; 0 without any. The middle one of equally good places."""
    if not len(values):
        return 0.0
    order = np.argsort(values)
    values, truth = values[order], truth[order]
    right = np.concatenate([[0], (~truth).cumsum()]) + np.concatenate([truth[::-1].cumsum()[::-1], [0]])
    best = (right == right.max()).nonzero()[0]
    k = int(best[(len(best) - 1) // 2])
    return float((values[max(k - 1, 0)] + values[min(k, len(values) - 1)]) / 2)
