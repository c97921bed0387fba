"""Damaged decompositions: bytes and fields changed, files mixed, and savings killed at every line."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.campaigns.counts import Budget, Counts
from tests.tiny import decomposition_of, tiny_model
from tl_vpd import Decomposition
from tl_vpd.components.format_1 import sha256_of
from tl_vpd.components.storage import CONFIG, TENSORS
from tl_vpd.files.tensor_file import open_tensors, write_tensors

TRIED = """A saved decomposition is damaged (bytes of every region of both files flipped, zeroed, cut, doubled; fields of
config.json and of the header changed; files mixed with another decomposition's) and loaded: it must give bit-equal importances or
be refused in one sentence. A process that saves over an older decomposition is killed at any line: the folder must load as the
old or the new one, and the next save must clear what is left."""
SHORT, LONG = Budget(400, 50), Budget(20_000, 540)

SLOW = 20.0
"""Seconds of one load that count as hanging."""
RAW = {"long": "9" * 5_000, "deep": "[" * 5_000 + "]" * 5_000, "nan": "NaN", "infinite": "1e999"}
"""Values that Python's JSON does not write."""
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 3.5, "", "x", [], {}, [[1]], {"a": 1}, 10**9, 10**30, -(10**9), *RAW)


@dataclass
class Known:
    """What a decomposition must give."""

    importances: Tensor
    facts: tuple[Any, ...]

    @classmethod
    def of(cls, vpd: Decomposition) -> Known:
        generator = torch.Generator().manual_seed(0)
        inputs = {name: torch.randn(2, 5, site.d_in, generator=generator) for name, site in vpd.sites.items()}
        with torch.no_grad():
            g = vpd.importances(inputs)
        return cls(
            g, (list(vpd.sites.values()), vpd.counts, vpd.gamma_config, vpd.fingerprints, json.dumps(vpd.record))
        )

    def equals(self, other: Known) -> bool:
        return torch.equal(self.importances, other.importances) and self.facts == other.facts


def judge(folder: Path, right: list[Known], counts: Counts, what: str) -> Known | None:
    """Loads the folder and counts the outcome.

    Args:
        folder: of the decomposition.
        right: what it may be.
        counts: where the outcome is counted.
        what: was done, for a failure's example.
    """
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            loaded = Known.of(Decomposition.load(folder))
        except Exception as error:  # every exception is judged
            counts.add_error(error, what)
            return None
    if time.monotonic() - start > SLOW:
        counts.add("hung", f"{what}: {time.monotonic() - start:.0f} seconds")
    elif any(loaded.equals(known) for known in right):
        counts.add("warned and right" if said else "right")
    else:
        counts.add("silent", what)
    return loaded


