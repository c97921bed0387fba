from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts.bundled import corpus


def write(folder: Path, name: str, lines: list[str]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    body = [f"value_{i} = compute({i})" for i in range(40)]
    write(tmp_path, "one.py", body)
    write(tmp_path, "two.py", [*body[:30], "extra = 1"])
    write(tmp_path, "other.py", [f"print({i} + len(names))" for i in range(40)])
    write(tmp_path, "encodings/a.py", ["codec = 'a'"] * 9)
    write(tmp_path, "encodings/b.py", ["table = {}"] * 9)
    write(tmp_path, "test/test_one.py", body)
    write(tmp_path, "_sysconfigdata__linux.py", ["build_time_vars = {'prefix': '/usr'}"])
    write(tmp_path, "empty.py", [""])
    return tmp_path


def test_files_leave_out_tests_and_empty_ones(tree: Path):
    names = [p.relative_to(tree).as_posix() for p in corpus.files(tree)]
    assert names == ["encodings/a.py", "encodings/b.py", "one.py", "other.py", "two.py"]


def test_near_copies_are_one_group(tree: Path):
    groups = {frozenset(p.name for p in group) for group in corpus.near_copies(corpus.files(tree))}
    assert groups == {frozenset({"one.py", "two.py"}), frozenset({"a.py", "b.py"}), frozenset({"other.py"})}


def test_split_keeps_groups_whole_and_files_on_their_side(tree: Path):
    paths = corpus.files(tree)
    training, validation = corpus.split(paths, validation_share=0.5)
    assert sorted(training + validation) == paths
    side = {p.name: p in training for p in paths}
    assert side["one.py"] == side["two.py"]
    assert side["a.py"] == side["b.py"]
    fewer = [p for p in paths if p.name != "other.py"]
    again, _ = corpus.split(fewer, validation_share=0.5)
    assert [p in again for p in fewer] == [side[p.name] for p in fewer]


def test_brackets_are_tokens_and_text_comes_back(tree: Path):
    tokenizer = corpus.train_tokenizer(corpus.files(tree), vocabulary=300)
    text = "def f(x):\n    return [x, {'é': (1, 2)}]\n"
    tokens = tokenizer.encode(text).tokens
    assert [t for t in tokens if t in "()[]{}"] == list("()[{()}]")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_windows_open_with_bos_and_follow_the_seed():
    stream = np.arange(1000, dtype=np.uint16)
    rows = corpus.windows(stream, 16, 8, seed=1)
    assert (rows[:, 0] == stream[0]).all()
    assert (np.diff(rows[:, 1:].astype(int)) == 1).all()
    assert (rows == corpus.windows(stream, 16, 8, seed=1)).all()
    assert (rows != corpus.windows(stream, 16, 8, seed=2)).any()
