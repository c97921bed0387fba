"""Induction: an attention-only transformer of two layers that continues repeated random sequences.

A row is a beginning-of-sequence token and a block of distinct random tokens, repeated until the row is full. The block's length
differs from row to row, so that the token to copy is only known from the earlier occurrence: a previous-token head in
layer 0 writes to every token which token came before it, an induction head in layer 1 attends to the token after the earlier
occurrence of the current one. Where a token occurs for the first time the next one cannot be known, and the model is trained to
predict all tokens with equal probability: it attends to the beginning of the sequence. So it is known where each weight is needed
(``mechanism``), and ``quality`` checks that on the model. Source of the mechanism: Olsson et al., *In-context Learning and
Induction Heads* (2022).

>>> Repeated(d_vocab=33, context=13, shortest=3, longest=5, batch_size=2).at(0).shape
torch.Size([2, 13])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.checks import check_fields
from tl_vpd.evaluation.truth import Truth
from tl_vpd.losses import kl_divergence
from tl_vpd.toys.toy import SeededBatches, TargetTraining, Toy
from tl_vpd.toys.transformers import ATTENTION_ONLY, accuracy_at, check_heads, cross_entropy_at, small_transformer
from tl_vpd.training.data import Batches

BOS = 0
TRAINING = TargetTraining(steps=3_000, rows=64, lr=2e-3, schedule="cosine", weight_decay=1.0)
"""The decay leaves nothing in the weights that the task does not need."""


@dataclass(frozen=True)
class Repeated(SeededBatches):
    """Batches ``[batch_size, context]`` of repeated blocks of ``shortest`` to ``longest`` distinct tokens."""

    rows: ClassVar[str] = "repeated blocks"
    d_vocab: int
    context: int
    shortest: int
    longest: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, d_vocab=2, context=2, shortest=1, batch_size=1)
        check_fields(self, longest=(self.shortest, self.d_vocab - 1))

    def at(self, step: int) -> Int[Tensor, "batch pos"]:
        """The batch of a step."""
        generator = self.generator("repeated", step)
        order = torch.rand(self.batch_size, self.d_vocab - 1, generator=generator).argsort(-1) + 1
        length = torch.randint(self.shortest, self.longest + 1, (self.batch_size, 1), generator=generator)
        rows = order.gather(1, torch.arange(self.context - 1)[None] % length)
        return torch.cat([torch.full((self.batch_size, 1), BOS), rows], dim=1)


def repeated(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Where a token occurs for the second time or later, so that the next one can be known."""
    earlier = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril(-1)
    return ((tokens[:, :, None] == tokens[:, None, :]) & earlier).any(-1)


