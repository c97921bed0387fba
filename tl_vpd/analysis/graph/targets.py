"""What a graph explains: logits of tokens, of all tokens above a probability, and differences of logits, at a position.

==================  ==================================================
written             means
==================  ==================================================
``">"`` or ``7``    the logit of this token
``(">", ")")``      the first's logit minus the second's
``0.05``            every token whose probability is at least this
==================  ==================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters import Adapter

Token = str | int


@dataclass(frozen=True)
class LogitTarget:
    """The logit of a token (less that of another) at a position; ``text`` is how it is shown, ``probability`` the token's."""

    token: int
    pos: int
    minus: int | None = None
    text: str = ""
    probability: float = 0.0

    @property
    def label(self) -> str:
        """``logits:7@4``, ``logits:7-3@4``."""
        return f"logits:{self.token}{'' if self.minus is None else f'-{self.minus}'}@{self.pos}"

    def direction(self, like: Float[Tensor, "*batch vocab"]) -> Float[Tensor, " vocab"]:
        """The direction w in logits whose product is the target's value."""
        w = like.new_zeros(like.shape[-1])
        w[self.token] += 1
        if self.minus is not None:
            w[self.minus] -= 1
        return w


def position(pos: int, length: int) -> int:
    """A position counted from the start; raises IndexError where there is none."""
    if not -length <= pos < length:
        raise IndexError(f"Position {pos} is outside the {length} positions of the prompt.")
    return pos % length


def logit_targets(adapter: Adapter, logits: Float[Tensor, "pos vocab"], wanted: Any, pos: int) -> list[LogitTarget]:
    """The targets that were asked for (None: every token of probability 0.05 or more, and at least the likeliest).

    Raises:
        IndexError: the position or a token does not exist. ValueError: a text is not one token, or nothing is left to explain.
        TypeError: a target is something else than the module's table has.
    """
    at = position(pos, len(logits))
    p = logits[at].float().softmax(-1)
    if wanted is None:
        wanted = min(0.05, float(p.max()))
    listed = wanted if isinstance(wanted, list) else [wanted]
    found: dict[str, LogitTarget] = {}
    for own in listed:
        for target in _parse(adapter, p, own, at):
            found[target.label] = target
    if not found:
        raise ValueError(
            f"targets={wanted!r} leaves nothing to explain: the likeliest token has probability {float(p.max()):.3g}."
        )
    return list(found.values())


def _parse(adapter: Adapter, p: Tensor, own: Any, at: int) -> list[LogitTarget]:
    if isinstance(own, bool) or not isinstance(own, str | int | float | tuple):
        raise TypeError(f"{own!r} is no target: give a token, a pair of tokens, or a probability.")
    if isinstance(own, float):
        if not 0 <= own <= 1:
            raise ValueError(f"{own} is no probability: 0.05 asks for every token of at least this probability.")
        return [_one(adapter, p, token, at) for token in (p >= own).nonzero().flatten().tolist()]
    if isinstance(own, tuple):
        if len(own) != 2:
            raise ValueError(f"{own!r} has {len(own)} entries: a difference of logits is a pair of tokens.")
        first, second = (_one(adapter, p, token, at) for token in own)
        text = f"{first.text} − {second.text}"
        return [LogitTarget(first.token, at, second.token, text, first.probability)]
    return [_one(adapter, p, own, at)]


def _one(adapter: Adapter, p: Tensor, token: Token, at: int) -> LogitTarget:
    number = adapter.token(token) if isinstance(token, str) else int(token)
    if not 0 <= number < len(p):
        raise IndexError(f"Token {number} is outside the vocabulary 0..{len(p) - 1}.")
    (text,) = adapter.words(torch.tensor([number]))
    return LogitTarget(number, at, None, text, float(p[number]))
