"""Behaviours that a circuit is pruned to, each a loss of the logits at one position; ``exp(−loss)`` is its probability.

==================  ======================================  ===========================================
written             loss                                    probability
==================  ======================================  ===========================================
``">"`` or ``7``    cross-entropy of the token              of the token
``(">", ")")``      cross-entropy of the two tokens alone   of the first, where one of both is certain
None                KL from the model's own distribution    ``exp(−KL)``: 1 where nothing changes
==================  ======================================  ===========================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters import Adapter


@dataclass(frozen=True)
class Behaviour:
    """A behaviour at a position.

    ``token``, ``minus``: as in the module's table. ``target``: the model's own log-probabilities there. ``text``: how it is
    shown.
    """

    pos: int
    token: int | None
    minus: int | None
    target: Float[Tensor, " vocab"]
    text: str

    def losses(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
        """The loss of every row, in nats."""
        if self.token is None:
            return (self.target.exp() * (self.target - logits.float().log_softmax(-1))).sum(-1)
        if self.minus is None:
            return -logits.float().log_softmax(-1)[:, self.token]
        return F.softplus((logits[:, self.minus] - logits[:, self.token]).float())

    def probability(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
        """``exp(−loss)`` of every row."""
        return (-self.losses(logits)).exp()


def behaviour_of(adapter: Adapter, logits: Float[Tensor, "pos vocab"], wanted: Any, pos: int) -> Behaviour:
    """Reads the module's table.

    Raises:
        IndexError: the position or a token does not exist. ValueError: a text is not one token. TypeError: it is something else.
    """
    if not -len(logits) <= pos < len(logits):
        raise IndexError(f"Position {pos} is outside the {len(logits)} positions of the prompt.")
    at = pos % len(logits)
    target = logits[at].detach().float().log_softmax(-1)
    if wanted is None:
        return Behaviour(at, None, None, target, "the model's distribution")
    pair = wanted if isinstance(wanted, tuple) and len(wanted) == 2 else (wanted, None)
    numbers: list[int | None] = []
    for own in pair:
        if own is None and len(numbers):
            numbers.append(None)
            continue
        if isinstance(own, bool) or not isinstance(own, str | int):
            raise TypeError(
                f"{wanted!r} is no behaviour: give a token, a pair of tokens, or None for the distribution."
            )
        number = adapter.token(own) if isinstance(own, str) else own
        if not 0 <= number < len(target):
            raise IndexError(f"Token {number} is outside the vocabulary 0..{len(target) - 1}.")
        numbers.append(number)
    token, minus = numbers
    words = adapter.words(torch.tensor([n for n in numbers if n is not None]))
    return Behaviour(at, token, minus, target, " over ".join(repr(word) for word in words))