class Damage:
    """Folders of two decompositions of the same shapes, and ways to damage a copy of the first."""

    def __init__(self, place: Path, gamma: dict[str, Any]) -> None:
        model = tiny_model(torch.float32)
        self.place, self.copy = place, place / "copy"
        self.folders = [place / "one", place / "other", place / "older"]
        several = [decomposition_of(model, seed=seed, gamma=gamma) for seed in (0, 1)]
        for vpd, folder in zip(several, self.folders, strict=False):
            vpd.save(folder)
        self.folders[2].mkdir()
        _write_format_1(several[0], self.folders[2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.known = [Known.of(Decomposition.load(folder)) for folder in self.folders]

    def start(self, which: int = 0) -> None:
        """An undamaged copy."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.folders[which], self.copy)

    def bytes_of_tensors(self, rng: random.Random, counts: Counts, what: str) -> None:
        """Bytes of the tensor file, in either format."""
        which = rng.choice([0, 0, 0, 2])
        self.start(which)
        path = self.copy / TENSORS
        whole = path.read_bytes()
        path.write_bytes(_damaged(whole, rng, _position(whole, rng)))
        judge(self.copy, [self.known[which]], counts, f"{what}, format {2 - which // 2}")

    def bytes_of_config(self, rng: random.Random, counts: Counts, what: str) -> None:
        """Bytes of config.json."""
        self.start()
        whole = (self.copy / CONFIG).read_bytes()
        (self.copy / CONFIG).write_bytes(_damaged(whole, rng, rng.randrange(len(whole))))
        judge(self.copy, self.known[:1], counts, what)

    def field_of_config(self, rng: random.Random, counts: Counts, what: str) -> None:
        """A field of config.json."""
        self.start()
        path = self.copy / CONFIG
        path.write_text(_changed(json.loads(path.read_text()), rng), encoding="utf-8")
        judge(self.copy, self.known[:1], counts, what)

    def field_of_header(self, rng: random.Random, counts: Counts, what: str) -> None:
        """A field of the header's content, with right digests: somebody wrote it so, which may be another decomposition."""
        self.start()
        path = self.copy / TENSORS
        with open_tensors(path) as file:
            content = file.content
        try:
            changed = json.loads(_changed(content, rng))
            write_tensors(path, load_file(path), changed)
        except (ValueError, RecursionError):  # such a header cannot be written
            counts.add("refused")
            return
        ours = Counts()
        judge(self.copy, self.known[:1], ours, what)
        if ours.outcomes["silent"]:
            ours = Counts()
            ours.add("another decomposition, proved")
        counts.merge(ours)

    def mixed(self, rng: random.Random, counts: Counts, what: str) -> None:
        """Files, headers and tensors of two decompositions."""
        self.start()
        mine, theirs = self.copy / TENSORS, self.folders[1] / TENSORS
        way = rng.choice(["file", "config", "header", "tensor", "swap", "none"])
        if way == "file":
            shutil.copy(theirs, mine)
        elif way == "config":
            shutil.copy(self.folders[rng.choice([1, 2])] / CONFIG, self.copy / CONFIG)
        elif way == "header":
            head, data = _split(theirs.read_bytes()), _split(mine.read_bytes())
            mine.write_bytes(head[0] + data[1])
        elif way in ("tensor", "swap"):
            tensors, others = load_file(mine), load_file(theirs)
            key = rng.choice([key for key, t in tensors.items() if not torch.equal(t, others[key])])
            same = [
                k
                for k in tensors
                if tensors[k].shape == tensors[key].shape and not torch.equal(tensors[k], tensors[key])
            ]
            if way == "tensor" or not same:
                tensors[key] = others[key]
            else:
                other = rng.choice(same)
                tensors[key], tensors[other] = tensors[other], tensors[key]
            with open_tensors(mine) as file:
                metadata = file.metadata
            save_file(tensors, mine, metadata=metadata)
        elif way == "none":
            (self.copy / rng.choice([CONFIG, TENSORS])).unlink()
        judge(self.copy, [self.known[1] if way == "file" else self.known[0]], counts, f"{what}, {way}")

    def killed(self, rng: random.Random, counts: Counts, what: str) -> None:
        """A process that saves the second over the first is killed at a line of the code that writes."""
        first = rng.choice([0, 2])
        self.start(first)
        vpd, line = Decomposition.load(self.folders[1]), rng.randrange(1, self.lines())
        finished = _save_until(vpd, self.copy, line)
        what = f"{what}, killed at line {line}"
        judged = Counts()
        loaded = judge(self.copy, [self.known[first], self.known[1]], judged, what)
        if loaded is None or judged.failures:
            counts.add("silent", f"{what}: loads neither the old nor the new one: {judged.report()}")
            return
        vpd.save(self.copy)
        if sorted(entry.name for entry in self.copy.iterdir()) != [CONFIG, TENSORS]:
            counts.add("left behind", f"{what}: {[entry.name for entry in self.copy.iterdir()]}")
        else:
            old = loaded.equals(self.known[first])
            counts.add("saved" if finished else "killed, the old one" if old else "killed, the new one")

    def lines(self) -> int:
        """How many lines a saving has."""
        if not hasattr(self, "_lines"):
            vpd, place = Decomposition.load(self.folders[1]), self.place / "count"
            shutil.copytree(self.folders[0], place)
            low, high = 1, 1 << 14
            while low < high:  # the first line number that is not reached
                middle = (low + high) // 2
                low, high = (low, middle) if _save_until(vpd, place, middle) else (middle + 1, high)
            self._lines = low
        return self._lines


def run(budget: Budget, seed: int) -> Counts:
    """The campaign."""
    counts = Counts()
    torch.set_num_threads(1)
    kinds = ({"d_ci": 8, "n_blocks": 1, "n_heads": 2}, {"kind": "chunked_transformers", "d_ci": 8, "n_heads": 2, "chunk": 5},
             {"kind": "per_subcomponent_mlps", "hidden": 3}, {"kind": "per_site_mlps", "hidden": 3})  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        several: dict[int, Damage] = {}
        for i in budget.tries_left():
            rng = random.Random(f"{seed}:{i}")
            kind = i % len(kinds) if budget.tries > 1_000 else 0
            if kind not in several:
                (Path(place) / str(kind)).mkdir()
                several[kind] = Damage(Path(place) / str(kind), kinds[kind])
            damage = several[kind]
            ways: list[Callable[[random.Random, Counts, str], None]] = [
                damage.bytes_of_tensors, damage.bytes_of_tensors, damage.bytes_of_config, damage.field_of_config,
                damage.field_of_header, damage.mixed, damage.killed, damage.killed,
            ]  # fmt: skip
            way = rng.choice(ways)
            way(rng, counts, f"seed {seed}, try {i}, {way.__name__}")
    return counts


def _write_format_1(vpd: Decomposition, folder: Path) -> None:
    save_file(vpd.file_tensors(), folder / TENSORS)
    config = {
        "format_version": 1,
        "sites": [asdict(site) for site in vpd.sites.values()],
        "C": vpd.counts,
        "gamma": vpd.gamma_config.model_dump(),
        "fingerprints": {name: f.model_dump() for name, f in vpd.fingerprints.items()},
        "sha256": sha256_of(folder / TENSORS),
        **vpd.record,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def _split(whole: bytes) -> tuple[bytes, bytes]:
    """A safetensors file's length and header, and its data."""
    end = 8 + int.from_bytes(whole[:8], "little")
    return whole[:end], whole[end:]


def _position(whole: bytes, rng: random.Random) -> int:
    """A byte of the length, of the header's start, content, digest or end, or of a tensor: each as likely."""
    head, _ = _split(whole)
    header = json.loads(head[8:])
    content = head.find(b'"tl_vpd"')
    digest = head.find(b'"tl_vpd_sha256"')
    regions = [(0, 8), (8, 40), (len(head) - 60, len(head))]
    if content >= 0:
        regions += [(content, content + 40), (content, digest), (digest, digest + 90)]
    tensors = [entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"]
    start, end = rng.choice([*regions, *[(len(head) + a, len(head) + b) for a, b in rng.sample(tensors, 4)]])
    return rng.randrange(start, end)


def _damaged(whole: bytes, rng: random.Random, at: int) -> bytes:
    """The bytes, damaged at a position."""
    run = rng.choice([1, 1, 2, 8, 64, 4096])
    way = rng.choice(["flip", "flip", "flip", "byte", "zero", "cut", "double", "remove", "swap", "append", "empty"])
    before, there, after = whole[:at], whole[at : at + run], whole[at + run :]
    if way == "flip":
        return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
    if way == "byte":
        return whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :]
    if way == "empty":
        return b""
    return {
        "zero": before + bytes(len(there)) + after,
        "cut": before,
        "double": before + there + there + after,
        "remove": before + after,
        "swap": before + after[:run] + there + after[run:],
        "append": whole + there,
    }[way]


def _changed(content: Any, rng: random.Random) -> str:
    """JSON text in which one field has another value, is missing, is renamed, is there twice or has a new one beside it."""
    paths: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            paths.append((node, key))
            walk(value)

    walk(content)
    top = [path for path in paths if path[0] is content or path[1] in ("norm", "n_heads", "d_in", "d_ci")]
    node, key = rng.choice(rng.choice([paths, top]))
    way = rng.choice(["value", "value", "value", "missing", "extra", "renamed", "twice"])
    value = rng.choice(VALUES)
    if isinstance(node[key], int | float) and not isinstance(node[key], bool) and rng.random() < 0.3:
        value = rng.choice([node[key] + 1, node[key] * 2, -node[key]])
    if way == "missing" or (way == "renamed" and isinstance(node, list)):
        del node[key]
    elif way == "renamed":
        node[f"{key}_"] = node.pop(key)
    elif way == "extra":
        node.append(value) if isinstance(node, list) else node.update({f"{key}_": value})
    elif way == "twice" and isinstance(node, dict):
        node["@@twice@@"] = value
    else:
        node[key] = value
    text = json.dumps(content, indent=rng.choice([None, 1]))
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw, 1)
    return text.replace('"@@twice@@"', json.dumps(str(key)))


def _save_until(vpd: Decomposition, folder: Path, line: int) -> bool:
    """Saves in a process that ends, as if killed, at the n-th line of the code that writes; whether it came to its end.

    A lock that another thread had when the process was forked is never released in it: a process that waits for one is
    killed there.
    """
    child = os.fork()
    if child == 0:
        left = line

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            left -= event == "line"
            if left <= 0:
                os._exit(9)
            return local

        def enter(frame: FrameType, event: str, argument: Any) -> Any:
            name = frame.f_code.co_filename
            writes = "/tl_vpd/files/" in name or name.endswith(("components/storage.py", "pathlib.py"))
            return local if writes else None

        try:
            sys.settrace(enter)
            vpd.save(folder)
            sys.settrace(None)
            os._exit(0)
        finally:
            os._exit(3)
    end = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(ended[1])
    assert code in (0, 9, -signal.SIGKILL), f"the saving failed by itself: {code}"
    return code == 0
