"""A Γ from its config.

>>> gamma = build(GammaConfig(d_ci=16, n_blocks=1, n_heads=2), {"a": 4}, {"a": 6})
>>> gamma({"a": torch.zeros(1, 3, 4)}).shape
torch.Size([1, 3, 6])
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tl_vpd.importance.chunked import ChunkedTransformers
from tl_vpd.importance.config import GammaConfig
from tl_vpd.importance.global_mlp import GlobalMLP
from tl_vpd.importance.mlps import PerSiteMLPs, PerSubcomponentMLPs
from tl_vpd.importance.transformer import SharedTransformer

Gamma = SharedTransformer | ChunkedTransformers | PerSubcomponentMLPs | PerSiteMLPs | GlobalMLP


@torch.no_grad()
def build(config: GammaConfig, d_in: Mapping[str, int], counts: Mapping[str, int]) -> Gamma:
    """A freshly initialised Γ.

    Args:
        config: which Γ.
        d_in: input width by site.
        counts: number of subcomponents by site.

    Raises:
        ValueError: the widths do not fit together, or the config's ``d_ci`` is not resolved.
    """
    gamma = _module(config, d_in, counts)
    for bias in gamma.output_biases():
        bias.add_(config.output_bias)
    return gamma


def _module(config: GammaConfig, d_in: Mapping[str, int], counts: Mapping[str, int]) -> Gamma:
    if config.kind == "per_subcomponent_mlps":
        return PerSubcomponentMLPs(counts, hidden=config.hidden, rising=config.rising)
    if config.kind == "per_site_mlps":
        return PerSiteMLPs(d_in, counts, hidden=config.hidden)
    if config.kind == "global_mlp":
        return GlobalMLP(d_in, counts, hidden=config.hidden)
    if config.d_ci is None:
        raise ValueError("GammaConfig.d_ci is None: call resolved(d_model) first, or set a width.")
    d_mlp = config.d_mlp or 4 * config.d_ci
    size = {"d_ci": config.d_ci, "n_blocks": config.n_blocks, "n_heads": config.n_heads, "d_mlp": d_mlp}
    if config.kind == "chunked_transformers":
        return ChunkedTransformers(d_in, counts, chunk=config.chunk, causal=config.causal, **size)
    return SharedTransformer(d_in, counts, causal=config.causal, **size)
