"""What every measure stands on: rows of a model's data, the target's output on them, and the importances at every token.

    >>> with sampled(vpd, model, tokens) as sample:                # doctest: +SKIP
    ...     aggregation(sample), adversaries(sample), transfer(sample)

A measure is a function of a sample. The controls are samples too: other pieces, or importances in other hands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from tl_vpd.components import Components
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.hooks.importances import zero_padding
from tl_vpd.importance import lower_leaky
from tl_vpd.losses import kl_divergence, squared_error
from tl_vpd.masking import Masks

ALIVE = 1e-6
"""Mean importance above which a subcomponent counts as alive."""

Importances = Callable[[int, Mapping[str, Tensor], Tensor | None], Tensor]
"""(batch index, clean site inputs, padding) -> concatenated importances."""
MasksOf = Callable[[int], Masks]
"""Batch index -> masks."""


def learned(decomposition: Decomposition) -> Importances:
    """The importances that Γ gives, 0 at padding."""

    def importances(index: int, inputs: Mapping[str, Tensor], token_mask: Tensor | None) -> Tensor:
        return zero_padding(lower_leaky(decomposition.pre_sigmoid(inputs, token_mask)), token_mask)

    return importances


class Sample:
    """Rows by batches. Everything is on the model's device; importances of all rows are kept, ``[rows, pos, C_total]``.

    Args:
        parts: V and U. tapped: the model with taps on their sites.
        importances: of a batch, from the clean inputs of the sites.
        tokens: rows ``[n, pos]``, or the input of a model of one's own.
        seed: of whatever the measures draw.
    """

    def __init__(
        self,
        parts: Decomposition | Components,
        masked_model: MaskedModel,
        importances: Importances,
        tokens: Shaped[Tensor, "n ..."],
        batch_size: int,
        seed: int,
    ) -> None:
        self.weights, self.masked_model, self.site_axis, self.seed = parts, masked_model, parts.site_axis, seed
        self.tokens = list(tokens.split(batch_size))
        self.token_mask = [masked_model.adapter.padding(t, None) for t in self.tokens]
        self.logits = masked_model.adapter.return_types
        self.target: list[Tensor] = []
        self.g: list[Tensor] = []
        self.target_ce: list[PerRow] = []
        for i, (t, k) in enumerate(zip(self.tokens, self.token_mask, strict=True)):
            output, inputs = masked_model.clean(t, k)
            self.target.append(output.float().log_softmax(-1) if self.logits else output.float())
            self.g.append(importances(i, inputs, k))
            if self.logits:
                self.target_ce.append(ce_by_row(output, t, k))
        self.positions = [
            int(g[..., 0].numel() if k is None else k.sum()) for g, k in zip(self.g, self.token_mask, strict=True)
        ]

    @property
    def measure(self) -> str:
        """``kl`` (nats a token) for logits, ``mse`` for other outputs."""
        return "kl" if self.logits else "mse"

    @property
    def tokens_total(self) -> int:
        """Real tokens of all rows."""
        return sum(self.positions)

    def mean_importances(self) -> Float[Tensor, " C_total"]:
        """Every subcomponent's mean importance over real tokens, concatenated."""
        return torch.stack([g.flatten(0, -2).sum(0) for g in self.g]).sum(0) / self.tokens_total

    def first(self, rows: int | None) -> Sample:
        """The same with the first rows alone (None: all).

        Raises:
            ValueError: fewer than one.
        """
        if rows is not None and rows < 1:
            raise ValueError(f"attack_rows={rows}: at least one row is attacked (budgets=() attacks none).")
        if rows is None or rows >= sum(len(t) for t in self.tokens):
            return self
        own = object.__new__(Sample)
        vars(own).update(vars(self))
        for name in ("tokens", "keep", "target", "g", "target_ce", "positions"):
            setattr(own, name, [])
        for i, t in enumerate(self.tokens):
            n = min(rows - sum(len(u) for u in own.tokens), len(t))
            if n <= 0:
                break
            k = self.token_mask[i]
            own.tokens.append(t[:n])
            own.token_mask.append(None if k is None else k[:n])
            own.target.append(self.target[i][:n])
            own.g.append(self.g[i][:n])
            if self.logits:
                own.target_ce.append(PerRow(self.target_ce[i].values[:n], self.target_ce[i].tokens[:n]))
            own.positions.append(int(own.g[-1][..., 0].numel() if k is None else k[:n].sum()))
        return own

    def generator(self, *numbers: int) -> torch.Generator:
        """A generator of its own for a draw that these numbers name."""
        seed = self.seed
        for number in numbers:
            seed = seed * 1_000_003 + number
        return torch.Generator(self.g[0].device).manual_seed(seed % (1 << 63))

    def output(self, i: int, masks: Masks) -> Tensor:
        """The masked model's output on a batch, without gradients."""
        with torch.no_grad():
            return self.masked_model.masked(self.tokens[i], masks, self.token_mask[i])

    def loss(self, i: int, masks: Masks) -> Float[Tensor, ""]:
        """The mean distance on a batch, with gradients to the masks."""
        output = self.masked_model.masked(self.tokens[i], masks, self.token_mask[i], constant_weights=True)
        divergence = kl_divergence if self.logits else squared_error
        return divergence(self.target[i], output, self.token_mask[i])

    def distance(self, i: int, output: Tensor) -> PerRow:
        """The distance of an output of batch i from the target's, by row."""
        return distance_by_row(self.target[i], output, self.token_mask[i], logits=self.logits)

    def distances(self, masks_of: MasksOf) -> PerRow:
        """The same over all batches under masks."""
        return PerRow.joined([self.distance(i, self.output(i, masks_of(i))) for i in range(len(self.tokens))])

    def outcome(self, masks_of: MasksOf) -> tuple[PerRow, PerRow | None]:
        """The distance and, for logits, the cross-entropy of the next token, over all batches."""
        distances, losses = [], []
        for i in range(len(self.tokens)):
            output = self.output(i, masks_of(i))
            distances.append(self.distance(i, output))
            if self.logits:
                losses.append(ce_by_row(output, self.tokens[i], self.token_mask[i]))
        return PerRow.joined(distances), PerRow.joined(losses) if losses else None


