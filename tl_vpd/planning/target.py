"""What of a target the cost of decomposing it depends on: its shapes, from a model or from numbers alone.

>>> transformer(layers=2, d_model=8, heads=2, d_mlp=32, vocabulary=11).parameters
1712
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tl_vpd.adapters import adapt
from tl_vpd.site import Site


@dataclass(frozen=True)
class Target:
    """What of a target its cost depends on.

    ``sites``: all of its weights that sit in blocks. ``parameters``: numbers in the whole model. ``heads``: query heads of a
    layer, each of ``d_head``. ``itemsize``: bytes of a number.
    """

    sites: Sequence[Site]
    parameters: int
    d_model: int
    vocabulary: int
    layers: int
    heads: int
    d_head: int
    itemsize: int = 4

    @classmethod
    def of(cls, model: nn.Module) -> Target:
        """A model's; its weights are not read.

        Raises:
            TypeError: the model is no transformer of TransformerLens's.
        """
        cfg: Any = getattr(model, "cfg", None)
        if cfg is None or not hasattr(cfg, "n_heads"):
            raise TypeError(f"{type(model).__name__} is no transformer of TransformerLens's: give its numbers instead.")
        adapter = adapt(model)
        return cls(
            sites=list(adapter.sites.values()),
            parameters=sum(p.numel() for p in model.parameters()),
            d_model=cfg.d_model,
            vocabulary=cfg.d_vocab_out if getattr(cfg, "d_vocab_out", -1) > 0 else cfg.d_vocab,
            layers=cfg.n_layers,
            heads=cfg.n_heads,
            d_head=cfg.d_head,
            itemsize=adapter.dtype.itemsize,
        )


def transformer(
    *,
    layers: int,
    d_model: int,
    heads: int,
    d_mlp: int,
    vocabulary: int,
    kv_heads: int | None = None,
    gated: bool = False,
    itemsize: int = 4,
    others: int = 0,
) -> Target:
    """A transformer from its numbers; ``others``: parameters beyond blocks' weights, embedding and unembedding."""
    d_head = d_model // heads
    kv = (kv_heads or heads) * d_head
    sites = []
    for i in range(layers):
        sites += [
            Site(f"blocks.{i}.attn.W_Q", d_model, d_model, heads, d_head),
            Site(f"blocks.{i}.attn.W_K", d_model, kv, kv_heads or heads, d_head),
            Site(f"blocks.{i}.attn.W_V", d_model, kv, kv_heads or heads, d_head),
            Site(f"blocks.{i}.attn.W_O", d_model, d_model, heads, d_head),
            *([Site(f"blocks.{i}.mlp.W_gate", d_model, d_mlp)] if gated else []),
            Site(f"blocks.{i}.mlp.W_in", d_model, d_mlp),
            Site(f"blocks.{i}.mlp.W_out", d_mlp, d_model),
        ]
    parameters = sum(s.d_in * s.d_out for s in sites) + 2 * d_model * vocabulary + others
    return Target(sites, parameters, d_model, vocabulary, layers, heads, d_head, itemsize)
