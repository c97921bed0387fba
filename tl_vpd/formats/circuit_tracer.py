"""Attribution graphs as the JSON that the viewers of circuit-tracer and Neuronpedia open.

Those viewers know features of layers, not subcomponents of matrices, so every site is a separate row of ``layer``, with its name
in ``clerp``. Node ids are integers joined by underscores: ``{layer}_{feature}_{pos}``, ``E_{vocab}_{pos}`` for embeddings,
``{layers}_{vocab}_{pos}`` for logits. A difference of two logits has the first's token, and both in ``clerp``.

    >>> to_circuit_tracer(graph.pruned(nodes=200), "graphs", slug="closing-a-bracket", scan="my-model")      # doctest: +SKIP
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tl_vpd.analysis.graph import AttributionGraph
from tl_vpd.checks import instance, path_of, shown, text_of
from tl_vpd.files.atomic import make_folder
from tl_vpd.files.json_files import read_json, write_json

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
METADATA = "graph-metadata.json"


def to_circuit_tracer(
    graph: AttributionGraph,
    folder: str | os.PathLike[str],
    *,
    slug: str,
    scan: str = "tl_vpd",
    prompt: str | None = None,
) -> Path:
    """Writes ``{slug}.json`` and lists it in the folder's ``graph-metadata.json``, next to the graphs that it already lists.

    Args:
        graph: the graph.
        folder: of the files.
        slug: the graph's name in the viewer and of its file.
        scan: the model's name in the viewer.
        prompt: shown as the prompt (None: the tokens' text joined).

    Returns:
        The graph's file.

    Raises:
        ValueError: the slug is not a plain file name, two targets have one token and position, or the metadata file is damaged.
        OSError: the files cannot be written; older ones are whole then.
    """
    instance("graph", graph, AttributionGraph)
    folder, scan = path_of("folder", folder), text_of("scan", scan)
    prompt = None if prompt is None else text_of("prompt", prompt)
    if not _SLUG.fullmatch(text_of("slug", slug)):
        raise ValueError(f"slug={shown(slug)}: at most 200 letters, digits, '.', '_' and '-' make the name of a file.")
    if f"{slug}.json" == METADATA:
        raise ValueError(f"slug={slug!r}: {METADATA} is the folder's list of graphs; choose another name.")
    content = as_json(graph, slug=slug, scan=scan, prompt=prompt)
    listed = _listed(folder / METADATA)
    make_folder(folder)
    path = folder / f"{slug}.json"
    write_json(path, content)
    others = [entry for entry in listed if entry.get("slug") != slug]
    write_json(folder / METADATA, {"graphs": [*others, content["metadata"]]})
    return path


def as_json(graph: AttributionGraph, *, slug: str, scan: str, prompt: str | None = None) -> dict[str, Any]:
    """The content of the graph's file: ``metadata``, ``qParams``, ``nodes``, ``links``."""
    metadata = {
        "slug": slug,
        "scan": scan,
        "prompt_tokens": list(graph.words),
        "prompt": "".join(graph.words) if prompt is None else prompt,
        "node_threshold": 1.0,
        "schema_version": 1,
    }
    ids = node_ids(graph)
    if len(set(ids)) < len(ids):
        raise ValueError("Two targets of this graph share a token and a position, which the format cannot tell apart.")
    links = zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True)
    return {
        "metadata": metadata,
        "qParams": {"linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": [], "sg_pos": ""},
        "nodes": _nodes(graph, ids),
        "links": [{"source": ids[s], "target": ids[t], "weight": w} for s, t, w in links],
    }


def node_ids(graph: AttributionGraph) -> list[str]:
    """Every node's id in the viewers."""
    last = len(graph.names) - 1
    ids = []
    for kind, index, pos in zip(graph.kind.tolist(), graph.index.tolist(), graph.pos.tolist(), strict=True):
        # Sites are rows 0, 1, …; logits the row above the last.
        ids.append(f"{'E' if kind == 0 else last - 1 if kind == last else kind - 1}_{index}_{pos}")
    return ids


def _nodes(graph: AttributionGraph, ids: list[str]) -> list[dict[str, Any]]:
    last, of_logits = len(graph.names) - 1, iter(graph.logits)
    cumulative = _cumulative(graph)
    kinds, positions = graph.kind.tolist(), graph.pos.tolist()
    indices, activations = graph.index.tolist(), graph.activation.tolist()
    nodes = []
    for i, id_ in enumerate(ids):
        kind, pos = kinds[i], positions[i]
        node: dict[str, Any] = {
            "node_id": id_,
            "feature": indices[i],
            "layer": id_.split("_")[0],
            "ctx_idx": pos,
            "jsNodeId": f"{id_.rpartition('_')[0]}-{pos}",
            "influence": cumulative[i],
        }
        if kind == 0:
            node |= {"feature_type": "embedding", "clerp": f'Emb: "{graph.words[pos]}"'}
        elif kind == last:
            target = next(of_logits)
            node |= {"feature_type": "logit", "clerp": f'Output "{target.text}" (p={target.probability:.3f})'}
            node |= {"is_target_logit": True, "token_prob": target.probability}
        else:
            node |= {"feature_type": "cross layer transcoder", "clerp": f"{graph.names[kind]}:{indices[i]}"}
            node |= {"activation": activations[i]}
        nodes.append(node)
    return nodes


def _cumulative(graph: AttributionGraph) -> list[float]:
    """The share of all influence that a node and those of more influence have: small is important."""
    order = graph.influence.argsort(descending=True, stable=True)
    total = graph.influence.sum().clamp_min(1e-30)
    shares = graph.influence.new_zeros(len(graph))
    shares[order] = graph.influence[order].cumsum(0) / total
    return shares.clamp(max=1).tolist()


def _listed(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        graphs = read_json(path)["graphs"]
        known = isinstance(graphs, list) and all(isinstance(graph, dict) for graph in graphs)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of graphs: move it away, or write to another folder.") from error
    if not known:
        raise ValueError(f"{path} is not a list of graphs: move it away, or write to another folder.")
    return graphs
