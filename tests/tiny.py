"""Models small enough to compute by hand, untrained decompositions of them, and what a mask means for a weight."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tl_vpd import Decomposition, VPDConfig
from tl_vpd.adapters.versions import HookedTransformer, HookedTransformerConfig
from tl_vpd.masking.modes import MODES_OF_OPTION
from tl_vpd.training import new_decomposition

GAMMA = dict(d_ci=8, n_blocks=1, n_heads=2)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "layernorm": dict(positional_embedding_type="standard"),
    "rms, gated, grouped": dict(
        normalization_type="RMS", gated_mlp=True, act_fn="silu", n_heads=4, n_key_value_heads=2
    ),
    "no norm": dict(normalization_type=None, act_fn="relu"),
    "folded norm": dict(normalization_type="LNPre"),
    "attention only": dict(attn_only=True, positional_embedding_type="standard"),
    "alibi": dict(positional_embedding_type="alibi"),
    "shortformer": dict(positional_embedding_type="shortformer"),
    "parallel": dict(parallel_attn_mlp=True),
    "solu": dict(act_fn="solu_ln"),
    "bidirectional": dict(attention_dir="bidirectional"),
    "sliding window": dict(use_local_attn=True, window_size=3, attn_types=["global", "local"]),
}
"""Flags by what they stand for; each model is built by ``tiny_model(**flags)``."""


def tiny_model(
    dtype: torch.dtype = torch.float64, seed: int = 0, tokenizer: Any = None, **flags: Any
) -> HookedTransformer:
    """Two layers, d_model 8, vocabulary 11, context 10; biases and norms are random too (to TransformerLens 3.x)."""
    settings = dict(
        n_layers=2,
        d_model=8,
        n_heads=2,
        d_head=4,
        d_mlp=12,
        d_vocab=11,
        n_ctx=10,
        act_fn="gelu",
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=4,
        dtype=dtype,
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # HookedTransformer itself is deprecated in 3.x
        model = HookedTransformer(HookedTransformerConfig(**{**settings, **flags}), tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if name.endswith(".w") else 0.0
            p.copy_(centre + 0.4 * torch.randn(p.shape, generator=generator))
    return model


def decomposition_of(model: HookedTransformer, C: int = 6, *, spread: float = 8.0, **config: Any) -> Decomposition:
    """An untrained decomposition; Γ's last layer is scaled so that importances of 0, 1 and between are all common."""
    vpd = new_decomposition(model, VPDConfig(**{"C": C, "gamma": GAMMA, **config}))
    if hasattr(vpd.gamma, "unembed"):
        with torch.no_grad():
            vpd.gamma.unembed.weight.mul_(spread)
            vpd.gamma.unembed.bias.add_(0.5)
    return vpd


def some_tokens(seed: int = 0, shape: tuple[int, int] = (2, 7), d_vocab: int = 11) -> Tensor:
    """Random tokens."""
    return torch.randint(0, d_vocab, shape, generator=torch.Generator().manual_seed(seed))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform numbers in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def options_of(mode: str, **options: Any) -> dict[str, Any]:
    """Those of the options that a mode (or a ``rest`` of ``keep_only``) takes; the others raise there."""
    seeded = options.get("delta") == "drawn"
    return {k: v for k, v in options.items() if mode in MODES_OF_OPTION[k] or (k == "seed" and seeded)}


def weight_of(model: HookedTransformer, site: str) -> Tensor:
    """The parameter of a site, as the model stores it."""
    owner, name = site.rsplit(".", 1)
    module = model.get_submodule(owner)
    return getattr(module, "_" + name) if hasattr(module, "_" + name) else getattr(module, name)


def matrix_of(model: HookedTransformer, site: str) -> Tensor:
    """The site's weight as ``[d_in, d_out]``, heads flattened head-major."""
    W = weight_of(model, site).detach()
    if site.endswith(("W_Q", "W_K", "W_V")):
        return torch.cat(list(W), dim=-1)
    return torch.cat(list(W), dim=0) if site.endswith("W_O") else W


def edited(
    model: HookedTransformer, vpd: Decomposition, masks: Mapping[str, tuple[Tensor, float]]
) -> HookedTransformer:
    """A copy of the model with ``W' = V diag(m) U + m_Δ (W − V U)`` in the place of each named weight."""
    other = copy.deepcopy(model)
    for site, (mask, delta) in masks.items():
        W = matrix_of(model, site)
        V, U = vpd.V[site].detach().to(W.dtype), vpd.U[site].detach().to(W.dtype)
        new = V @ torch.diag(mask.to(W.dtype)) @ U + delta * (W - V @ U)
        stored = weight_of(other, site)
        if site.endswith(("W_Q", "W_K", "W_V")):
            new = torch.stack(new.chunk(stored.shape[0], dim=1))
        elif site.endswith("W_O"):
            new = torch.stack(new.chunk(stored.shape[0], dim=0))
        with torch.no_grad():
            stored.copy_(new)
    return other
