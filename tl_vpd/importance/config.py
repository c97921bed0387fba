"""Which Γ, and how large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tl_vpd.frozen import Frozen
from tl_vpd.importance.inputs import Reads

Size = Annotated[int, Field(gt=0, le=1 << 28)]
"""A width, depth or number of something; two of them make a tensor whose size can still be computed."""


TRANSFORMERS = ("shared_transformer", "chunked_transformers")
"""The kinds that read other tokens."""
GLOBAL_HIDDEN = 512
"""Hidden units of ``global_mlp`` unless set (targeted decomposition, arXiv 2607.13047)."""


class GammaConfig(Frozen):
    """Which Γ, and how large."""

    kind: Literal[
        "shared_transformer", "chunked_transformers", "per_subcomponent_mlps", "per_site_mlps", "global_mlp"
    ] = "shared_transformer"
    d_ci: Size | None = None
    """Width of the transformer (None: twice ``d_model``, rounded to whole heads)."""
    n_blocks: Size = 2
    """Depth of the transformer; a rule of thumb is half to twice the target's depth."""
    n_heads: Size = 4
    """Attention heads of the transformer."""
    d_mlp: Size | None = None
    """MLP width of the transformer (None: four times ``d_ci``)."""
    causal: bool = True
    """For transformers: whether importances at a position depend on its prefix alone. A bidirectional Γ (the paper's) also reads
    later tokens: masks then carry them into the forward pass, and modes that need importances cannot generate with a KV cache."""
    chunk: Size = 8
    """Sites of a transformer, for ``chunked_transformers``."""
    reads: Reads = "sites"
    """For transformers: every site's input, or the ``residual`` stream at the entry of every block that has decomposed sites (the
    authors' newer recipe): one input per block, which is cheaper for deep models."""
    hidden: Size = 16
    """Hidden units, for the MLP kinds; for ``global_mlp`` 512 unless set."""
    rising: bool = False
    """For ``per_subcomponent_mlps``: whether every importance starts as a rising function of its inner activation. Otherwise it
    starts as likely to be large on both sides of 0, and a subcomponent may come to serve two features, one on each side."""
    output_bias: float = 0.0
    """Added to every pre-sigmoid value at the start. Near 1, every subcomponent starts important and is trimmed from there
    under full gradients; at 0, half start at importance 0, where only a hundredth of the gradient leads back."""

    @model_validator(mode="before")
    @classmethod
    def _wide_where_one_reads_all(cls, fields: Any) -> Any:
        kind = fields.get("kind") if isinstance(fields, Mapping) else None
        wide = isinstance(kind, str) and kind == "global_mlp"
        return {"hidden": GLOBAL_HIDDEN, **fields} if wide else fields

    @model_validator(mode="after")
    def _rising_where_it_can(self) -> GammaConfig:
        if self.rising and self.kind != "per_subcomponent_mlps":
            raise ValueError(f"rising=True goes with kind='per_subcomponent_mlps', and kind is {self.kind!r}.")
        return self

    @model_validator(mode="after")
    def _residual_where_it_can(self) -> GammaConfig:
        if self.reads == "residual" and self.kind not in TRANSFORMERS:
            raise ValueError(f"reads='residual' goes with {' and '.join(TRANSFORMERS)}, and kind is {self.kind!r}.")
        return self

    @property
    def reads_the_future(self) -> bool:
        """Whether importances at a position depend on later tokens."""
        return not self.causal and self.kind in TRANSFORMERS

    def resolved(self, d_model: int) -> GammaConfig:
        """The config with the width filled in for a model of width ``d_model``."""
        if self.d_ci is not None:
            return self
        whole = 2 * self.n_heads
        return self.model_copy(update={"d_ci": max(whole, round(2 * d_model / whole) * whole)})


def stored_gamma(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``GammaConfig`` as a file has them: where it does not say, Γ is bidirectional."""
    transformer = fields.get("kind", "shared_transformer") in TRANSFORMERS
    return {"causal": not transformer, **fields}
