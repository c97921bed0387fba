"""What a circuit's nodes are ablated against: "everything else", at the granularity of the nodes.

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
then among everything else. Embeddings, unembedding, norms and biases are not nodes and stay on, ``b_O`` beside the heads too.
The three rows do not mix, because a node of one contains nodes of another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.analysis.nodes import Node
from tl_vpd.decomposition import Decomposition
from tl_vpd.site import nearest, select

Kind = Literal["head", "whole", "column", "delta"]
_MODEL_HOOK = re.compile(
    r"blocks\.(?P<layer>\d+)\.(?P<what>attn\.hook_z|mlp\.hook_post|hook_attn_out|hook_mlp_out|hook_resid_(?:pre|mid|post))"
)


@dataclass(frozen=True)
class HookSite:
    """A hook whose output consists of ``count`` nodes that can be ablated one by one.

    Attributes:
        name: how its nodes are written (a site's name, or the hook's).
        hook: the hook's name.
        kind: where in the output the nodes lie: on the head axis, all of it, on the last axis, or Δ's factor.
        count: how many nodes there are per position.
    """

    name: str
    hook: str
    kind: Kind
    count: int

    def node(self, index: int, pos: int | None = None) -> Node:
        """One of its nodes."""
        return Node(self.name, index if self.kind in ("head", "column") else None, pos)


@dataclass(frozen=True)
class NodeSet:
    """All hook sites, in the order of the forward pass; their nodes lie on one concatenated axis of ``total`` entries."""

    hook_sites: tuple[HookSite, ...]

    @property
    def total(self) -> int:
        """Nodes per position."""
        return sum(site.count for site in self.hook_sites)

    def slices(self) -> list[slice]:
        """Where each hook site lies on the concatenated axis."""
        ends = [0]
        for site in self.hook_sites:
            ends.append(ends[-1] + site.count)
        return [slice(a, b) for a, b in pairwise(ends)]

    def node(self, concatenated: int, pos: int | None = None) -> Node:
        """The node of a concatenated entry."""
        site, where = next(
            pair for pair in zip(self.hook_sites, self.slices(), strict=True) if concatenated < pair[1].stop
        )
        return site.node(concatenated - where.start, pos)

    def kinds(self) -> dict[str, list[int]]:
        """Entries by kind of node: heads, MLPs, neurons, each kind of site. Δs' factors are not nodes."""
        kinds: dict[str, list[int]] = {}
        for site, where in zip(self.hook_sites, self.slices(), strict=True):
            if site.kind != "delta":
                kinds.setdefault(site.name.split(".", 2)[-1], []).extend(range(where.start, where.stop))
        return kinds

    def contains(self, nodes: Sequence[Node], n_pos: int) -> Bool[Tensor, "pos total"]:
        """True for these nodes (one row where no node has a position).

        Args:
            nodes: of the set.
            n_pos: positions of the prompts.

        Raises:
            KeyError: a node is not of this set.
            IndexError: its index or position does not exist.
        """
        by_name = {site.name: (site, where) for site, where in zip(self.hook_sites, self.slices(), strict=True)}
        result = torch.zeros(n_pos if any(n.pos is not None for n in nodes) else 1, self.total, dtype=torch.bool)
        for node in nodes:
            if node.name not in by_name:
                raise KeyError(
                    f"{node} is not among what is audited{nearest(node.name, by_name)}: {', '.join(by_name)}."
                )
            site, where = by_name[node.name]
            if node.index is not None and (site.kind == "whole" or node.index >= site.count):
                has = "no indices" if site.kind == "whole" else f"indices 0 to {site.count - 1}"
                raise IndexError(f"{node} does not exist: {site.name} has {has}.")
            if node.pos is not None and node.pos >= n_pos:
                raise IndexError(f"{node} does not exist: the prompts have {n_pos} positions.")
            columns = where if node.index is None else where.start + node.index
            result[slice(None) if node.pos is None else node.pos, columns] = True
        return result

    def labels(self) -> list[str]:
        """The label of every node, in concatenated order."""
        return [str(site.node(i)) for site in self.hook_sites for i in range(site.count)]


def node_set_of(
    adapter: Adapter, nodes: Sequence[Node], decomposition: Decomposition | None, among: str | Sequence[str] | None
) -> NodeSet:
    """The circuit and everything else, as the table above says.

    Args:
        adapter: of the model.
        nodes: the circuit.
        decomposition: whose subcomponents the nodes may be.
        among: patterns of names (``blocks.1.*``): only these are audited, the others run as in the model (None: all).

    Raises:
        ValueError: the nodes mix kinds that contain each other.
        KeyError: a node's name is not a hook or site that can be audited, or a pattern matches nothing.
    """
    subcomponents = [n for n in nodes if decomposition is not None and n.name in decomposition.sites]
    if subcomponents and len(subcomponents) < len(nodes):
        other = next(n for n in nodes if n not in subcomponents)
        raise ValueError(
            f"The circuit mixes subcomponents ({subcomponents[0]}) with other nodes ({other}): choose one kind."
        )
    if subcomponents:
        assert decomposition is not None
        hook_sites = _of_decomposition(decomposition)
    else:
        hook_sites = _of_model(adapter, nodes, decomposition)
    return among_of(hook_sites, among)


