"""Damaged graphs: bytes and fields changed, tensors of other types and lengths, folders mixed, savings killed at every line."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.analysis.test_graph_files import same, save_first_format
from tests.analysis.test_graph_result import by_hand
from tests.campaigns.counts import Budget, Counts
from tests.campaigns.damage_decomposition import _changed, _damaged, _position, _save_until
from tl_vpd.analysis.graph import AttributionGraph
from tl_vpd.files.tensor_file import open_tensors, write_tensors

TRIED = """A saved attribution graph of either format is damaged (bytes of both files, fields of the table, values,
types and lengths of tensors, files mixed with another graph's) and loaded: it must be bit-equal, be refused in one sentence, or,
where its format has no checksums, be loaded with the warning that says so. A process that saves over an older graph is killed at
any line: the folder must load as the old or the new one."""
SHORT, LONG = Budget(500, 30), Budget(20_000, 400)

TENSORS, TABLE = "graph.safetensors", "graph.json"
LINES = 1_600
"""A little more than the lines of a saving."""
UNPROVED = "saved without checksums"


def judge(folder: Path, right: list[AttributionGraph], counts: Counts, what: str) -> AttributionGraph | None:
    """Loads the folder and counts the outcome.

    Args:
        folder: of the graph.
        right: what it may be.
        counts: where the outcome is counted.
        what: was done, for a failure's example.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            loaded = AttributionGraph.load(folder)
            loaded.influence, loaded.nodes(), loaded.paths(k=3)  # what was accepted can be asked
        except Exception as error:  # every exception is judged
            counts.add_error(error, what)
            return None
    unproved = any(UNPROVED in str(warning.message) for warning in said)
    if any(same(loaded, graph) for graph in right):
        counts.add("warned and right" if said else "right")
    else:
        counts.add("loaded and said that it is not proved" if unproved else "silent", what)
    return loaded


class Damage:
    """Folders of two graphs, in both formats, and ways to damage a copy."""

    def __init__(self, place: Path) -> None:
        self.copy = place / "copy"
        self.graphs = [by_hand(), by_hand().pruned(nodes=2)]
        self.folders = {
            (which, version): place / f"{which}-{version}" for which in range(len(self.graphs)) for version in (1, 2)
        }
        for (which, version), folder in self.folders.items():
            graph = self.graphs[which]
            graph.save(folder) if version == 2 else save_first_format(graph, folder)

    def start(self, version: int) -> None:
        """An undamaged copy of the first graph."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.folders[0, version], self.copy)

    def bytes_of_a_file(self, rng: random.Random, counts: Counts, what: str) -> None:
        """Bytes of either file, in either format."""
        version, name = rng.choice([1, 2, 2]), rng.choice([TENSORS, TENSORS, TABLE])
        self.start(version)
        whole = (self.copy / name).read_bytes()
        at = _position(whole, rng) if name == TENSORS else rng.randrange(len(whole))
        (self.copy / name).write_bytes(_damaged(whole, rng, at))
        judge(self.copy, self.graphs[:1], counts, f"{what}, format {version}, {name}")

    def field(self, rng: random.Random, counts: Counts, what: str) -> None:
        """A field of the table that is read: of graph.json in format 1, of the header with right digests in format 2."""
        version = rng.choice([1, 2])
        self.start(version)
        text = _changed(json.loads((self.copy / TABLE).read_text()), rng)
        if version == 1:
            (self.copy / TABLE).write_text(text, encoding="utf-8")
            judge(self.copy, self.graphs[:1], counts, what)
            return
        try:
            content = json.loads(text)
            write_tensors(self.copy / TENSORS, load_file(self.copy / TENSORS), content)
        except (ValueError, RecursionError):  # such a header cannot be written
            counts.add("refused")
            return
        self._proved(counts, what)

    def tensor(self, rng: random.Random, counts: Counts, what: str) -> None:
        """A tensor of another type, length or value; in format 2 with right digests, or with those of the graph."""
        version = rng.choice([1, 2])
        self.start(version)
        path = self.copy / TENSORS
        with open_tensors(path) as file:
            content, metadata = file.content, file.metadata
        tensors = load_file(path)
        name = rng.choice(list(tensors))
        t = tensors[name]
        way = rng.choice(["type", "longer", "shorter", "flat", "value", "missing", "extra"])
        if way == "missing":
            del tensors[name]
        elif way == "extra":
            tensors[rng.choice(["deltas", "other"])] = t.clone()
        else:
            index, value = rng.randrange(len(t)), rng.choice([-1, 0, 1, 2, 7, 1e9, float("nan"), float("inf")])
            usable = t.is_floating_point() or abs(value) < float("inf")
            changed = t.clone()
            changed[index] = value if usable else 0
            tensors[name] = {
                "type": t.to(rng.choice([torch.int64, torch.float32, torch.bool, torch.uint8, torch.float16])),
                "longer": torch.cat([t, t[:1]]),
                "shorter": t[:-1],
                "flat": t[None],
                "value": changed,
            }[way]
        what = f"{what}, format {version}, {name}, {way}"
        if version == 1 or rng.random() < 0.5:
            save_file(tensors, path, metadata=metadata or None)
            judge(self.copy, self.graphs[:1], counts, what)
            return
        try:
            write_tensors(path, tensors, content)
        except ValueError:  # NaN and infinite values are not written
            counts.add("refused")
            return
        self._proved(counts, what)

    def mixed(self, rng: random.Random, counts: Counts, what: str) -> None:
        """A file of another graph or format, or none."""
        version = rng.choice([1, 2])
        self.start(version)
        name, other = rng.choice([TENSORS, TABLE]), self.folders[rng.choice([(0, 1), (0, 2), (1, 1), (1, 2)])]
        if rng.random() < 0.2:
            (self.copy / name).unlink()
        else:
            shutil.copy(other / name, self.copy / name)
        judge(self.copy, self.graphs, counts, f"{what}, format {version}, {name} of {other.name}")

    def killed(self, rng: random.Random, counts: Counts, what: str) -> None:
        """A process that saves the second graph over the first is killed at a line of the code that writes."""
        self.start(rng.choice([1, 2]))
        line = rng.randrange(1, LINES)
        finished = _save_until(self.graphs[1], self.copy, line)
        judged = Counts()
        loaded = judge(self.copy, self.graphs, judged, what)
        if loaded is None or judged.failures or judged.outcomes["loaded and said that it is not proved"]:
            counts.add("silent", f"{what}, line {line}: neither the old nor the new one: {judged.report()}")
            return
        self.graphs[1].save(self.copy)
        entries = sorted(entry.name for entry in self.copy.iterdir())
        if entries != [TABLE, TENSORS]:
            counts.add("left behind", f"{what}, line {line}: {entries}")
            return
        old = same(loaded, self.graphs[0])
        counts.add("saved" if finished else "killed, the old one" if old else "killed, the new one")

    def _proved(self, counts: Counts, what: str) -> None:
        """Judges a file whose digests are right: somebody wrote it so, and another graph than ours is one too."""
        judged = Counts()
        judge(self.copy, self.graphs[:1], judged, what)
        if judged.outcomes["silent"]:
            judged = Counts()
            judged.add("another graph, proved")
        counts.merge(judged)


def run(budget: Budget, seed: int) -> Counts:
    """The campaign."""
    counts = Counts()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        damage = Damage(Path(place))
        ways = [
            damage.bytes_of_a_file,
            damage.bytes_of_a_file,
            damage.field,
            damage.tensor,
            damage.mixed,
            damage.killed,
        ]
        for i in budget.tries_left():
            rng = random.Random(f"{seed}:{i}")
            way = rng.choice(ways)
            way(rng, counts, f"seed {seed}, try {i}, {way.__name__}")
    return counts
