"""A tensor file proves what it holds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tl_vpd.files.tensor_file import CONTENT, DTYPES, open_tensors, write_tensors

CONTENT_OF_FILE = {"sites": ["blocks.0.attn.W_Q"], "C": 3, "α": 0.5}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "V": torch.randn(7, 5, generator=generator).T,  # not contiguous
        "half": torch.randn(3, generator=generator).bfloat16(),
        "count": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4, dtype=torch.float64),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors(), CONTENT_OF_FILE)
    return path


def read(path: Path) -> tuple[object, dict[str, Tensor]]:
    with open_tensors(path) as file:
        return file.content, {key: file.read(key) for key in file.shapes}


def same(result: tuple[object, dict[str, Tensor]]) -> bool:
    content, values = result
    return content == CONTENT_OF_FILE and all(
        torch.equal(values[key], t) and values[key].dtype == t.dtype for key, t in tensors().items()
    )


def test_reads_what_was_written(path):
    assert same(read(path))
    with open_tensors(path) as file:
        assert file.shapes["V"] == (5, 7)
        assert file.dtypes["half"] == torch.bfloat16
    assert torch.equal(load_file(path)["V"], tensors()["V"])  # and any other program can


def test_the_file_is_one_of_safetensors(path, tmp_path):
    """Types in an order in which all are aligned, and one header length; the library reads what it would have written."""
    values = {str(dtype): torch.arange(3).to(dtype) for dtype in DTYPES.values()}
    write_tensors(path, values, None)
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[key], t) and loaded[key].dtype == t.dtype for key, t in values.items())
    with pytest.raises(TypeError, match=r"x is of torch\.complex64: store it as"):
        write_tensors(path, {"x": torch.zeros(1, dtype=torch.complex64)}, None)


def test_every_flipped_byte_is_refused(path, tmp_path):
    whole, rng, damaged = path.read_bytes(), random.Random(0), tmp_path / "damaged.safetensors"
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << rng.randrange(8)
        damaged.write_bytes(changed)
        with pytest.raises(ValueError, match=r"damaged|not an intact"):
            read(damaged)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_cut_file_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="not an intact safetensors file"):
        read(path)


def test_another_programs_file_has_no_content(tmp_path):
    save_file(tensors_of_others := {"x": torch.ones(2)}, tmp_path / "x.safetensors")
    content, values = read(tmp_path / "x.safetensors")
    assert content is None
    assert torch.equal(values["x"], tensors_of_others["x"])


def test_a_header_is_not_quoted_at_length(tmp_path):
    header = ('{"__metadata__": "' + "y" * 5_000 + '"}').encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with (
        pytest.raises(ValueError, match="not an intact safetensors file") as refused,
        open_tensors(tmp_path / "x.safetensors"),
    ):
        pass
    assert len(str(refused.value)) < 300 + len(str(tmp_path))


def test_swapped_tensors_are_refused(path, tmp_path):
    """Digests cover keys, so that two tensors of one shape cannot change places."""
    pair = {"a": torch.zeros(2), "b": torch.ones(2)}
    write_tensors(path, pair, None)
    with open_tensors(path) as file:
        metadata = file.metadata
    assert CONTENT in metadata
    save_file({"a": pair["b"], "b": pair["a"]}, tmp_path / "swapped.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="a is damaged"):
        read(tmp_path / "swapped.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_written(path, bad):
    with pytest.raises(ValueError, match="V holds values that are NaN or infinite"):
        write_tensors(path, {"V": torch.tensor([1.0, bad])}, None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_tensors(path, {"V": torch.ones(1)}, {"loss": bad})
    assert same(read(path))


def test_a_file_that_is_cut_while_it_is_open_is_an_error_and_not_the_end_of_the_process(path):
    write_tensors(path, {"a": torch.ones(100_000), "b": torch.ones(100_000)}, None)
    with open_tensors(path) as file:
        assert file.read("a").sum() == 100_000
        path.write_bytes(path.read_bytes()[:500_000])  # the same file, shorter
        with pytest.raises(ValueError, match="b is cut short: the file changed while it was read"):
            file.read("b")


def test_a_file_that_is_replaced_while_it_is_open_is_read_as_it_was(path):
    with open_tensors(path) as file:
        write_tensors(path, {"V": torch.zeros(5, 7)}, None)
        assert torch.equal(file.read("V"), tensors()["V"])


def test_types_that_are_not_read_are_named(tmp_path):
    save_file({"x": torch.ones(2, dtype=torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with open_tensors(tmp_path / "x.safetensors") as file, pytest.raises(ValueError, match="x is of type F8_E4M3"):
        file.read("x")
