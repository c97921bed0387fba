from __future__ import annotations

import numpy as np
import pytest
import torch

from scripts.bundled.ngram import KneserNeyTrigram
from scripts.bundled.quality import bracket_accuracy, name_costs, trigram_ce


def test_trigram_probabilities_sum_to_one_in_every_context():
    stream = np.random.default_rng(0).integers(0, 6, 200)
    trigram = KneserNeyTrigram(stream, 8)  # two words never seen
    contexts = np.array([[u, v] for u in range(8) for v in range(8)])
    total = sum(np.exp(trigram.log_probability(contexts, np.full(64, w))) for w in range(8))
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)


def test_trigram_by_hand():
    # a b a b b: trigrams aba, bab, abb, once each; bigrams by different words before: ba (from a), ab (from b), bb (from a).
    trigram = KneserNeyTrigram(np.array([0, 1, 0, 1, 1]), 2)
    # Every count is one, so no count is two and the discount falls back to 0.75 at the two upper orders.
    words = {0: 1, 1: 2}  # different bigrams ending in a: ba; in b: ab, bb
    d = 1 / (1 + 2 * 1)  # one word with count 1, one with count 2
    p1 = {w: (n - d) / 3 + d * 2 / 3 * 0.5 for w, n in words.items()}
    p2_b_after_b = (1 - 0.75) / 2 + 0.75 * 2 / 2 * p1[1]  # after b: a once, b once
    p3 = (1 - 0.75) / 2 + 0.75 * 2 / 2 * p2_b_after_b  # after ab: a once, b once
    result = np.exp(trigram.log_probability(np.array([[0, 1]]), np.array([1])))
    np.testing.assert_allclose(result, p3, rtol=1e-12)


def test_trigram_ce_uses_the_words_before():
    trigram = KneserNeyTrigram(np.array([0, 1, 0, 1, 1] * 20), 2)
    tokens = np.array([[0, 1, 1]])
    logs = trigram.log_probability(np.array([[0, 0], [0, 1]]), np.array([1, 1]))
    assert trigram_ce(trigram, tokens) == pytest.approx(-logs.mean())


def test_name_costs_by_hand():
    pieces = [["\n", "if", " ", "fo", "o", ".", "x", " ", "fo", "o"]]
    losses = np.array([[0.0, 9.0, 9.0, 3.0, 2.0, 9.0, 9.0, 9.0, 1.0, 0.5]])
    # "if" is a keyword, x stands once; foo costs 3 + 2 first and 1 + 0.5 then.
    assert name_costs(losses, pieces) == (5.0, 1.5, 1)


def test_bracket_accuracy_by_hand():
    pieces = [["\n", "(", "[", "]", ")", "}"]]
    closers = {")": 0, "]": 1, "}": 2}
    logits = torch.zeros(1, 6, 3)
    logits[0, 2, 1] = 1.0  # before "]": right
    logits[0, 3, 2] = 1.0  # before ")": wrong
    logits[0, 4, 2] = 1.0  # before "}", which closes nothing: not counted
    assert bracket_accuracy(logits, pieces, closers) == (0.5, 2)
