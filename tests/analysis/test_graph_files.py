"""Graphs on disk: whole, proved, or refused in one sentence. Other types and lengths: ``tests/campaigns/damage_graphs.py``."""

from __future__ import annotations

import itertools
import json
import os
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.analysis.test_graph_result import by_hand
from tl_vpd.analysis.graph import AttributionGraph, LogitTarget
from tl_vpd.analysis.graph.files import _NEEDED


def same(one: AttributionGraph, other: AttributionGraph) -> bool:
    """Whether two graphs are equal, tensors bit for bit."""
    texts = ("words", "names", "logits", "settings")
    return all(getattr(one, n) == getattr(other, n) for n in texts) and all(
        torch.equal(getattr(one, n), getattr(other, n)) for n in _NEEDED
    )


def save_first_format(graph: AttributionGraph, folder: Path) -> Path:
    """What versions before checksums wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: getattr(graph, name).contiguous() for name in _NEEDED}, folder / "graph.safetensors")
    table = {
        "format_version": 1,
        "words": graph.words,
        "names": graph.names,
        "logits": [asdict(target) for target in graph.logits],
        "settings": graph.settings,
        "versions": {"torch": "2.6.0"},
    }
    (folder / "graph.json").write_text(json.dumps(table))
    return folder


def smaller() -> AttributionGraph:
    return by_hand().pruned(nodes=1)


def test_everything_is_read_from_the_proved_file(tmp_path):
    folder = by_hand().save(tmp_path / "graph")
    copy = folder / "graph.json"
    assert json.loads(copy.read_text())["words"] == ["a", "</b>"]
    copy.write_text(copy.read_text().replace("</b>", "b"))
    with pytest.warns(UserWarning, match=r"differs from it: the graph is intact, save it again to renew the copy\.$"):
        assert same(AttributionGraph.load(folder), by_hand())
    copy.unlink()
    with pytest.warns(UserWarning, match="does not exist"):
        assert same(AttributionGraph.load(folder), by_hand())


def test_graphs_of_the_first_format_load_and_say_that_they_cannot_be_proved(tmp_path):
    folder = save_first_format(by_hand(), tmp_path / "old")
    with pytest.warns(UserWarning, match="saved without checksums"):
        graph = AttributionGraph.load(folder)
    assert same(graph, by_hand())
    graph.save(folder)
    assert same(AttributionGraph.load(folder), by_hand())  # no warning: pytest turns one into an error


@pytest.mark.filterwarnings("ignore:The graph in")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", [0, 0, 1, 2, 3, 9], "kind of the graph reaches from 0 to 9"),
        ("kind", [0, 0, 2, 1, 3, 4], "ordered by kind"),
        ("kind", [0, 1, 1, 2, 3, 4], "one embedding for every token"),
        ("index", [7, 8, -4, 9, 0, 3], "index of the graph reaches from -4"),
        ("index", [7, 9, 4, 9, 0, 3], "one embedding for every token"),
        ("index", [7, 8, 4, 9, 0, 2], "not those of its logit targets"),
        ("pos", [0, 1, 2, 1, 1, 1], "pos of the graph reaches from 0 to 2"),
        ("source", [0, 1, 0, 2, 2, 3, 1, 77], "source of the graph reaches from 0 to 77"),
        ("target", [2, 2, 3, 2, 4, 4, 5, 5], "from an earlier kind of node"),
        ("source", [0, 0, 0, 2, 2, 3, 1, 4], "is there twice"),
        ("weight", [1.0, float("nan")] * 4, "4 of 8 entries that are NaN or infinite"),
        ("importance", [1.0, 1.0, 2.0, 1.0, 0.5, 1.0], "importances are in"),
    ],
)
def test_no_file_with_other_values_loads(tmp_path, name, value, message):
    folder = save_first_format(by_hand(), tmp_path / "graph")
    tensors = load_file(folder / "graph.safetensors")
    save_file({**tensors, name: torch.tensor(value)}, folder / "graph.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        AttributionGraph.load(folder)
    assert str(caught.value).startswith(str(folder)) and str(caught.value).endswith(".")


@pytest.mark.filterwarnings("ignore:The graph in")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": ["a"]}, "tokens has shape"),
        ({"words": "ab"}, "not lists"),
        ({"names": ["embed", "x", "x", "y", "logits"]}, "every site once"),
        ({"logits": []}, "not those of its logit targets"),
        ({"logits": [{"token": 3}]}, "a logit target has"),
        ({"logits": [{**asdict(LogitTarget(3, 1)), "probability": 1.5}]}, r"probability=1\.5"),
        ({"more": 1}, "its table has not the fields"),
        ({"format_version": 3}, "is of format 3"),
    ],
)
def test_no_table_with_other_fields_loads(tmp_path, change, message):
    folder = save_first_format(by_hand(), tmp_path / "graph")
    table = json.loads((folder / "graph.json").read_text())
    (folder / "graph.json").write_text(json.dumps({**table, **change}))
    with pytest.raises(ValueError, match=message):
        AttributionGraph.load(folder)


def test_a_graph_that_contradicts_itself_cannot_be_made():
    graph = by_hand()
    with pytest.raises(ValueError, match="logit targets"):
        replace(graph, logits=(*graph.logits, LogitTarget(4, 1, None, "y", 0.1)))
    twice = (LogitTarget(3, 1, None, "x", 0.5),) * 2
    again = torch.tensor([0, 1, 2, 3, 4, 5, 5])
    fields = {n: getattr(graph, n)[again] for n in ("kind", "index", "pos", "activation", "importance")}
    with pytest.raises(ValueError, match="The node logits:3@1 is there twice"):
        replace(graph, logits=twice, **fields)


@pytest.mark.filterwarnings("ignore:.*save it again to renew the copy")
def test_wherever_writing_stops_the_old_graph_or_the_new_one_loads(tmp_path, monkeypatch):
    old, new = by_hand(), smaller()
    results = []
    for operation, stop in itertools.product(("replace", "fsync", "open"), range(6)):
        folder = old.save(tmp_path / f"{operation}{stop}")
        original, calls = getattr(os, operation), itertools.count()

        def stopped(*arguments, _original=original, _calls=calls, _stop=stop, **options):
            if next(_calls) == _stop:
                raise KeyboardInterrupt
            return _original(*arguments, **options)

        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(os, operation, stopped)
            new.save(folder)
        loaded = AttributionGraph.load(folder)
        assert same(loaded, old) or same(loaded, new)
        assert {entry.name for entry in folder.iterdir()} == {"graph.safetensors", "graph.json"}
        results.append(same(loaded, old))
    assert any(results) and not all(results)
