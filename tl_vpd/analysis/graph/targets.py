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
from tl_vpd.analysis.nodes import position_of
from tl_vpd.checks import check_fields, item, shown

LEAST_PROBABILITY = 0.05


@dataclass(frozen=True)
class LogitTarget:
    """The logit of a token (less that of another) at a position; ``text`` is how it is shown, ``probability`` the token's."""

    token: int
    pos: int
    minus: int | None = None
    text: str = ""
    probability: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, token=0, pos=0, minus=0, probability=(0, 1))

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


def logit_targets(adapter: Adapter, logits: Float[Tensor, "pos vocab"], targets: Any, pos: Any) -> list[LogitTarget]:
    """One target or a list, as the module's table writes them (None: every token of probability 0.05 or more, and at least the
    likeliest). Raises IndexError for a position or token that does not exist, ValueError for a text that is not one token or
    where nothing is left to explain, TypeError for anything else, FloatingPointError where the logits are NaN or infinite.
    """
    pos = position_of(pos, len(logits))
    check_logits(logits[pos], pos)
    p = logits[pos].float().softmax(-1)
    if targets is None:
        targets = min(LEAST_PROBABILITY, float(p.max()))
    parsed: dict[str, LogitTarget] = {}
    for target in targets if isinstance(targets, list) else [targets]:
        for one in _parse(adapter, p, target, pos):
            parsed[one.label] = one
    if not parsed:
        raise ValueError(
            f"targets={shown(targets)} leaves nothing to explain: the likeliest token has probability {float(p.max()):.3g}."
        )
    return list(parsed.values())


def check_logits(logits: Float[Tensor, " vocab"], pos: int) -> None:
    """Raises FloatingPointError unless the logits of a position are finite (−∞ says that a token is impossible)."""
    if bool((logits.isnan() | (logits == torch.inf)).any()):
        raise FloatingPointError(
            f"The model's logits at position {pos} are NaN or infinite: load it in float32, and look at its weights."
        )


def _parse(adapter: Adapter, p: Tensor, target: Any, pos: int) -> list[LogitTarget]:
    target = item(target)
    if isinstance(target, bool) or not isinstance(target, str | int | float | tuple):
        raise TypeError(f"{shown(target)} is not a target: give a token, a pair of tokens, or a probability.")
    if isinstance(target, float):
        if not 0 <= target <= 1:
            raise ValueError(f"{target} is not a probability: 0.05 explains every token of at least this probability.")
        return [_token(adapter, p, token, pos) for token in (p >= target).nonzero().flatten().tolist()]
    if isinstance(target, tuple):
        target = tuple(item(t) for t in target)
        if len(target) != 2 or any(isinstance(t, bool) or not isinstance(t, str | int) for t in target):
            raise ValueError(f"{shown(target)}: a difference of logits is a pair of tokens, each a text or a number.")
        first, second = (_token(adapter, p, token, pos) for token in target)
        if first.token == second.token:
            raise ValueError(f"{shown(target)} is one token twice, whose logits do not differ: give two tokens.")
        text = f"{first.text} − {second.text}"
        return [LogitTarget(first.token, pos, second.token, text, first.probability)]
    return [_token(adapter, p, target, pos)]


def _token(adapter: Adapter, p: Tensor, token: str | int, pos: int) -> LogitTarget:
    number = adapter.token(token) if isinstance(token, str) else token
    if not 0 <= number < len(p):
        raise IndexError(f"Token {shown(number)} is outside the vocabulary 0..{len(p) - 1}.")
    (text,) = adapter.words(torch.tensor([number]))
    return LogitTarget(number, pos, None, text, float(p[number]))
