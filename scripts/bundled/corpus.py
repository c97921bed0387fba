"""The text every Python has: the standard library's source, as token windows.

The files are split by *group*, so that near-copies are on one side only: two files are in one group when they share
more than a fifth of the smaller one's five-line shingles, or a folder of variations on a theme (``encodings/``).

    >>> training, validation = split(files())                        # doctest: +SKIP
    >>> stream = token_stream(train_tokenizer(training), validation)  # doctest: +SKIP

Left out: test folders (not every installation has them), installed packages, and files that are not ASCII or UTF-8.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt16
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
"""Folders of the standard library that are not in the corpus."""

ONE_GROUP = {"encodings", "msilib", "pydoc_data", "lib2to3"}
"""Folders whose files are variations of one another, or data written as Python."""

BOS = "<|endoftext|>"
VOCABULARY = 768

# One token never crosses from a word to punctuation, brackets stand alone, and a line's indentation stays in one piece.
PIECES = Regex(r"\n+[ ]*| ?[A-Za-z]+|[0-9]|_+|[()\[\]{}]| ?[^\sA-Za-z0-9_()\[\]{}]+|[ ]+|\s+")


def files(root: Path | None = None) -> list[Path]:
    """The ``.py`` files of the standard library, sorted by path (``root``: default, this Python's)."""
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = (p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))
    # Generated when Python was built: settings and paths of one machine, no source text.
    paths = (p for p in paths if not p.name.startswith("_sysconfigdata"))
    return sorted(p for p in paths if _text(p).strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def split(paths: list[Path], *, validation_share: float = 0.08) -> tuple[list[Path], list[Path]]:
    """Splits files into (training, validation), whole groups at a time.

    A group's side follows from a hash of its first file's name alone, so that a file keeps its side when others come
    and go with the Python version.
    """
    training: list[Path] = []
    validation: list[Path] = []
    for group in near_copies(paths):
        name = min(p.name for p in group)
        uniform = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
        (validation if uniform < validation_share else training).extend(group)
    return sorted(training), sorted(validation)


def near_copies(paths: list[Path], *, overlap: float = 0.2) -> list[list[Path]]:
    """Groups files that share more than ``overlap`` of the smaller one's five-line shingles (union-find)."""
    parent = {p: p for p in paths}

    def root(p: Path) -> Path:
        while parent[p] != p:
            p = parent[p]
        return p

    shingles = {p: _shingles(_text(p)) for p in paths}
    holders = defaultdict(list)
    for p, of_file in shingles.items():
        for s in of_file:
            holders[s].append(p)
    common: dict[tuple[Path, Path], int] = defaultdict(int)
    for owners in holders.values():
        for i, p in enumerate(owners[:20]):
            for q in owners[i + 1 : 20]:
                common[p, q] += 1
    for (p, q), n in common.items():
        if n > overlap * min(len(shingles[p]), len(shingles[q])):
            parent[root(q)] = root(p)
    by_folder: dict[str, Path] = {}
    for p in paths:
        for folder in ONE_GROUP & set(p.parts):
            parent[root(p)] = root(by_folder.setdefault(folder, p))
    groups = defaultdict(list)
    for p in paths:
        groups[root(p)].append(p)
    return list(groups.values())


def _shingles(text: str, lines: int = 5) -> set[int]:
    code = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return {hash("\n".join(code[i : i + lines])) for i in range(max(len(code) - lines + 1, 1))}


def train_tokenizer(paths: Iterable[Path], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the files; brackets are always separate tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_text(p) for p in paths), trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, paths: Iterable[Path]) -> UInt16[np.ndarray, " tokens"]:
    """All files as one array of token ids, a BOS before each."""
    bos = tokenizer.token_to_id(BOS)
    pieces = ([bos, *encoding.ids] for encoding in tokenizer.encode_batch([_text(p) for p in paths]))
    return np.concatenate([np.asarray(ids, dtype=np.uint16) for ids in pieces])


def windows(stream: UInt16[np.ndarray, " tokens"], length: int, n: int, seed: int) -> UInt16[np.ndarray, "n length"]:
    """``n`` random windows of the stream, each opened by BOS as TransformerLens opens a prompt."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(stream) - length, size=n)
    rows = stream[starts[:, None] + np.arange(length)]
    rows[:, 0] = stream[0]
    return rows


def batches(
    stream: UInt16[np.ndarray, " tokens"], length: int, batch: int, seed: int
) -> Iterator[UInt16[np.ndarray, "batch length"]]:
    """Endless batches of random windows."""
    for i in range(1 << 62):
        yield windows(stream, length, batch, seed + i)


NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""A Python identifier (keywords included)."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer trained into ``folder``."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
