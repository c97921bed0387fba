"""Prompts with the token that is wanted after each: what edits are trained on and measured at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.checks import integer, sequence, shown
from tl_vpd.losses.precision import at_least_float32
from tl_vpd.printing import Printed


@dataclass(frozen=True)
class Wanted:
    """A token that is wanted after prompts.

    Attributes:
        token: its text or number; several, in a list, one for each prompt.
        prompts: strings, or tokens ``[batch, pos]``.
        pos: the position after which it is wanted, in every prompt; negative ones count from the last real token.
    """

    token: str | int | Sequence[str | int]
    prompts: Any
    pos: int = -1


@dataclass(frozen=True, eq=False)
class Examples(Printed):
    """Prompts as tokens, and what is wanted where.

    Attributes:
        tokens: of the prompts.
        token_mask: False at padding (None: no padding).
        positions: where the token is wanted next.
        wanted: the token.
    """

    tokens: Int[Tensor, "batch pos"]
    token_mask: Bool[Tensor, "batch pos"] | None
    positions: Int[Tensor, " batch"]
    wanted: Int[Tensor, " batch"]

    @classmethod
    def of(cls, adapter: Adapter, wanted: Wanted) -> Examples:
        """Reads a ``Wanted``.

        Args:
            adapter: of the model.
            wanted: from the caller.

        Raises:
            TypeError: a value is of another type.
            IndexError: a position or token does not exist.
            ValueError: there is not one token, or one for each prompt; or a text is not one token.
        """
        tokens = adapter.tokens(wanted.prompts)
        token_mask = adapter.padding(tokens, None)
        real = torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask
        lengths, pos = real.sum(1), integer("pos", wanted.pos)
        shortest = int(lengths.min())
        if not -shortest <= pos < shortest:
            raise IndexError(f"pos={pos}: the shortest prompt has positions {-shortest} to {shortest - 1}.")
        start = real.int().argmax(1)  # of the first real token
        positions = start + (lengths + pos if pos < 0 else pos)
        one = isinstance(wanted.token, str | int)
        numbers = [
            adapter.token(t) if isinstance(t, str) else integer("token", t, minimum=0)
            for t in ([wanted.token] if one else sequence("token", wanted.token))
        ]
        vocabulary = int(adapter.model.cfg.d_vocab)
        for number in numbers:
            if number >= vocabulary:
                raise IndexError(f"token={number}: the vocabulary has tokens 0 to {vocabulary - 1}.")
        if not one and len(numbers) != len(tokens):
            raise ValueError(f"token={shown(wanted.token)} has {len(numbers)} tokens for {len(tokens)} prompts.")
        each = torch.tensor(numbers * len(tokens) if one else numbers, device=tokens.device)
        return cls(tokens, token_mask, positions, each)

    def of_rows(self, rows: Int[Tensor, " row"]) -> Examples:
        """A part of the prompts."""
        mask = None if self.token_mask is None else self.token_mask[rows]
        return Examples(self.tokens[rows], mask, self.positions[rows], self.wanted[rows])

    def log_probs(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        """The log-probability of what is wanted, in every prompt."""
        return self.at(at_least_float32(logits).log_softmax(-1))

    def at(self, values: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        """The entries of the wanted tokens."""
        rows = torch.arange(len(values), device=values.device)
        return values[rows, self.positions, self.wanted]
