"""A Γ from its config.

>>> gamma = build(GammaConfig(d_ci=16, n_blocks=1, n_heads=2), [Site("a", 4, 5)], {"a": 6})
>>> gamma({"a": torch.zeros(1, 3, 4)}).shape
torch.Size([1, 3, 6])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tl_vpd.importance.chunked import ChunkedTransformers
from tl_vpd.importance.config import GammaConfig
from tl_vpd.importance.global_mlp import GlobalMLP
from tl_vpd.importance.inputs import input_of, inputs_of
from tl_vpd.importance.mlps import PerSiteMLPs, PerSubcomponentMLPs
from tl_vpd.importance.transformer import SharedTransformer
from tl_vpd.site import Site

Gamma = SharedTransformer | ChunkedTransformers | PerSubcomponentMLPs | PerSiteMLPs | GlobalMLP


@torch.no_grad()
def build(config: GammaConfig, sites: Sequence[Site], counts: Mapping[str, int]) -> Gamma:
    """A freshly initialised Γ.

    Args:
        config: which Γ.
        sites: the decomposed ones.
        counts: number of subcomponents by site.

    Raises:
        ValueError: the widths do not fit together, the config's ``d_ci`` is not resolved, or the residual stream is to be read
            and a site is not in a block.
    """
    gamma = _module(config, sites, {site.name: counts[site.name] for site in sites})
    for bias in gamma.output_biases():
        bias.add_(config.output_bias)
    return gamma


def _module(config: GammaConfig, sites: Sequence[Site], counts: Mapping[str, int]) -> Gamma:
    d_in = inputs_of(config.reads, sites)
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
        reads = {site.name: input_of(config.reads, site) for site in sites}
        return ChunkedTransformers(d_in, counts, chunk=config.chunk, causal=config.causal, reads=reads, **size)
    return SharedTransformer(d_in, counts, causal=config.causal, **size)
