"""Three tests of whether a judge knows where a subcomponent fires; each is made of excerpts that the judge has not seen.

*Intruder* (VPD paper): which of five excerpts is another subcomponent's, of similar density, where this subcomponent does not
fire at all? Each has marks where the subcomponent that it is of fires. Chance: 1 in 5.
*Detection* (Paulo et al. 2024, automated interpretability of sparse autoencoders): in which excerpts does it fire? Half of
them are around a token where it does, in the others it does not fire at all. Chance: 1 in 2.
*Fuzzing* (the same): are the marked tokens those where it fires? In half of the excerpts as many others are marked. Chance:
1 in 2.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from tl_vpd.analysis.labels.firings import Firings

Test = Literal["intruder", "detection", "fuzzing"]
EXCERPTS = 5
"""Of an intruder trial."""
CHANCE: dict[Test, float] = {"intruder": 1 / EXCERPTS, "detection": 0.5, "fuzzing": 0.5}
Answer = tuple[int, ...]
"""Intruder: the excerpt's number, from 0. Otherwise 1 or 0 for every excerpt."""
Centre = tuple[int, int]
"""The address's number, and the token around which an excerpt is cut."""


@dataclass(frozen=True)
class Excerpt:
    """A stretch of text, with no sign of where it is from.

    Attributes:
        tokens: their numbers.
        texts: of the tokens.
        marks: which of them are marked (None: the test marks none).
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    marks: tuple[bool, ...] | None


@dataclass(frozen=True)
class Trial:
    """A question to a judge, without its answer.

    Attributes:
        test: which of the three.
        address: of the subcomponent or component.
        excerpts: five, or up to ten of detection and fuzzing.
    """

    test: Test
    address: str
    excerpts: tuple[Excerpt, ...]


class TrialMaker:
    """Makes trials from firings.

    Args:
        firings: in the rows that trials are made from.
        radius: tokens of an excerpt on each side of its centre.
        per_test: intruder trials for each address, and excerpts of each kind for the other two tests.
        seed: of all choices; an address's trials do not depend on which others are asked for.
    """

    def __init__(self, firings: Firings, *, radius: int, per_test: int, seed: int) -> None:
        self.firings, self.radius, self.per_test, self.seed = firings, radius, per_test, seed
        self.n_pos = firings.tokens.shape[1]
        self.centres = firings.real.reshape(-1).nonzero()[0]
        self.counts = firings.counts

    def trials(self, i: int, test: Test) -> list[tuple[Trial, Answer]]:
        """Trials and their answers of the i-th address; none where there are fewer than four excerpts of a kind."""
        address = self.firings.addresses[i]
        generator = np.random.default_rng([zlib.crc32(f"{test}/{address}".encode()), self.seed % (1 << 64)])
        fires = self.fires(i)
        positives = self.spaced(i, generator)
        if len(positives) < EXCERPTS - 1:
            return []
        if test == "intruder":
            return self._intruders(i, fires, positives, generator)
        made = self.excerpts(test, fires, positives, generator)
        excerpts = [made[k][1:] for k in generator.permutation(len(made))]
        groups = [excerpts[k : k + 10] for k in range(0, len(excerpts), 10)]
        return [(Trial(test, address, tuple(e for e, _ in g)), tuple(int(x) for _, x in g)) for g in groups]

    def fires(self, i: int) -> Bool[np.ndarray, " token"]:
        """At which tokens the i-th address fires."""
        result = np.zeros(self.firings.tokens.size, dtype=bool)
        result[self.firings.at[self.firings.of(i)]] = True
        return result

    def spaced(self, i: int, generator: np.random.Generator) -> list[int]:
        """Firings in random order, none of which is in an earlier one's excerpt: at most ``4 · per_test`` of them."""
        covered = np.zeros(self.firings.tokens.size, dtype=bool)
        centres: list[int] = []
        for centre in generator.permutation(self.firings.at[self.firings.of(i)]).tolist():
            if len(centres) == (EXCERPTS - 1) * self.per_test:
                break
            if not covered[centre]:
                covered[slice(*self.span(centre))] = True
                centres.append(centre)
        return centres

    def span(self, centre: int) -> tuple[int, int]:
        """Start and stop of the real tokens around one, within its row."""
        row = centre // self.n_pos * self.n_pos
        start, stop = max(row, centre - self.radius), min(row + self.n_pos, centre + self.radius + 1)
        real = self.firings.real.reshape(-1)[start:stop]
        if real.all():
            return start, stop
        padding = ((~real).nonzero()[0] + start).tolist()
        return max([start, *(p + 1 for p in padding if p < centre)]), min([stop, *(p for p in padding if p > centre)])

    def excerpt(self, centre: int, marked: Bool[np.ndarray, " token"] | None = None) -> Excerpt:
        """The text around a token, with the marks of all tokens where there are some."""
        start, stop = self.span(centre)
        tokens = self.firings.tokens.reshape(-1)[start:stop].tolist()
        marks = None if marked is None else tuple(marked[start:stop].tolist())
        return Excerpt(tuple(tokens), tuple(self.firings.names[t] for t in tokens), marks)

    def excerpts(
        self, test: Test, fires: Bool[np.ndarray, " token"], positives: list[int], generator: np.random.Generator
    ) -> list[tuple[int, Excerpt, bool]]:
        """Of detection or fuzzing: centres, excerpts and whether the answer is yes; as many of either answer."""
        make = self._detection if test == "detection" else self._fuzzing
        return make(fires, positives, generator) if len(positives) >= EXCERPTS - 1 else []

    def _detection(
        self, fires: Bool[np.ndarray, " token"], positives: list[int], generator: np.random.Generator
    ) -> list[tuple[int, Excerpt, bool]]:
        """Excerpts with and without firings."""
        tried = generator.permutation(self.centres)[: 50 * self.per_test].tolist()
        silent = list(islice((c for c in tried if not fires[slice(*self.span(c))].any()), self.per_test))
        n = min(self.per_test, len(positives), len(silent))
        if n < EXCERPTS - 1:
            return []
        return [(c, self.excerpt(c), True) for c in positives[:n]] + [(c, self.excerpt(c), False) for c in silent[:n]]

    def _fuzzing(
        self, fires: Bool[np.ndarray, " token"], positives: list[int], generator: np.random.Generator
    ) -> list[tuple[int, Excerpt, bool]]:
        """Excerpts with right marks and, of other text, with wrong ones."""
        half = min(self.per_test, len(positives) // 2)
        right = [(c, self.excerpt(c, fires), True) for c in positives[:half]]
        wrong: list[tuple[int, Excerpt, bool]] = []
        for centre in positives[half:]:
            start, stop = self.span(centre)
            others, n = (~fires[start:stop]).nonzero()[0] + start, int(fires[start:stop].sum())
            if len(others) >= n and len(wrong) < half:
                marks = np.zeros_like(fires)
                marks[generator.choice(others, n, replace=False)] = True
                wrong.append((centre, self.excerpt(centre, marks), False))
        n = min(len(right), len(wrong))
        return right[:n] + wrong[:n] if n >= 2 else []

    def _intruders(
        self, i: int, fires: Bool[np.ndarray, " token"], positives: list[int], generator: np.random.Generator
    ) -> list[tuple[Trial, Answer]]:
        similar = self._similar(i)
        result: list[tuple[Trial, Answer]] = []
        for _ in range(self.per_test):
            intruder = self._intruder(similar, fires, generator)
            if intruder is None:
                return []
            other, centre = intruder
            chosen = generator.choice(len(positives), EXCERPTS - 1, replace=False)
            excerpts = [self.excerpt(positives[k], fires) for k in chosen]
            place = int(generator.integers(EXCERPTS))
            excerpts.insert(place, self.excerpt(centre, self.fires(other)))
            result.append((Trial("intruder", self.firings.addresses[i], tuple(excerpts)), (place,)))
        return result

    def _similar(self, i: int) -> Int[np.ndarray, " n"]:
        """Others that fire at most twice as often or as rarely."""
        close = (self.counts <= 2 * self.counts[i]) & (2 * self.counts >= self.counts[i]) & (self.counts > 0)
        close[i] = False
        return close.nonzero()[0]

    def _intruder(
        self, similar: Int[np.ndarray, " n"], fires: Bool[np.ndarray, " token"], generator: np.random.Generator
    ) -> Centre | None:
        """Another address and one of its firings, around which this one does not fire (None: no such firing was met)."""
        for other in generator.permutation(similar)[:50].tolist():
            for centre in generator.permutation(self.firings.at[self.firings.of(other)])[:10].tolist():
                if not fires[slice(*self.span(centre))].any():
                    return other, centre
        return None
