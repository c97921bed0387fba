"""A graph on disk: ``graph.safetensors`` (nodes and edges) and ``graph.json`` (words, sites, logits, settings)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tl_vpd.analysis.graph.result import AttributionGraph
from tl_vpd.analysis.graph.targets import LogitTarget
from tl_vpd.components.storage import library_versions, write_atomically, write_json

FORMAT_VERSION = 1
TENSORS, TABLE = "graph.safetensors", "graph.json"
_NEEDED = ("tokens", "kind", "index", "pos", "activation", "importance", "source", "target", "weight")
_OPTIONAL = ("deltas", "biases")


def save(graph: AttributionGraph, folder: Path) -> Path:
    """See ``AttributionGraph.save``."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {name: getattr(graph, name) for name in (*_NEEDED, *_OPTIONAL)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items() if tensor is not None}
    write_atomically(folder / TENSORS, lambda p: save_file(tensors, p))
    table = {
        "format_version": FORMAT_VERSION,
        "words": graph.words,
        "names": graph.names,
        "logits": [asdict(target) for target in graph.logits],
        "settings": graph.settings,
        "versions": library_versions(),
    }
    write_json(folder / TABLE, table)
    return folder


def load(folder: Path, device: str | torch.device) -> AttributionGraph:
    """See ``AttributionGraph.load``."""
    for file in (TABLE, TENSORS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}: give the folder that AttributionGraph.save wrote.")
    try:
        table: dict[str, Any] = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        if table["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {table['format_version']}, this tl_vpd reads {FORMAT_VERSION}")
        tensors: dict[str, Any] = load_file(folder / TENSORS, device=str(device))
        if missing := [name for name in _NEEDED if name not in tensors]:
            raise ValueError(f"{TENSORS} lacks {', '.join(missing)}")
        return AttributionGraph(
            **{name: tensors[name] for name in _NEEDED if name != "tokens"},
            deltas=tensors.get("deltas"),
            biases=tensors.get("biases"),
            tokens=tensors["tokens"].cpu(),
            words=tuple(table["words"]),
            names=tuple(table["names"]),
            logits=tuple(LogitTarget(**target) for target in table["logits"]),
            settings=table["settings"],
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} contains a damaged graph: {error}") from error