def mechanism(tokens: Int[Tensor, "batch pos"]) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Where each weight is needed, by site.

    *Sources* occur for the first time and will occur again; the token after one is a *copy place*. Layer 0 moves the source's
    identity (W_V at sources, W_O at copy places) to the token after it, which attends to it by position (W_Q; W_K also where it
    must not attend). In layer 1 every token attends (W_Q) to a copy place after its earlier occurrence, or to the beginning
    (W_K); the copy place's value (W_V) is written (W_O) where tokens are repeated.
    """
    later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
    again, start = ((tokens[:, :, None] == tokens[:, None, :]) & later).any(-1), tokens == BOS
    copying = repeated(tokens)
    sources = ~copying & ~start & again
    places = sources.roll(1, dims=1)
    places[:, 0] = False
    head = "blocks.{}.attn.W_{}".format
    return {
        head(0, "Q"): places,
        head(0, "K"): start | sources | places,
        head(0, "V"): sources,
        head(0, "O"): places,
        head(1, "Q"): ~start,
        head(1, "K"): start | places,
        head(1, "V"): places,
        head(1, "O"): copying,
    }


@dataclass(frozen=True)
class Induction(Toy):
    """The toy; with ``n_heads`` 1 each layer has the single head it needs."""

    d_vocab: int = 33
    """Tokens, the beginning-of-sequence token among them."""
    context: int = 33
    shortest: int = 6
    longest: int = 16
    d_model: int = 64
    n_heads: int = 1
    training: TargetTraining = TRAINING
    output: ClassVar[Literal["kl", "mse"]] = "kl"

    def __post_init__(self) -> None:
        self.check(d_vocab=2, context=2, shortest=1, d_model=1, n_heads=1)
        check_fields(self, longest=(self.shortest, self.d_vocab - 1))
        check_heads(self.n_heads, self.d_model)

    def build(self, seed: int = 0) -> Any:
        """Two layers of attention, positions added to queries and keys only, no norms."""
        return small_transformer(
            seed,
            n_layers=2,
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_head=self.d_model // self.n_heads,
            d_vocab=self.d_vocab,
            n_ctx=self.context,
            **ATTENTION_ONLY,
        )

    def batches(self, rows: int, seed: int = 0) -> Batches:
        """Repeated random blocks."""
        return Repeated(self.d_vocab, self.context, self.shortest, self.longest, rows, seed)

    def loss(self, model: Any, batch: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Cross-entropy with the next token where it can be known, with the uniform distribution elsewhere (the mean of both)."""
        logits, known = model(batch), repeated(batch)
        uniform = -logits[:, :-1][~known[:, :-1]].log_softmax(-1).mean(-1)
        return 0.5 * (cross_entropy_at(logits, batch, known) + uniform.mean())

    def quality(self, model: Any) -> dict[str, float]:
        """Accuracy where the next token can be known; elsewhere, nats from the uniform distribution; the two heads' scores (the
        best head of each layer); nats with every weight only where it is needed, and with none of them anywhere.
        """
        tokens = self.batches(64, seed=-1).at(0)
        where, needed = repeated(tokens), mechanism(tokens)
        with torch.no_grad():
            logits, cache = model.run_with_cache(tokens)
            log_target = logits.log_softmax(-1)
            without = [
                model.run_with_hooks(tokens, fwd_hooks=_only_where(model, places))
                for places in (needed, {site: torch.zeros_like(where) for site in needed})
            ]
        return {
            "accuracy": accuracy_at(logits, tokens, where),
            "from_alike": float(kl_divergence(log_target, torch.zeros_like(log_target), ~where)),
            "needed_alone": float(kl_divergence(log_target, without[0])),
            "none": float(kl_divergence(log_target, without[1])),
            "previous_token_score": float(previous_token_scores(cache["pattern", 0], tokens).max()),
            "induction_score": float(induction_scores(cache["pattern", 1], tokens).max()),
        }

    def truth(self, model: Any) -> Truth:
        """Where each weight is needed."""
        tokens = self.batches(64, seed=-2).at(0)
        return Truth(probe=tokens, needed=mechanism(tokens))


def _only_where(model: Any, needed: Mapping[str, Bool[Tensor, "batch pos"]]) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks that replace every weight's output by its bias, except where the weight is needed."""

    def hook(where: Bool[Tensor, "batch pos"], bias: Tensor) -> Callable[..., Tensor]:
        def output(y: Tensor, hook: Any) -> Tensor:
            return torch.where(where.reshape(*where.shape, *[1] * (y.ndim - 2)), y, bias.expand_as(y))

        return output

    hooks = []
    for site, where in needed.items():
        block, name = site.rsplit(".attn.W_")
        layer = model.blocks[int(block.removeprefix("blocks."))]
        point = f"{block}.hook_attn_out" if name == "O" else f"{block}.attn.hook_{name.lower()}"
        hooks.append((point, hook(where, getattr(layer.attn, f"b_{name}"))))
    return hooks


def previous_token_scores(
    pattern: Float[Tensor, "batch head pos pos"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, " head"]:
    """Each head's mean attention from tokens that occur for the first time to the token before (later copies are never read)."""
    paid = pattern.diagonal(-1, dim1=-2, dim2=-1).transpose(1, 2)
    return paid[~repeated(tokens)[:, 1:]].mean(0)


def induction_scores(
    pattern: Float[Tensor, "batch head pos pos"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, " head"]:
    """Each head's mean attention from repeated tokens to the tokens after earlier occurrences."""
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    paid = (pattern * after[:, None]).sum(-1).transpose(1, 2)
    return paid[repeated(tokens)].mean(0)
