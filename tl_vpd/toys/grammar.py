"""A small grammar of English sentences whose latent variables are known, and a transformer trained on it.

Each sentence has one fact that a later token depends on:

=============================================  ==========================  ==================================
sentence                                       latents                     needed where
=============================================  ==========================  ==================================
``Mary soon lost her key .``                   ``her``, ``his``            at the verb: the pronoun is next
``the box ( red old ) fell .``                 ``round square angle``      at the second adjective: the bracket closes
``there is a hat .``, ``it is old .``          ``there_is``, ``it_is``     at ``is``: an article or an adjective is next
``we won : )``, ``we lost : (``                ``smile``, ``frown``        at the colon: the mouth is next
=============================================  ==========================  ==================================

A bracket that closes and a mouth that smiles are the same token, for different reasons. Rows are sentences one after the other
after a beginning-of-sequence token, cut at the context.

>>> Sentences(context=8, batch_size=1).words(0)[0][:3]
['<bos>', 'we', 'laughed']
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.checks import check_fields
from tl_vpd.evaluation.truth import Truth
from tl_vpd.toys.toy import SeededBatches, TargetTraining, Toy
from tl_vpd.toys.transformers import accuracy_at, check_heads, cross_entropy_at, small_transformer
from tl_vpd.training.data import Batches

BOS = "<bos>"
NAMES = {"her": ("Anna", "Emma", "Jane", "Lucy", "Mary"), "his": ("James", "John", "Mark", "Paul", "Peter")}
ADVERBS = ("also", "never", "often", "soon")
VERBS = ("cleaned", "found", "kept", "sold", "washed")
NOUNS = ("book", "box", "coat", "cup", "hat", "key", "ring", "table")
ADJECTIVES = ("big", "blue", "cold", "new", "old", "red", "small", "wet")
FELL = ("broke", "fell", "shone")
BRACKETS = {"round": ("(", ")"), "square": ("[", "]"), "angle": ("<", ">")}
MOODS = {"smile": (("won", "danced", "laughed"), ")"), "frown": (("lost", "cried", "failed"), "(")}
LATENTS = ("her", "his", *BRACKETS, "there_is", "it_is", *MOODS)
VOCABULARY: tuple[str, ...] = (
    *(BOS, ".", ":", "a", "is", "it", "the", "there", "we"),
    *(word for mouths in BRACKETS.values() for word in mouths),
    *(*NAMES, *NAMES["her"], *NAMES["his"], *ADVERBS, *VERBS, *NOUNS, *ADJECTIVES, *FELL),
    *(verb for verbs, _ in MOODS.values() for verb in verbs),
)
"""Every token, in the order of its number."""

TRAINING = TargetTraining(steps=2_000, rows=64, lr=2e-3, schedule="cosine")
Word = tuple[str, str | None]
"""A word, and the latent that it depends on."""


def _possession(draw: random.Random) -> Iterator[Word]:
    pronoun = draw.choice(("her", "his"))
    yield draw.choice(NAMES[pronoun]), None
    if draw.random() < 0.5:
        yield draw.choice(ADVERBS), None
    yield draw.choice(VERBS), None
    yield pronoun, pronoun
    yield draw.choice(NOUNS), None
    yield ".", None


def _bracketed(draw: random.Random) -> Iterator[Word]:
    kind = draw.choice(tuple(BRACKETS))
    yield "the", None
    yield draw.choice(NOUNS), None
    yield BRACKETS[kind][0], None
    yield draw.choice(ADJECTIVES), None
    yield draw.choice(ADJECTIVES), None
    yield BRACKETS[kind][1], kind
    yield draw.choice(FELL), None
    yield ".", None


def _being(draw: random.Random) -> Iterator[Word]:
    if draw.random() < 0.5:
        yield from (("there", None), ("is", None), ("a", "there_is"), (draw.choice(NOUNS), None))
    else:
        yield from (("it", None), ("is", None), (draw.choice(ADJECTIVES), "it_is"))
    yield ".", None


def _felt(draw: random.Random) -> Iterator[Word]:
    mood = draw.choice(tuple(MOODS))
    verbs, mouth = MOODS[mood]
    yield from (("we", None), (draw.choice(verbs), None), (":", None), (mouth, mood))


SENTENCES = (_possession, _bracketed, _being, _felt)


@dataclass(frozen=True)
class Sentences(SeededBatches):
    """Batches ``[batch_size, context]`` of sentences."""

    rows: ClassVar[str] = "sentences"
    context: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, context=1, batch_size=1)

    def at(self, step: int) -> Int[Tensor, "batch pos"]:
        """The tokens of a step."""
        return encode(self.words(step))

    def words(self, step: int) -> list[list[str]]:
        """The words of a step's rows."""
        return [[word for word, _ in row] for row in self._rows(step)]

    def latents(self, step: int) -> dict[str, Bool[Tensor, "batch pos"]]:
        """By latent, the positions whose next token depends on it."""
        rows = self._rows(step, extra=1)
        return {name: torch.tensor([[latent == name for _, latent in row[1:]] for row in rows]) for name in LATENTS}

    def _rows(self, step: int, extra: int = 0) -> list[list[Word]]:
        """Rows of ``context + extra`` words."""
        rows = []
        for number in range(self.batch_size):
            draw = random.Random(f"sentences/{self.seed}/{step}/{number}")
            row: list[Word] = [(BOS, None)]
            while len(row) < self.context + extra:
                row.extend(draw.choice(SENTENCES)(draw))
            rows.append(row[: self.context + extra])
        return rows


