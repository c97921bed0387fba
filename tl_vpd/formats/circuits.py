"""Circuits in other tools' files, as the addresses that ``audit_circuit`` takes.

===================================================  =============================================================================
file                                                 read as
===================================================  =============================================================================
``Graph.to_json``, ``.to_pt`` of EAP-IG, CircuitKit  the edges with ``in_graph``
auto-circuit's ``PruneScores`` by ``torch.save``     the edges whose score is not 0 (ACDC, masks, ``circuit_prune_scores``)
a JSON list of names                                 edges: ``a0.h1->a1.h3<q>``, or auto-circuit's ``A0.1->A1.3.Q``
CircuitKit's ``CircuitArtifact`` (``save_json``)     its nodes: its edges leave out the embedding and the logits
CircuitKit's ``…_scores.json``                       nodes by score
graphs of circuit-tracer, and for its viewer         latents at positions; subcomponents in graphs of this package
===================================================  =============================================================================

With ``top=k`` the k edges or nodes of the largest scores in absolute value are read instead.

    >>> audit_circuit(None, model, tokens, load_circuit("ioi.json"), metric)                # doctest: +SKIP

Latents are audited with their transcoders in the place of the decomposition. Pickles (``.pkl``) run code when they are read and
are refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tl_vpd.analysis.edges import Edge
from tl_vpd.analysis.nodes import Node
from tl_vpd.checks import integer, path_of, shown
from tl_vpd.files.json_files import read_json
from tl_vpd.formats.param_decomp.checkpoint import load_tensors

Scored = list[tuple[Edge | Node, float]]
_AUTO_CIRCUIT = re.compile(
    r"(?:(?P<input>Resid Start)|A(?P<a>\d+)\.(?P<h>\d+)|MLP (?P<m>\d+))"
    r"->(?:(?P<logits>Resid End)|A(?P<a2>\d+)\.(?P<h2>\d+)(?:\.(?P<reads>[QKV]))?|MLP (?P<m2>\d+))",
    re.ASCII,
)
_READERS = re.compile(r"blocks\.(\d+)\.(hook_[qkv]_input|hook_attn_in|hook_mlp_in|hook_resid_post)", re.ASCII)
_NAMED = re.compile(r"A(?P<a>\d+)\.(?P<h>\d+)|MLP (?P<m>\d+)|L(?P<l>\d+)\.(?P<n>\d+)", re.ASCII)
_LATENT = re.compile(r"(\d+)_(\d+)_\d+", re.ASCII)
_SUBCOMPONENT = re.compile(r"blocks\.\d+\.[\w.]+\.W_\w+:\d+", re.ASCII)


def load_circuit(path: str | os.PathLike[str], *, top: int | None = None) -> tuple[Edge, ...] | tuple[Node, ...]:
    """Reads a circuit.

    Args:
        path: a file of one of the formats above.
        top: how many edges or nodes to take, those of the largest scores in absolute value (None: those that the file marks).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another format, damaged, or marks no circuit while ``top`` is None.
        TypeError: an argument is of another type.
    """
    path = path_of("path", path)
    top = None if top is None else integer("top", top, minimum=1)
    if path.suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"{path} is a pickle, which runs code when it is read: save it again by torch.save(scores, 'scores.pt')."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is not an ordinary file' if path.exists() else 'does not exist'}.")
    content = read_json(path) if path.suffix == ".json" else load_tensors(path)
    try:
        scored, marked = _read(content)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error.args[0] if error.args else error).rstrip(".")
        raise ValueError(f"{path} is not a circuit that is read: {reason}.") from error
    if top is not None:
        finite = [entry for entry in scored if not math.isnan(entry[1])]
        chosen = sorted(finite, key=lambda entry: -abs(entry[1]))[:top]
        marked = [address for address, _ in chosen]
    if not marked:
        raise ValueError(f"{path} has scores of {len(scored)} edges or nodes and marks none as the circuit: give top=.")
    return tuple(marked)  # type: ignore[return-value]


def _read(content: Any) -> tuple[Scored, list[Edge | Node]]:
    """All edges or nodes with scores, and those that the file marks as the circuit."""
    if isinstance(content, list):
        scored: Scored = [(_edge(name), 1.0) for name in content]
        return scored, [edge for edge, _ in scored]
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}")
    if "edges_scores" in content:
        return _eap_tensors(content)
    if "cfg" in content and "edges" in content:
        edges = {Edge.parse(name): entry for name, entry in content["edges"].items()}
        scored = [(edge, float(entry["score"])) for edge, entry in edges.items()]
        return scored, [edge for edge, entry in edges.items() if entry["in_graph"]]
    if "links" in content and "nodes" in content:
        return _viewer_graph(content["nodes"])
    if "metadata" in content and "nodes" in content:
        neurons = content["metadata"]["granularity"] == "neuron"
        scored = [(_artifact_node(node, neurons), float(node["importance"])) for node in content["nodes"].values()]
        return scored, [node for node, _ in scored]
    if "node_scores" in content:
        return [(_named_node(name), float(score)) for name, score in content["node_scores"].items()], []
    if content and all(isinstance(t, Tensor) and _READERS.fullmatch(name) for name, t in content.items()):
        return _prune_scores(content)
    raise ValueError(f"its keys are {shown(list(content)[:5])}")


def _edge(name: Any) -> Edge:
    """An edge by its name here or in auto-circuit."""
    match = _AUTO_CIRCUIT.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        return Edge.parse(name)
    source = "input" if match["input"] else _node_name(match["a"], match["h"], match["m"])
    target = "logits" if match["logits"] else _node_name(match["a2"], match["h2"], match["m2"])
    return Edge(source, target, match["reads"].lower() if match["reads"] else None)


def _node_name(layer: str | None, head: str | None, mlp: str | None) -> str:
    return f"m{mlp}" if mlp is not None else f"a{layer}.h{head}"


def _eap_tensors(content: Mapping[str, Any]) -> tuple[Scored, list[Edge | Node]]:
    """EAP-IG's matrices ``[source, target]``; entries of pairs that are not edges are 0 and unmarked."""
    scores, marked = content["edges_scores"], content["edges_in_graph"]
    sources, targets = content["src_nodes"], content["dst_nodes"]
    if scores.shape != (len(sources), len(targets)) or marked.shape != scores.shape:
        raise ValueError(f"scores of shape {tuple(scores.shape)} for {len(sources)} sources and {len(targets)} targets")
    where = ((scores != 0) | marked.bool()).nonzero().tolist()
    edges = [(Edge.parse(f"{sources[s]}->{targets[t]}"), float(scores[s, t]), bool(marked[s, t])) for s, t in where]
    return [(edge, score) for edge, score, _ in edges], [edge for edge, _, is_marked in edges if is_marked]


