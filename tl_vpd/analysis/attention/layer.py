"""One attention layer of a decomposition: its sites, their write directions by head, and what subcomponents do on prompts.

Grouped query attention: a key head serves several query heads; directions of W_K and W_V are repeated, so that every array here
has the query heads on its head axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, Unsupported, adapt
from tl_vpd.adapters.taps import tap_output
from tl_vpd.analysis.attention.kernel import ScoreKernel, measured_kernel
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.hooks.importances import zero_padding
from tl_vpd.importance import lower_leaky
from tl_vpd.site import Site, Subcomponent, nearest

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition

BIAS = "bias"
"""A site's bias in the place of a subcomponent: a member of pairs whose activation is always 1."""
Member = Subcomponent | str
Pair = tuple[Member, Member]
"""A subcomponent (or the bias) of W_Q and one of W_K of the same block."""
Pairs = Sequence[tuple[str | Subcomponent, str | Subcomponent]]


@dataclass(frozen=True)
class Seen:
    """What one clean pass over prompts shows of a layer: activations, importances and scores; ``token_mask`` is False at padding."""

    tokens: Int[Tensor, "batch pos"]
    token_mask: Bool[Tensor, "batch pos"] | None
    inputs: dict[str, Float[Tensor, "batch pos _"]]
    scores: Float[Tensor, "batch head query key"]
    importances: Float[Tensor, "batch pos C_total"]


class AttentionLayer:
    """A block's attention, taken apart.

    Args:
        decomposition: with W_Q and W_K of the block. model: the target. layer: the block's index.

    Raises:
        KeyError: the block or one of the two sites is not decomposed.
    """

    def __init__(self, decomposition: Decomposition, model: nn.Module, layer: int) -> None:
        self.decomposition, self.model, self.index = decomposition, model, layer
        self.adapter: Adapter = adapt(model)
        self.q, self.k = (attention_site(decomposition, layer, weight) for weight in ("W_Q", "W_K"))
        self.n_heads = self.q.n_heads or 1

    def kernel(self, length: int) -> ScoreKernel:
        """How the layer makes scores of queries and keys, for offsets below ``length``."""
        return measured_kernel(self.adapter, self.index, length)

    @cached_property
    def query_writes(self) -> Float[Tensor, "C_q head d_head"]:
        """Write directions of W_Q's subcomponents by head, in the model's dtype; behind them the bias's, where there is one."""
        return self._writes(self.q)

    @cached_property
    def key_writes(self) -> Float[Tensor, "C_k head d_head"]:
        """Write directions of W_K's subcomponents by query head; behind them the bias's, where there is one."""
        return self._writes(self.k)

    def _writes(self, site: Site) -> Tensor:
        U = self.decomposition.U[site.name].detach().to(dtype=self.adapter.dtype, device=self.adapter.device)
        bias = self.adapter.bias(site.name)
        return self.by_head(U if bias is None else torch.cat([U, bias.detach()[None]]), site)

    def by_head(self, y: Float[Tensor, "*batch d_out"], site: Site) -> Float[Tensor, "*batch head d_head"]:
        """Outputs of a site by query head."""
        own = y.unflatten(-1, (site.n_heads or 1, -1))
        return own.repeat_interleave(self.n_heads // (site.n_heads or 1), dim=-2)

    def acts(self, site: Site, inputs: dict[str, Tensor]) -> Float[Tensor, "batch pos C"]:
        """Inner activations of a site's subcomponents; behind them the bias's, which is 1."""
        x = inputs[site.name]
        return with_one(x @ self.decomposition.V[site.name].detach().to(x))

    def pairs(self, given: Pairs) -> list[Pair]:
        """Pairs of addresses as subcomponents; ``"bias"`` stands for the bias of its side.

        Raises:
            ValueError: a pair is not one of this block's W_Q and W_K, or there is no bias. KeyError, IndexError: there is no such
                subcomponent.
        """
        return [(self._member(q, self.q), self._member(k, self.k)) for q, k in given]

    def _member(self, given: str | Subcomponent, site: Site) -> Member:
        if given == BIAS:
            if self.adapter.bias(site.name) is None:
                raise ValueError(f"{site.name} has no bias in this model.")
            return BIAS
        own = self.decomposition.subcomponent(given)
        if own.site != site.name:
            raise ValueError(
                f"{own} is not of {site.name}: a pair is a subcomponent of {self.q.name} and one of {self.k.name}."
            )
        return own

    def columns(self, pairs: Sequence[Pair]) -> tuple[list[int], list[int]]:
        """Where the pairs' members stand among write directions and activations."""
        C = self.decomposition.counts
        return tuple(  # type: ignore[return-value]
            [C[site.name] if isinstance(pair[side], str) else pair[side].index for pair in pairs]  # type: ignore[union-attr]
            for side, site in enumerate((self.q, self.k))
        )

    @torch.no_grad()
    def seen(self, prompts: Any, attention_mask: Tensor | None = None) -> Seen:
        """One clean pass.

        Raises:
            Unsupported: the scores are not bilinear in queries and keys, or pass no HookPoint.
            ValueError: the prompts are empty, too long, or not this model's tokens.
        """
        found: list[Tensor] = []
        with MaskedModel(self.decomposition, self.model) as masked_model:
            name = self.adapter.scores_hook(self.index)
            handle = tap_output(self.adapter.model.get_submodule(name), lambda scores: found.append(scores.clone()))
            try:
                tokens, token_mask, inputs = masked_model.clean_prompts(prompts, attention_mask)
            finally:
                handle.remove()
        if not found:
            raise Unsupported(f"Block {self.index} ran without passing its scores through {name}.")
        g = zero_padding(lower_leaky(self.decomposition.pre_sigmoid(inputs, token_mask)), token_mask)
        return Seen(tokens, token_mask, inputs, found[0], g)


def with_one(acts: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C_and_bias"]:
    """Activations, or masks, with the bias's behind them."""
    return torch.nn.functional.pad(acts, (0, 1), value=1.0)


def attention_site(decomposition: Decomposition, layer: int, weight: str) -> Site:
    """``blocks.{layer}.attn.{weight}`` of a decomposition; raises KeyError if it is not decomposed."""
    name = f"blocks.{layer}.attn.{weight}"
    if name not in decomposition.sites:
        raise KeyError(f"{name} is not decomposed{nearest(name, decomposition.sites)}.")
    return decomposition.sites[name]


def indices(decomposition: Decomposition, site: Site, chosen: Sequence[str | Subcomponent | int] | None) -> list[int]:
    """Subcomponents of one site as indices (None: all).

    Raises:
        ValueError: one is of another site. KeyError, IndexError: there is none such.
    """
    if chosen is None:
        return list(range(decomposition.counts[site.name]))
    found = []
    for own in chosen:
        address = decomposition.subcomponent(Subcomponent(site.name, own) if isinstance(own, int) else own)
        if address.site != site.name:
            raise ValueError(f"{address} is not of {site.name}.")
        found.append(address.index)
    return found
