"""For toys that are transformers: building a small HookedTransformer from a seed, and the loss at chosen tokens."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.adapters.versions import HookedTransformer, HookedTransformerConfig
from tl_vpd.checks import seed_of

ATTENTION_ONLY = {"attn_only": True, "normalization_type": None, "positional_embedding_type": "shortformer"}
"""Settings of toys of attention alone: no norms, positions added to queries and keys only."""


def small_transformer(seed: int, **settings: Any) -> Any:
    """A HookedTransformer on the CPU with random weights from a seed; settings are ``HookedTransformerConfig``'s."""
    if HookedTransformer is None:
        raise ImportError("This TransformerLens has no HookedTransformer: install 3.x to build this toy.")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.x says that 4 has no HookedTransformer
        # A seed in the config would reseed Python, numpy and the GPUs as well.
        torch.default_generator.manual_seed(seed_of(seed))
        return HookedTransformer(HookedTransformerConfig(device="cpu", **settings))


def check_heads(n_heads: int, d_model: int) -> None:
    """Raises ValueError where a toy has more heads than its width can be split among."""
    if n_heads > d_model:
        raise ValueError(f"n_heads={n_heads} is above d_model={d_model}: give fewer heads, or a wider model.")


def cross_entropy_at(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token at the positions where ``where`` is True (nats); the last position has none."""
    rows = where[:, :-1]
    return F.cross_entropy(logits[:, :-1][rows], tokens[:, 1:][rows])


def accuracy_at(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]
) -> float:
    """How often the likeliest next token is the right one, at these positions."""
    rows = where[:, :-1]
    return float((logits[:, :-1][rows].argmax(-1) == tokens[:, 1:][rows]).float().mean())
