"""FLOPs of training transcoders; a product of ``[n, a]`` and ``[a, b]`` is ``2 n a b``. Elementwise work is left out.

Encoders and decoders are counted as they run, dense. A replaced pass runs every block of the target, its MLPs included (their
outputs are dropped), forward and backward to activations: an upper bound, since blocks before the first replaced one need no
backward.
"""

from __future__ import annotations

from torch import nn

from tl_vpd.baselines.transcoders.config import TranscoderConfig
from tl_vpd.baselines.transcoders.transcoders import Transcoders
from tl_vpd.planning import Target


def forward_flops(model: nn.Module, context: int) -> int:
    """Products per token of a forward pass of a transformer.

    Args:
        model: the transformer.
        context: tokens in a row.
    """
    target = Target.of(model)
    attention = target.layers * 4 * context * target.heads * target.d_head
    return sum(2 * s.d_in * s.d_out for s in target.sites) + attention + 2 * target.d_model * target.vocabulary


def training_flops(model: nn.Module, transcoders: Transcoders, config: TranscoderConfig, context: int) -> int:
    """FLOPs per token of one training step.

    Args:
        model: the target.
        transcoders: that are trained.
        config: of the training.
        context: tokens in a row.
    """
    clean = forward_flops(model, context)
    encode = decode = skip = 0
    for layer in transcoders.layers:
        d_in, n, d_out = transcoders[layer].sizes
        encode += 2 * d_in * n
        decode += 2 * n * d_out * len(transcoders.targets(layer))
        skip += 2 * d_in * d_out * (transcoders[layer].W_skip is not None)
    # Forward, and backward to weights and to latents; what encoders read needs a gradient where passes cascade.
    products = 2 * (encode + skip) + 3 * decode
    if config.loss == "local":
        return clean + products
    passes = len(transcoders.layers) if config.loss == "independent" else 1
    return clean + passes * 2 * clean + products + (encode + skip if config.loss == "cascading" else 0)
