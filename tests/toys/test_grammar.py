"""The grammar: what its sentences are, where their latents are needed, and a model that learns them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_vpd.toys import Grammar, TargetTraining, train
from tl_vpd.toys.grammar import ADJECTIVES, LATENTS, NAMES, VOCABULARY, Sentences, decode, encode

EASY = Grammar(
    context=16, n_layers=1, d_model=32, n_heads=2, d_mlp=64, training=TargetTraining(250, 48, 1e-2, "cosine")
)
NEXT = {
    "her": "her",
    "his": "his",
    "round": ")",
    "square": "]",
    "angle": ">",
    "there_is": "a",
    "smile": ")",
    "frown": "(",
}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 500), st.integers(4, 40))
def test_the_next_word_at_a_latent_is_the_one_it_decides(step, context):
    data, longer = Sentences(context, 6, seed=4), Sentences(context + 8, 6, seed=4)
    words, latents = data.words(step), data.latents(step)
    following = [row[1 : context + 1] for row in longer.words(step)]
    assert [row[:context] for row in longer.words(step)] == words and set(latents) == set(LATENTS)
    assert all(positions.shape == (6, context) for positions in latents.values())
    assert int(torch.stack(list(latents.values())).sum(0).max()) <= 1
    for name, where in latents.items():
        for row, after, positions in zip(words, following, where.tolist(), strict=True):
            for at, needed in enumerate(positions):
                if not needed:
                    continue
                assert after[at] in ADJECTIVES if name == "it_is" else after[at] == NEXT[name]
                before = row[: at + 1]
                if name in NAMES:
                    assert [word for word in before if word in NAMES["her"] + NAMES["his"]][-1] in NAMES[name]
                if name in ("round", "square", "angle"):
                    assert before[-3] == {"round": "(", "square": "[", "angle": "<"}[name]
                if name in ("there_is", "it_is"):
                    assert before[-2:] == [name.split("_")[0], "is"]


def test_every_latent_is_needed_at_some_tokens_of_a_batch_and_none_is_missed():
    data = Sentences(context=33, batch_size=64, seed=0)
    words, latents = data.words(0), data.latents(0)
    assert all(int(positions.sum()) > 10 for positions in latents.values())
    pronouns = sum(word in ("her", "his") for row in words for word in row[1:])
    inside = sum(int(latents[name][:, :-1].sum()) for name in ("her", "his"))
    assert pronouns == inside


def test_words_become_tokens_and_text_again():
    rows = Sentences(context=9, batch_size=3, seed=1).words(5)
    assert decode(encode(rows)) == [" ".join(row) for row in rows]
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    with pytest.raises(KeyError, match="elephant"):
        encode([["elephant"]])


def test_a_small_model_learns_the_latents():
    model = train(EASY, 0)
    quality, fresh = EASY.quality(model), EASY.quality(EASY.build(0))
    assert quality["cross_entropy"] < 0.6 * fresh["cross_entropy"]
    for name in ("there_is", "it_is", "round", "square", "angle", "smile", "frown"):
        assert quality[name] > 0.9, name
    truth = EASY.truth(model)
    assert truth.probe.shape == truth.latents["her"].shape == (64, 16)
    assert torch.equal(truth.probe, Sentences(16, 64, seed=-2).at(0))
