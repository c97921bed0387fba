"""A path holds the old content or the new one."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tl_vpd.files.atomic import make_folder, write_file, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence(tmp_path):
    def full(temporary: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left .* for x.json: nothing was written; make room") as new:
        write_file(tmp_path / "x.json", full)
    assert new.value.errno == errno.ENOSPC
    write_text(tmp_path / "x.json", "old")
    with pytest.raises(OSError, match=r"the older x.json is intact; make room"):
        write_file(tmp_path / "x.json", full)


def test_leftovers_of_dead_processes_are_cleared(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    leftover = tmp_path / f".x.json.{platform.node()}.{dead.stdout.strip()}-0.tmp"
    at_work = tmp_path / f".x.json.{platform.node()}.{os.getppid()}-0.tmp"
    elsewhere = tmp_path / f".x.json.another-machine.{dead.stdout.strip()}-0.tmp"
    for file in (leftover, at_work, elsewhere):
        file.write_text("half")
    write_text(tmp_path / "x.json", "new")
    assert not leftover.exists()
    assert at_work.exists()
    assert elsewhere.exists()


def test_a_link_is_followed(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_path_with_a_zero_byte_is_named(tmp_path):
    for write in (lambda path: write_text(path, "x"), make_folder):
        with pytest.raises(ValueError, match=r"nul\\x00' is not a path: it contains a zero byte\."):
            write(tmp_path / "nul\0")


def test_folders_pipes_and_files_in_the_way_are_named(tmp_path):
    with pytest.raises(OSError, match=r"is a folder: give the path of a file\."):
        write_text(tmp_path, "x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"is not an ordinary file: give the path of a file\."):
        write_text(tmp_path / "pipe", "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="is a file, a folder is needed"):
        write_text(tmp_path / "file" / "x.json", "x")
    with pytest.raises(OSError, match="does not exist, a folder is needed"):
        write_text(tmp_path / "missing" / "x.json", "x")
    with pytest.raises(NotADirectoryError, match="is a file and a folder is needed"):
        make_folder(tmp_path / "file" / "deeper" / "still")


def test_threads_write_one_file_at_the_same_time(tmp_path):
    texts = [str(i) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            list(pool.map(lambda text: write_text(tmp_path / "x.json", text), texts))
            assert (tmp_path / "x.json").read_text() in texts
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_who_may_read_a_file_is_as_for_any_other(tmp_path):
    def private(temporary: Path) -> None:
        temporary.write_text("new")
        temporary.chmod(0o600)

    (tmp_path / "any").touch()
    write_file(tmp_path / "new", private)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "any").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    write_file(tmp_path / "new", private)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
