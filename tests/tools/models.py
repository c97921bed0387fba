"""Small models of every class that the installed TransformerLens has, with decompositions and weight-edited twins.

Each kind gives the same model every time, in float64, so that a twin is the same model built again with edited weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tl_vpd import Decomposition, VPDConfig
from tl_vpd.adapters import adapt
from tl_vpd.adapters.versions import (
    HookedTransformer,
    HookedTransformerConfig,
    transformer_bridge,
    transformer_lens_version,
)
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.training import new_decomposition

SIZES = dict(n_layers=2, d_model=16, n_heads=2, d_head=8, d_mlp=24, d_vocab=13, n_ctx=12)


def hooked_transformer() -> Any:
    """A HookedTransformer with LayerNorm and rotary positions."""
    settings = dict(
        act_fn="gelu",
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=4,
        dtype=torch.float64,
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # HookedTransformer itself is deprecated in 3.x
        return randomised(HookedTransformer(HookedTransformerConfig(**SIZES, **settings)))


def bridge() -> Any:
    """A TransformerBridge of a GPT-NeoX, whose Q, K and V share one fused weight."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        num_hidden_layers=SIZES["n_layers"],
        hidden_size=SIZES["d_model"],
        num_attention_heads=SIZES["n_heads"],
        intermediate_size=SIZES["d_mlp"],
        vocab_size=SIZES["d_vocab"],
        max_position_embeddings=SIZES["n_ctx"],
        rotary_pct=0.5,
        use_parallel_residual=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    source = randomised(GPTNeoXForCausalLM(config).to(torch.float64)).eval()
    return build_bridge_from_module(source, architecture="GPTNeoXForCausalLM", hf_config=source.config, tokenizer=None)


def compatible_bridge() -> Any:
    """The same in compatibility mode, its weights processed as HookedTransformer processes them."""
    model = bridge()
    model.enable_compatibility_mode()
    return model


def native_bridge() -> Any:
    """A TransformerBridge that needs nothing of transformers."""
    from transformer_lens.config import TransformerBridgeConfig

    settings = dict(act_fn="gelu", normalization_type="LN", architecture="TransformerLensNative", seed=0)
    model = transformer_bridge().boot_native(TransformerBridgeConfig(**SIZES, **settings), dtype=torch.float64)
    return randomised(model).eval()


def randomised(model: Any, seed: int = 0) -> Any:
    """The model with every parameter random: norms about 1, all else about 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = (
                1.0 if p.ndim == 1 and (name.endswith(".w") or ("norm" in name and name.endswith("weight"))) else 0.0
            )
            p.copy_(centre + 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def kinds() -> dict[str, Callable[[], Any]]:
    """The builders that the installed TransformerLens has classes for."""
    results: dict[str, Callable[[], Any]] = {}
    if HookedTransformer is not None:
        results["hooked_transformer"] = hooked_transformer
    if transformer_lens_version() >= (3, 4):
        results |= {"bridge": bridge, "compatible_bridge": compatible_bridge, "native_bridge": native_bridge}
    return results


KINDS = kinds()


def decomposition_of(model: Any, C: int = 7) -> Decomposition:
    """An untrained decomposition in float64, with importances of 0, 1 and between."""
    vpd = new_decomposition(model, VPDConfig(C=C, gamma=dict(d_ci=8, n_blocks=1, n_heads=2)))
    with torch.no_grad():
        vpd.gamma.unembed.weight.mul_(8.0)
        vpd.gamma.unembed.bias.add_(0.5)
    return vpd.to(torch.float64)


def tokens(seed: int = 0, shape: tuple[int, int] = (2, 6)) -> Tensor:
    """Random tokens."""
    return torch.randint(0, SIZES["d_vocab"], shape, generator=torch.Generator().manual_seed(seed))


def drawn_masks(vpd: Decomposition, seed: int = 0) -> dict[str, tuple[Tensor, float]]:
    """One random factor a subcomponent and Δ, constant over positions, for every site."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.rand(n, generator=generator, dtype=torch.float64)  # noqa: E731
    return {name: (draw(count), float(draw(1))) for name, count in vpd.counts.items()}


def as_masks(masks: Mapping[str, tuple[Tensor, float]], dtype: torch.dtype = torch.float64) -> Masks:
    """The same as masks that broadcast to a forward pass of any shape."""
    return Masks(
        {n: SiteMask(m.to(dtype)[None, None], torch.full((1, 1), d, dtype=dtype)) for n, (m, d) in masks.items()}
    )


def edit(model: Any, vpd: Decomposition, masks: Mapping[str, tuple[Tensor, float]]) -> Any:
    """The model with ``W' = V diag(m) U + m_Δ (W − V U)`` written into its weights."""
    adapter = adapt(model)
    for site, (mask, delta) in masks.items():
        W = adapter.weight(site).clone()
        V, U = vpd.V[site].detach().to(W.dtype), vpd.U[site].detach().to(W.dtype)
        adapter.set_weight(site, V @ torch.diag(mask.to(W.dtype)) @ U + delta * (W - V @ U))
    return model
