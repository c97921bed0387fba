"""One attention layer of a decomposition: its sites, their write directions by head, and what subcomponents do on prompts.

Grouped query attention: a key head serves several query heads; directions of W_K and W_V are repeated, so that every array here
has the query heads on its head axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, Unsupported, adapt
from tl_vpd.adapters.taps import tap_output, tapped
from tl_vpd.analysis.attention.kernel import ScoreKernel, measured_kernel
from tl_vpd.analysis.nodes import several
from tl_vpd.checks import instance, integer, sequence, shown
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel
from tl_vpd.forward.target_check import check_target
from tl_vpd.printing import Printed
from tl_vpd.site import Site, Subcomponent, nearest

BIAS = "bias"
"""A site's bias in place of a subcomponent: a member of pairs whose activation is always 1."""
Member = Subcomponent | str
Pair = tuple[Member, Member]
"""A subcomponent (or the bias) of W_Q and one of W_K of the same block."""
Pairs = Sequence[tuple[str | Subcomponent, str | Subcomponent]]


@dataclass(frozen=True)
class AttentionPass(Printed):
    """What one clean pass over prompts shows of a layer.

    Attributes:
        tokens: the prompts.
        token_mask: False at padding (None: no padding).
        inputs: of every site.
        scores: before the softmax.
        importances: of all sites, 0 at padding.
    """

    tokens: Int[Tensor, "batch pos"]
    token_mask: Bool[Tensor, "batch pos"] | None
    inputs: dict[str, Float[Tensor, "batch pos _"]]
    scores: Float[Tensor, "batch head query key"]
    importances: Float[Tensor, "batch pos C_total"]