def among_of(hook_sites: Sequence[HookSite], among: str | Sequence[str] | None) -> NodeSet:
    """The hook sites that match a pattern (None: all); raises KeyError where a pattern matches none."""
    audited = None if among is None else matching(among, [site.name for site in hook_sites])
    return NodeSet(tuple(site for site in hook_sites if audited is None or site.name in audited))


def matching(among: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that match a pattern; raises KeyError where a pattern matches none."""
    for pattern in [among] if isinstance(among, str) else among:
        if not isinstance(pattern, str) or not any(fnmatchcase(name, pattern) for name in names):
            few = ", ".join(names[:40]) + (", …" if len(names) > 40 else "")
            raise KeyError(f"Nothing audited matches {pattern!r}{nearest(pattern, names)}: {few}.")
    return select(among, names)


def _of_decomposition(decomposition: Decomposition) -> list[HookSite]:
    hook_sites = []
    for name, site in decomposition.sites.items():
        hook_sites.append(HookSite(name, site.hook_name("component_acts"), "column", decomposition.counts[name]))
        hook_sites.append(HookSite(f"{name}/Δ", site.hook_name("delta_mask"), "delta", 1))
    return hook_sites


def _of_model(adapter: Adapter, nodes: Sequence[Node], decomposition: Decomposition | None) -> list[HookSite]:
    """Heads, attentions, MLPs, neurons or residual positions of every block."""
    named = _named_hooks(adapter, nodes, decomposition)
    residual = sorted({what for _, what in named if what.startswith("hook_resid")})
    if residual:
        if len({what for _, what in named}) > 1:
            raise ValueError(
                f"The circuit mixes {', '.join(sorted({what for _, what in named}))}: the residual stream contains all else "
                "before it, so audit its positions without other nodes, at one of its hooks."
            )
        return [_whole(f"blocks.{layer}.{residual[0]}") for layer in range(len(adapter.blocks()))]
    hook_sites: list[HookSite] = []
    for layer in range(len(adapter.blocks())):
        for part, whole in (("attn.hook_z", "hook_attn_out"), ("mlp.hook_post", "hook_mlp_out")):
            if (layer, part) in named and (layer, whole) in named:
                raise ValueError(
                    f"{named[layer, part]} is a part of {named[layer, whole]}: choose one of the two for block {layer}."
                )
        hook_sites += _attention(adapter, layer, whole=(layer, "hook_attn_out") in named)
        neurons = (layer, "mlp.hook_post") in named
        hook_sites += [_neurons(adapter, layer)] if neurons else mlp_of(adapter, layer)
    return hook_sites


def _named_hooks(
    adapter: Adapter, nodes: Sequence[Node], decomposition: Decomposition | None
) -> dict[tuple[int, str], Node]:
    """The nodes by block and hook; raises KeyError where there is no such block or hook to audit."""
    named: dict[tuple[int, str], Node] = {}
    n_layers = len(adapter.blocks())
    for node in nodes:
        match = _MODEL_HOOK.fullmatch(node.name)
        if match is None:
            hint = "" if decomposition is not None else " (for subcomponents give the decomposition)"
            raise KeyError(
                f"{node!s:.100} cannot be audited{hint}: nodes are subcomponents of decomposed sites, attn.hook_z:head, "
                "hook_attn_out, hook_mlp_out, mlp.hook_post:neuron, and hook_resid_pre, hook_resid_mid or hook_resid_post."
            )
        if int(match["layer"]) >= n_layers:
            raise KeyError(f"{node} does not exist: the model has blocks 0 to {n_layers - 1}.")
        named[int(match["layer"]), match["what"]] = node
    return named


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


def _neurons(adapter: Adapter, layer: int) -> HookSite:
    site = adapter.sites.get(f"blocks.{layer}.mlp.W_out")
    if site is None:
        raise KeyError(f"Block {layer} has no neurons that can be audited.")
    name = f"blocks.{layer}.mlp.hook_post"
    return HookSite(name, name, "column", site.d_in)


def mlp_of(adapter: Adapter, layer: int) -> list[HookSite]:
    """A block's MLP as one node, if it has one."""
    prefix = f"blocks.{layer}.mlp"
    has_mlp = f"{prefix}.W_out" in adapter.sites or any(name.startswith(prefix) for name in adapter.refused)
    return [_whole(f"blocks.{layer}.hook_mlp_out")] if has_mlp else []
