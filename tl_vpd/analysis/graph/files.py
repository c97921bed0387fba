"""A graph on disk: ``graph.safetensors`` has everything and proves itself, ``graph.json`` is a readable copy of its table.

Only ``graph.safetensors`` is read. The copy is written after it, so that a folder holds the old graph or the new one whenever the
writing stops. Graphs of format 1 had their words, sites and logits in ``graph.json`` alone, and no checksums.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tl_vpd.analysis.graph.checks import OF_EDGES, OF_NODES, OF_TERMS, target_of
from tl_vpd.analysis.graph.result import AttributionGraph
from tl_vpd.analysis.graph.targets import LogitTarget
from tl_vpd.files.atomic import make_folder
from tl_vpd.files.json_files import read_json, write_json
from tl_vpd.files.tensor_file import TensorFile, open_tensors, write_tensors
from tl_vpd.files.versions import library_versions

FORMAT_VERSION = 2
TENSORS, TABLE = "graph.safetensors", "graph.json"
_NEEDED = ("tokens", *OF_NODES, *OF_EDGES)
_FIELDS = {"format_version", "words", "names", "logits", "settings", "versions"}


def save(graph: AttributionGraph, folder: Path) -> Path:
    """See ``AttributionGraph.save``."""
    make_folder(folder)
    named = {name: getattr(graph, name) for name in (*_NEEDED, *OF_TERMS)}
    content = {
        "format_version": FORMAT_VERSION,
        "words": list(graph.words),
        "names": list(graph.names),
        "logits": [asdict(target) for target in graph.logits],
        "settings": graph.settings,
        "versions": library_versions(),
    }
    # Copies: safetensors refuses tensors that share memory.
    write_tensors(folder / TENSORS, {name: t.clone() for name, t in named.items() if t is not None}, content)
    write_json(folder / TABLE, content)
    return folder


def load(folder: Path, device: str | torch.device) -> AttributionGraph:
    """See ``AttributionGraph.load``."""
    if not (folder / TENSORS).is_file():
        raise FileNotFoundError(f"{folder} has no {TENSORS}: give the folder that AttributionGraph.save wrote.")
    with open_tensors(folder / TENSORS) as file:
        content = _first_format(folder) if file.content is None else file.content
        try:
            graph = _graph(content, file, device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder} holds a damaged graph: {str(error).rstrip('.')}.") from error
    if file.content is not None:
        _compare_copy(folder / TABLE, content)
    return graph


def _graph(content: Any, file: TensorFile, device: str | torch.device) -> AttributionGraph:
    if not isinstance(content, dict) or set(content) != _FIELDS:
        raise ValueError(f"its table has not the fields {', '.join(sorted(_FIELDS))}")
    if not all(isinstance(content[name], list) for name in ("words", "names", "logits")):
        raise ValueError("its words, names and logits are not lists")
    terms = set(OF_TERMS) & set(file.shapes)
    if set(file.shapes) != set(_NEEDED) | terms or len(terms) == 1:
        raise ValueError(f"{TENSORS} has not the tensors {', '.join((*_NEEDED, *OF_TERMS))}")
    tensors = {name: file.read(name) for name in file.shapes}
    tensors = {name: t if name == "tokens" else t.to(device) for name, t in tensors.items()}
    return AttributionGraph(
        **tensors,  # type: ignore[arg-type]
        words=tuple(content["words"]),
        names=tuple(content["names"]),
        logits=tuple(LogitTarget(**target_of(target)) for target in content["logits"]),
        settings=content["settings"],
    )


def _first_format(folder: Path) -> Any:
    """The table of a graph of format 1."""
    if not (folder / TABLE).is_file():
        raise FileNotFoundError(f"{folder} has no {TABLE}, which a graph without checksums needs.")
    content = read_json(folder / TABLE)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != 1:
        raise ValueError(
            f"{folder} holds a damaged graph: {TENSORS} has no checksums, and {TABLE} is of format {version!r:.40}."
        )
    warnings.warn(
        f"The graph in {folder} was saved without checksums, so damage to its values cannot be noticed: save it again.",
        stacklevel=4,
    )
    return content


def _compare_copy(path: Path, content: Any) -> None:
    try:
        problem = "" if read_json(path) == content else "differs from it"
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({str(error).rstrip('.')})"
    if problem:
        warnings.warn(
            f"{path} is a copy of what {TENSORS} says, and {problem}: the graph is intact, save it again to renew the copy.",
            stacklevel=4,
        )