class AttentionLayer:
    """A block's attention in terms of subcomponents; raises KeyError where its W_Q or W_K is not decomposed."""

    def __init__(self, decomposition: Decomposition, model: nn.Module, layer: int) -> None:
        self.decomposition, self.model, self.index = decomposition, model, integer("layer", layer, minimum=0)
        self.adapter: Adapter = adapt(model)
        check_target(decomposition, self.adapter)
        self.q, self.k = (attention_site(decomposition, layer, weight) for weight in ("W_Q", "W_K"))
        self.n_heads = self.q.n_heads or 1

    def kernel(self, length: int) -> ScoreKernel:
        """How the layer makes scores of queries and keys, for offsets below ``length``."""
        return measured_kernel(self.adapter, self.index, length)

    @cached_property
    def query_writes(self) -> Float[Tensor, "C_q head d_head"]:
        """Write directions of W_Q's subcomponents by head, in the model's dtype; the bias's is last, where there is one."""
        return self._writes(self.q)

    @cached_property
    def key_writes(self) -> Float[Tensor, "C_k head d_head"]:
        """Write directions of W_K's subcomponents by query head; the bias's is last, where there is one."""
        return self._writes(self.k)

    def _writes(self, site: Site) -> Tensor:
        U = self.decomposition.U[site.name].detach().to(dtype=self.adapter.dtype, device=self.adapter.device)
        bias = self.adapter.bias(site.name)
        return self.by_head(U if bias is None else torch.cat([U, bias.detach()[None]]), site)

    def by_head(self, y: Float[Tensor, "*batch d_out"], site: Site) -> Float[Tensor, "*batch head d_head"]:
        """Outputs of a site by query head."""
        n_heads = site.n_heads or 1
        return y.unflatten(-1, (n_heads, -1)).repeat_interleave(self.n_heads // n_heads, dim=-2)

    def acts(self, site: Site, inputs: dict[str, Tensor]) -> Float[Tensor, "batch pos C"]:
        """Inner activations of a site's subcomponents; the bias's, which is 1, is last."""
        x = inputs[site.name]
        return with_one(x @ self.decomposition.V[site.name].detach().to(x))

    def pairs(self, pairs: Pairs) -> list[Pair]:
        """Pairs of addresses as subcomponents; ``"bias"`` stands for the bias of its side. Raises TypeError, ValueError,
        KeyError or IndexError for what is not a pair of this block's W_Q and W_K.
        """
        pairs = pairs_of(pairs)
        return [(self._member(q, self.q), self._member(k, self.k)) for q, k in pairs]

    def _member(self, address: str | Subcomponent, site: Site) -> Member:
        if address == BIAS:
            if self.adapter.bias(site.name) is None:
                raise ValueError(f"{site.name} has no bias in this model.")
            return BIAS
        subcomponent = self.decomposition.subcomponent(address)
        if subcomponent.site != site.name:
            raise ValueError(
                f"{subcomponent} is not of {site.name}: a pair is a subcomponent of {self.q.name} and one of {self.k.name}."
            )
        return subcomponent

    def sides(self, subcomponents: Sequence[str | Subcomponent] | None) -> tuple[list[int], list[int]]:
        """The queries and the keys among subcomponents of this block, as indices; all of a side that no subcomponent is of."""
        indices: dict[str, list[int]] = {self.q.name: [], self.k.name: []}
        for address in () if subcomponents is None else several("subcomponents", subcomponents):
            subcomponent = self.decomposition.subcomponent(address)
            if subcomponent.site not in indices:
                raise ValueError(f"{subcomponent} is not of {self.q.name} or {self.k.name}.")
            indices[subcomponent.site].append(subcomponent.index)
        q, k = (indices[s.name] or list(range(self.decomposition.counts[s.name])) for s in (self.q, self.k))
        return q, k

    def columns(self, pairs: Sequence[Pair]) -> tuple[list[int], list[int]]:
        """Where the pairs' members stand among write directions and activations."""
        queries = [self._column(q, self.q) for q, _ in pairs]
        return queries, [self._column(k, self.k) for _, k in pairs]

    def _column(self, member: Member, site: Site) -> int:
        return member.index if isinstance(member, Subcomponent) else self.decomposition.counts[site.name]

    @torch.no_grad()
    def clean(self, prompts: Any, attention_mask: Tensor | None = None) -> AttentionPass:
        """One clean pass; raises Unsupported where scores are not bilinear in queries and keys, or pass no HookPoint."""
        scores: list[Tensor] = []
        with MaskedModel(self.decomposition, self.model) as masked_model:
            name = self.adapter.scores_hook(self.index)
            point = self.adapter.model.get_submodule(name)
            with tapped(partial(tap_output, point, lambda value: scores.append(value.clone()))):
                tokens, token_mask, inputs = masked_model.clean_prompts(prompts, attention_mask)
        if not scores:
            raise Unsupported(f"Block {self.index} ran without passing its scores through {name}.")
        g = self.decomposition.importances(inputs, token_mask)
        return AttentionPass(tokens, token_mask, inputs, scores[0], g)


def with_one(acts: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C_and_bias"]:
    """Activations, or masks, followed by the bias's."""
    return torch.nn.functional.pad(acts, (0, 1), value=1.0)


def pairs_of(pairs: Any) -> list[tuple[Any, Any]]:
    """Pairs of addresses as tuples; raises TypeError or ValueError unless each is of two."""
    result = sequence("pairs", pairs)
    for pair in result:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{shown(pair)} is not a pair: give ('blocks.1.attn.W_Q:3', 'blocks.1.attn.W_K:5').")
    return [(q, k) for q, k in result]


def attention_site(decomposition: Decomposition, layer: int, weight: str) -> Site:
    """``blocks.{layer}.attn.{weight}`` of a decomposition; raises KeyError where it is not decomposed."""
    instance("decomposition", decomposition, Decomposition)
    name = f"blocks.{integer('layer', layer, minimum=0)}.attn.{weight}"
    if name not in decomposition.sites:
        raise KeyError(f"{name} is not decomposed{nearest(name, decomposition.sites)}.")
    return decomposition.sites[name]