@contextmanager
def sampled(
    decomposition: Decomposition,
    model: nn.Module,
    tokens: Any,
    *,
    importances: Importances | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Iterator[Sample]:
    """Rows of a model's data as a sample; the model is tapped until the context is left.

    Args:
        tokens: a string, strings, rows ``[n, pos]``, or the input of a model of one's own.
        importances: in the place of Γ's.

    Raises:
        ValueError: the tokens or the decomposition do not fit the model.
    """
    with torch.no_grad(), MaskedModel(decomposition, model) as masked_model:
        rows = masked_model.adapter.tokens(tokens)
        yield Sample(decomposition, masked_model, importances or learned(decomposition), rows, batch_size, seed)


@torch.no_grad()
def distance_by_row(
    target: Float[Tensor, "row ..."],
    output: Float[Tensor, "row ..."],
    token_mask: Bool[Tensor, "row pos"] | None,
    *,
    logits: bool,
) -> PerRow:
    """Mean KL (``target`` log-probabilities, ``output`` logits) or squared error of every row; 0 for a row of padding."""
    divergence = kl_divergence if logits else squared_error
    values, counts = [], []
    for row in range(len(target)):
        part = None if token_mask is None else token_mask[row : row + 1]
        n = target[row, ..., 0].numel() if part is None else int(part.sum())
        values.append(float(divergence(target[row : row + 1], output[row : row + 1], part)) if n else 0.0)
        counts.append(n)
    return PerRow(np.array(values, dtype=float), np.array(counts, dtype=float))


@torch.no_grad()
def ce_by_row(
    logits: Float[Tensor, "row pos vocab"],
    tokens: Shaped[Tensor, "row pos"],
    token_mask: Bool[Tensor, "row pos"] | None,
) -> PerRow:
    """Mean cross-entropy of the next token of every row, over pairs of real tokens."""
    pairs = (
        torch.ones_like(tokens[:, 1:], dtype=torch.bool)
        if token_mask is None
        else token_mask[:, :-1] & token_mask[:, 1:]
    )
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    kept = losses.view(pairs.shape).double() * pairs
    counts = pairs.sum(1).double()
    return PerRow((kept.sum(1) / counts.clamp(min=1)).cpu().numpy(), counts.cpu().numpy())