def _prune_scores(scores: Mapping[str, Tensor]) -> tuple[Scored, list[Edge | Node]]:
    """auto-circuit's masks by reader, ``[(pos), (head), source]``; all edges in which no score is 0 are no circuit."""
    heads = max((t.shape[-2] for name, t in scores.items() if name.endswith(("_input", "attn_in"))), default=0)
    layers = sorted({int(_READERS.fullmatch(name)[1]) for name in scores})  # type: ignore[index]
    sources = ["input"]
    for layer in range(layers[-1] + 1):
        sources += [f"a{layer}.h{h}" for h in range(heads)]
        sources += [f"m{layer}"] if f"blocks.{layer}.hook_mlp_in" in scores else []
    scored: Scored = []
    for name, tensor in scores.items():
        block, hook = _READERS.fullmatch(name).groups()  # type: ignore[union-attr]
        by_head = hook.endswith(("_input", "attn_in"))
        if tensor.ndim not in ((2, 3) if by_head else (1, 2)) or tensor.shape[-1] > len(sources):
            raise ValueError(f"{name} has scores of shape {tuple(tensor.shape)} for {len(sources)} sources")
        by_position = tensor.ndim == (3 if by_head else 2)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in tensor.shape)).view(-1, tensor.ndim).tolist():
            target = f"a{block}.h{index[-2]}" if by_head else (f"m{block}" if hook == "hook_mlp_in" else "logits")
            reads = hook[5] if hook.endswith("_input") else None
            edge = Edge(sources[index[-1]], target, reads, index[0] if by_position else None)
            scored.append((edge, float(tensor[tuple(index)])))
    marked = [edge for edge, score in scored if score != 0]
    return scored, marked if len(marked) < len(scored) else []


def _named_node(name: str) -> Node:
    """CircuitKit's ``A0.1`` (a head), ``MLP 5``, ``L3.42`` (a neuron)."""
    match = _NAMED.fullmatch(name)
    if match is None:
        raise ValueError(f"{shown(name)} names no head, MLP or neuron")
    if match["a"]:
        return Node(f"blocks.{match['a']}.attn.hook_z", int(match["h"]))
    if match["m"]:
        return Node(f"blocks.{match['m']}.hook_mlp_out")
    return Node(f"blocks.{match['l']}.mlp.hook_post", int(match["n"]))


def _artifact_node(node: Mapping[str, Any], neurons: bool) -> Node:
    """A node of a CircuitArtifact; an MLP is a neuron of index 0 there, unless the artifact is of neurons."""
    block, kind = f"blocks.{integer('layer_idx', node['layer_idx'], minimum=0)}", node["node_type"]
    if kind in ("attn_head", "attention_head"):
        return Node(f"{block}.attn.hook_z", integer("index", node["index"], minimum=0))
    if kind == "attn_layer":
        return Node(f"{block}.hook_attn_out")
    if kind in ("mlp_neuron", "mlp", "mlp_layer"):
        whole = kind == "mlp_layer" or not neurons
        return (
            Node(f"{block}.hook_mlp_out")
            if whole
            else Node(f"{block}.mlp.hook_post", integer("index", node["index"], minimum=0))
        )
    raise ValueError(f"node_type={shown(kind)} cannot be audited")


def _viewer_graph(nodes: list[dict[str, Any]]) -> tuple[Scored, list[Edge | Node]]:
    """Subcomponents (graphs of this package) or latents (``{layer}_{feature}_{pos}``); embeddings, logits and errors stay on.

    Influence is cumulative, so small is important.
    """
    scored: Scored = []
    for node in nodes:
        if node["feature_type"] in ("embedding", "logit", "mlp reconstruction error"):
            continue
        pos, match = integer("ctx_idx", node["ctx_idx"], minimum=0), _LATENT.fullmatch(node["node_id"])
        if _SUBCOMPONENT.fullmatch(node.get("clerp") or ""):
            site, index = node["clerp"].rsplit(":", 1)
        elif match is not None:
            site, index = f"blocks.{int(match[1])}.transcoder", match[2]
        else:
            raise ValueError(f"its node {shown(node['node_id'])} is neither a subcomponent nor a latent of a layer")
        influence = node.get("influence")
        scored.append((Node(site, int(index), pos), math.nan if influence is None else 1.0 - float(influence)))
    return scored, [node for node, _ in scored]
