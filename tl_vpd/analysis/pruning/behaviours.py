"""Behaviours that a circuit is pruned to, each a loss of the logits at one position; ``exp(−loss)`` is its probability.

==================  ======================================  ===============================================
written             loss                                    probability
==================  ======================================  ===============================================
``">"`` or ``7``    cross-entropy of the token              of the token
``(">", ")")``      cross-entropy of the two tokens only    of the first, given that it is one of the two
None                KL from the target's distribution       ``exp(−KL)``: 1 where nothing changes
==================  ======================================  ===============================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.analysis.graph.targets import check_logits
from tl_vpd.analysis.nodes import position_of
from tl_vpd.checks import item, shown
from tl_vpd.losses.precision import at_least_float32
from tl_vpd.printing import Printed


@dataclass(frozen=True)
class Behaviour(Printed):
    """A behaviour at a position.

    Attributes:
        pos: the position of the logits.
        token: the token that is to be likely (None: the whole distribution).
        minus: the token that it is compared with (None: all tokens).
        target: the log-probabilities of the target model at the position.
        text: how the behaviour is shown.
    """

    pos: int
    token: int | None
    minus: int | None
    target: Float[Tensor, " vocab"]
    text: str

    def losses(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
        """The loss of every row, in nats, in float32 or better."""
        logits = at_least_float32(logits)
        if self.token is None:
            return (self.target.exp() * (self.target - logits.log_softmax(-1))).sum(-1)
        if self.minus is None:
            return -logits.log_softmax(-1)[:, self.token]
        return F.softplus(logits[:, self.minus] - logits[:, self.token])

    def probability(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
        """``exp(−loss)`` of every row."""
        return (-self.losses(logits)).exp()


def behaviour_of(adapter: Adapter, logits: Float[Tensor, "pos vocab"], behaviour: Any, pos: int) -> Behaviour:
    """Reads a behaviour as the module's table writes it. Raises IndexError for a position or token that does not exist,
    ValueError for a text that is not one token, TypeError for anything else, FloatingPointError where the logits are NaN or
    infinite.
    """
    pos = position_of(pos, len(logits))
    check_logits(logits[pos], pos)
    target = at_least_float32(logits[pos].detach()).log_softmax(-1)
    if behaviour is None:
        return Behaviour(pos, None, None, target, "the model's distribution")
    pair = tuple(item(t) for t in (behaviour if isinstance(behaviour, tuple) else (behaviour,)))
    if not 1 <= len(pair) <= 2 or any(isinstance(t, bool) or not isinstance(t, str | int) for t in pair):
        raise TypeError(
            f"{shown(behaviour)} is not a behaviour: give a token, a pair of tokens, or None for the whole distribution."
        )
    numbers = [adapter.token(token) if isinstance(token, str) else token for token in pair]
    for number in numbers:
        if not 0 <= number < len(target):
            raise IndexError(f"Token {shown(number)} is outside the vocabulary 0..{len(target) - 1}.")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{shown(behaviour)} is one token twice, one of which is never likelier: give two tokens.")
    words = adapter.words(torch.tensor(numbers))
    text = " over ".join(repr(word) for word in words)
    return Behaviour(pos, numbers[0], numbers[1] if len(numbers) == 2 else None, target, text)