def encode(rows: Sequence[Sequence[str]]) -> Int[Tensor, "batch pos"]:
    """Rows of words as tokens; raises KeyError for a word outside the vocabulary."""
    numbers = {word: number for number, word in enumerate(VOCABULARY)}
    return torch.tensor([[numbers[word] for word in row] for row in rows])


def decode(tokens: Int[Tensor, "batch pos"]) -> list[str]:
    """Rows of tokens as text."""
    return [" ".join(VOCABULARY[token] for token in row) for row in tokens.tolist()]


@dataclass(frozen=True)
class Grammar(Toy):
    """The toy: a transformer with MLPs, trained on every next token."""

    context: int = 32
    n_layers: int = 2
    d_model: int = 64
    n_heads: int = 4
    d_mlp: int = 128
    training: TargetTraining = TRAINING
    output: ClassVar[Literal["kl", "mse"]] = "kl"

    def __post_init__(self) -> None:
        self.check(context=2, n_layers=1, d_model=1, n_heads=1, d_mlp=1)
        check_heads(self.n_heads, self.d_model)

    def build(self, seed: int = 0) -> Any:
        """LayerNorm, learned positions, GELU."""
        return small_transformer(
            seed,
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_head=self.d_model // self.n_heads,
            d_mlp=self.d_mlp,
            d_vocab=len(VOCABULARY),
            n_ctx=self.context,
            act_fn="gelu",
            normalization_type="LN",
        )

    def batches(self, rows: int, seed: int = 0) -> Batches:
        """Sentences of the grammar."""
        return Sentences(self.context, rows, seed)

    def loss(self, model: Any, batch: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Cross-entropy of every next token."""
        return cross_entropy_at(model(batch), batch, torch.ones_like(batch, dtype=torch.bool))

    def quality(self, model: Any) -> dict[str, float]:
        """Cross-entropy, and the accuracy where each latent is needed (``it_is`` leaves eight adjectives open)."""
        data = Sentences(self.context, 128, seed=-1)
        tokens, latents = data.at(0), data.latents(0)
        with torch.no_grad():
            logits, cross_entropy = model(tokens), self.loss(model, tokens)
        accuracy = {name: accuracy_at(logits, tokens, where) for name, where in latents.items() if name != "it_is"}
        # After "it is" any adjective is right.
        where = latents["it_is"][:, :-1]
        adjectives = torch.tensor([word in ADJECTIVES for word in VOCABULARY])
        accuracy["it_is"] = float(adjectives[logits[:, :-1][where].argmax(-1)].float().mean())
        return {"cross_entropy": float(cross_entropy), **accuracy}

    def truth(self, model: Any) -> Truth:
        """Where each latent is needed."""
        data = Sentences(self.context, 64, seed=-2)
        return Truth(probe=data.at(0), latents=data.latents(0))
