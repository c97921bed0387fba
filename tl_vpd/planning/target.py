"""The shapes of a target, on which the cost of decomposing it depends: from a model, or from numbers alone.

>>> Target.of(TransformerShape(layers=2, d_model=8, heads=2, d_mlp=32, vocabulary=11)).parameters
1712
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator
from torch import nn

from tl_vpd.adapters import adapt
from tl_vpd.frozen import Frozen
from tl_vpd.site import Site


class TransformerShape(Frozen):
    """The numbers of a transformer that is not loaded."""

    layers: int = Field(ge=1)
    """Blocks."""
    d_model: int = Field(ge=1)
    """Width of the residual stream."""
    heads: int = Field(ge=1)
    """Query heads per block."""
    d_mlp: int = Field(ge=1)
    """Width of the MLPs."""
    vocabulary: int = Field(ge=1)
    """Tokens of the vocabulary."""
    kv_heads: int | None = Field(None, ge=1)
    """Key and value heads per block (None: as many as query heads)."""
    gated: bool = False
    """Whether MLPs have a gate."""
    itemsize: int = Field(4, ge=1)
    """Bytes of a number (bfloat16: 2)."""
    others: int = Field(0, ge=0)
    """Parameters beyond blocks' weights, embedding and unembedding."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerShape:
        kv_heads = self.kv_heads or self.heads
        if self.d_model % self.heads or self.heads % kv_heads:
            raise ValueError(
                f"heads={self.heads} and kv_heads={kv_heads}: heads must divide d_model={self.d_model}, and kv_heads heads."
            )
        return self

    def sites(self) -> list[Site]:
        """All weights in blocks."""
        d, d_head, kv_heads = self.d_model, self.d_model // self.heads, self.kv_heads or self.heads
        kv = kv_heads * d_head
        sites = []
        for i in range(self.layers):
            sites += [
                Site(f"blocks.{i}.attn.W_Q", d, d, self.heads, d_head),
                Site(f"blocks.{i}.attn.W_K", d, kv, kv_heads, d_head),
                Site(f"blocks.{i}.attn.W_V", d, kv, kv_heads, d_head),
                Site(f"blocks.{i}.attn.W_O", d, d, self.heads, d_head),
                *([Site(f"blocks.{i}.mlp.W_gate", d, self.d_mlp)] if self.gated else []),
                Site(f"blocks.{i}.mlp.W_in", d, self.d_mlp),
                Site(f"blocks.{i}.mlp.W_out", self.d_mlp, d),
            ]
        return sites


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
    def of(cls, model: nn.Module | TransformerShape) -> Target:
        """The shapes of a model, whose weights are not read, or of numbers alone.

        Raises:
            TypeError: the model is not a transformer of TransformerLens.
        """
        if isinstance(model, TransformerShape):
            sites = model.sites()
            parameters = sum(s.d_in * s.d_out for s in sites) + 2 * model.d_model * model.vocabulary + model.others
            return cls(
                sites=sites,
                parameters=parameters,
                d_head=model.d_model // model.heads,
                **model.model_dump(include={"d_model", "vocabulary", "layers", "heads", "itemsize"}),
            )
        cfg: Any = getattr(model, "cfg", None)
        if cfg is None or not hasattr(cfg, "n_heads"):
            raise TypeError(
                f"{type(model).__name__} is not a transformer of TransformerLens: give a TransformerShape instead."
            )
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
