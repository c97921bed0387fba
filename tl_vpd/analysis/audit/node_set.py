"""What a circuit's nodes are ablated against: "everything else", at the granularity the nodes themselves have.

============================================  ===============================================================================
nodes of the circuit                          everything else
============================================  ===============================================================================
``blocks.1.attn.W_Q:316`` (subcomponents)     every other subcomponent of every decomposed site, and every Δ
``blocks.0.attn.hook_z:3`` (heads),           of every block: its heads (its whole attention where the circuit names
``blocks.0.hook_attn_out``,                   ``hook_attn_out`` there), and its whole MLP (its neurons where the circuit names
``blocks.0.hook_mlp_out`` (MLPs),             neurons there)
``blocks.0.mlp.hook_post:17`` (neurons)
``blocks.1.hook_resid_pre@4`` (residual)      the same hook at every other position, in every block
============================================  ===============================================================================

A node without ``@position`` stands for every position, one with it for that position alone: the component's other positions are
then part of everything else. Embeddings, unembedding, norms and biases are no nodes and stay on, ``b_O`` beside the heads too.
The three rows do not mix, for what is a node in one contains nodes of another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.analysis.nodes import Node
from tl_vpd.site import nearest

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition

Kind = Literal["head", "whole", "column", "delta"]
_ORDINARY = re.compile(
    r"blocks\.(?P<layer>\d+)\.(?P<what>attn\.hook_z|mlp\.hook_post|hook_attn_out|hook_mlp_out|hook_resid_(?:pre|mid|post))"
)


@dataclass(frozen=True)
class HookSite:
    """A hook whose output consists of ``count`` pieces that can be ablated one by one.

    ``name`` is how nodes are written (a site's, or the hook's own); ``kind`` says where in the output the pieces lie: on the head
    axis, all of it, on the last axis, or Δ's factor.
    """

    name: str
    hook: str
    kind: Kind
    count: int

    def node(self, index: int, pos: int | None = None) -> Node:
        """The piece as a node."""
        return Node(self.name, index if self.kind in ("head", "column") else None, pos)


@dataclass(frozen=True)
class NodeSet:
    """All places, in the order of the forward pass; pieces lie one after the other on a concatenated axis of ``total`` entries."""

    places: tuple[HookSite, ...]

    @property
    def total(self) -> int:
        """Pieces a position."""
        return sum(p.count for p in self.places)

    def slices(self) -> list[slice]:
        """Where each place lies on the concatenated axis."""
        ends = [0]
        for place in self.places:
            ends.append(ends[-1] + place.count)
        return [slice(a, b) for a, b in pairwise(ends)]

    def at(self, concatenated: int) -> tuple[HookSite, int]:
        """The place and index of a concatenated entry."""
        for place, own in zip(self.places, self.slices(), strict=True):
            if concatenated < own.stop:
                return place, concatenated - own.start
        raise IndexError(f"Entry {concatenated} is beyond the last of {self.total}.")

    def kept(self, nodes: Sequence[Node], n_pos: int) -> Bool[Tensor, "pos total"]:
        """True for the pieces that the nodes are (one row where no node has a position).

        Raises:
            KeyError: a node is not of these places. IndexError: its index or position does not exist.
        """
        where = dict(zip((p.name for p in self.places), self.slices(), strict=True))
        counts = {p.name: p for p in self.places}
        kept = torch.zeros(n_pos if any(n.pos is not None for n in nodes) else 1, self.total, dtype=torch.bool)
        for node in nodes:
            if node.name not in where:
                raise KeyError(f"{node} is not among what is audited{nearest(node.name, where)}: {', '.join(where)}.")
            own, place = where[node.name], counts[node.name]
            if node.index is not None and (place.kind == "whole" or node.index >= place.count):
                has = "no parts" if place.kind == "whole" else f"parts 0 to {place.count - 1}"
                raise IndexError(f"{node} does not exist: {place.name} has {has}.")
            if node.pos is not None and node.pos >= n_pos:
                raise IndexError(f"{node} does not exist: the prompts have {n_pos} positions.")
            columns = own if node.index is None else slice(own.start + node.index, own.start + node.index + 1)
            kept[slice(None) if node.pos is None else node.pos, columns] = True
        return kept

    def labels(self) -> list[str]:
        """The name of every piece, in concatenated order."""
        return [str(place.node(i)) for place in self.places for i in range(place.count)]


def node_set_of(
    adapter: Adapter, nodes: Sequence[Node], decomposition: Decomposition | None, among: str | Sequence[str] | None
) -> NodeSet:
    """Everything that is attacked or kept, as the table above says.

    Args:
        among: patterns of names (``blocks.1.*``): only these places are audited, the others stay as they are (None: all).

    Raises:
        ValueError: the nodes mix kinds that contain each other, or there are none.
        KeyError: a node's name is no hook or site that can be audited, or a pattern matches nothing.
    """
    if not nodes:
        raise ValueError("The circuit has no nodes: give at least one, such as 'blocks.0.attn.hook_z:3'.")
    of_sites = [n for n in nodes if decomposition is not None and n.name in decomposition.sites]
    if of_sites and len(of_sites) < len(nodes):
        other = next(n for n in nodes if n not in of_sites)
        raise ValueError(
            f"The circuit mixes subcomponents ({of_sites[0]}) with other nodes ({other}): choose one kind."
        )
    if of_sites:
        assert decomposition is not None
        places = _subcomponents(decomposition)
    else:
        places = _ordinary(adapter, nodes, decomposition)
    if among is not None:
        patterns = [among] if isinstance(among, str) else list(among)
        for pattern in patterns:
            if not any(fnmatchcase(p.name, pattern) for p in places):
                raise KeyError(f"Nothing audited matches {pattern!r}: {', '.join(p.name for p in places)}.")
        places = [p for p in places if any(fnmatchcase(p.name, pattern) for pattern in patterns)]
    return NodeSet(tuple(places))


def _subcomponents(decomposition: Decomposition) -> list[HookSite]:
    places = []
    for name, site in decomposition.sites.items():
        places.append(HookSite(name, site.hook_name("component_acts"), "column", decomposition.counts[name]))
        places.append(HookSite(f"{name}/Δ", site.hook_name("delta_mask"), "delta", 1))
    return places


def _ordinary(adapter: Adapter, nodes: Sequence[Node], decomposition: Decomposition | None) -> list[HookSite]:
    used: dict[tuple[int, str], Node] = {}
    for node in nodes:
        found = _ORDINARY.fullmatch(node.name)
        if found is None:
            hint = "" if decomposition is not None else " (subcomponents need decomposition=...)"
            raise KeyError(
                f"{node} cannot be audited{hint}: nodes are subcomponents of decomposed sites, attn.hook_z:head, hook_attn_out, "
                "hook_mlp_out, mlp.hook_post:neuron, and hook_resid_pre, hook_resid_mid or hook_resid_post."
            )
        used[int(found["layer"]), found["what"]] = node
    n_layers = len(adapter.blocks())
    for (layer, _), node in used.items():
        if layer >= n_layers:
            raise KeyError(f"{node} does not exist: the model has blocks 0 to {n_layers - 1}.")
    residual = sorted({what for _, what in used if what.startswith("hook_resid")})
    if residual:
        if len({what for _, what in used}) > 1:
            raise ValueError(
                f"The circuit mixes {', '.join(sorted({what for _, what in used}))}: the residual stream holds all else that is "
                "before it, so its positions are audited alone, at one of its hooks."
            )
        return [_whole(f"blocks.{layer}.{residual[0]}") for layer in range(n_layers)]
    places: list[HookSite] = []
    for layer in range(n_layers):
        for part, whole in (("attn.hook_z", "hook_attn_out"), ("mlp.hook_post", "hook_mlp_out")):
            if (layer, part) in used and (layer, whole) in used:
                raise ValueError(
                    f"{used[layer, part]} is a part of {used[layer, whole]}: choose one of the two for block {layer}."
                )
        places += _attention(adapter, layer, whole=(layer, "hook_attn_out") in used)
        places += _mlp(adapter, layer, neurons=(layer, "mlp.hook_post") in used)
    return places


def _whole(name: str) -> HookSite:
    return HookSite(name, name, "whole", 1)


def _attention(adapter: Adapter, layer: int, *, whole: bool) -> list[HookSite]:
    site = adapter.sites.get(f"blocks.{layer}.attn.W_O")
    if whole:
        return [_whole(f"blocks.{layer}.hook_attn_out")]
    if site is None or not site.n_heads:
        return []
    name = f"blocks.{layer}.attn.hook_z"
    return [HookSite(name, name, "head", site.n_heads)]


def _mlp(adapter: Adapter, layer: int, *, neurons: bool) -> list[HookSite]:
    site = adapter.sites.get(f"blocks.{layer}.mlp.W_out")
    if neurons:
        if site is None:
            raise KeyError(f"Block {layer} has no neurons that can be audited.")
        name = f"blocks.{layer}.mlp.hook_post"
        return [HookSite(name, name, "column", site.d_in)]
    has_mlp = site is not None or any(r.startswith(f"blocks.{layer}.mlp") for r in adapter.refused)
    return [_whole(f"blocks.{layer}.hook_mlp_out")] if has_mlp else []
