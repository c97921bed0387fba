"""The order of batches follows from seed and step alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import closing

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import GAMMA, tiny_model
from tl_vpd import SavingConfig, VPDConfig, bundled, decompose
from tl_vpd.training.data import batches_of
from tl_vpd.training.data.mapped_rows import MappedRows
from tl_vpd.training.data.token_batches import TokenBatches


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 100), st.data())
def test_an_epoch_takes_every_row_at_most_once_and_steps_can_be_asked_for_in_any_order(n, batch, seed, data):
    batch = min(batch, n)
    tokens = torch.arange(n)[:, None].repeat(1, 3)
    batches = TokenBatches(tokens, batch, seed)
    per_epoch = n // batch
    epochs = [[batches.at(e * per_epoch + i) for i in range(per_epoch)] for e in range(3)]
    for epoch in epochs:
        rows = torch.cat(epoch)[:, 0].tolist()
        assert len(rows) == len(set(rows)) == per_epoch * batch and set(rows) <= set(range(n))
        assert all(part.shape == (batch, 3) for part in epoch)
    step = data.draw(st.integers(0, 3 * per_epoch - 1))
    fresh = TokenBatches(tokens, batch, seed).at(step)
    assert torch.equal(fresh, epochs[step // per_epoch][step % per_epoch])
    assert torch.equal(batches.at(step), fresh)


def test_epochs_and_seeds_differ():
    tokens = torch.arange(50)[:, None]
    one, other = TokenBatches(tokens, 50, 0), TokenBatches(tokens, 50, 1)
    assert not torch.equal(one.at(0), one.at(1)) and not torch.equal(one.at(0), other.at(0))
    assert not torch.equal(one.at(1), other.at(0))


def test_rows_of_a_smaller_integer_type_come_out_as_long():
    assert TokenBatches(torch.ones(2, 3, dtype=torch.int16), 2, 0).at(0).dtype == torch.int64


def test_fewer_rows_than_a_batch_takes_are_refused():
    with pytest.raises(ValueError, match="There are 3 rows of tokens and batch_size is 4: give more rows"):
        TokenBatches(torch.zeros(3, 2, dtype=torch.long), 4, 0)


def test_a_memory_mapped_file_is_read_row_by_row_in_the_tensors_order(tmp_path):
    tokens = np.arange(60, dtype=np.uint16).reshape(20, 3)
    np.save(tmp_path / "tokens.npy", tokens)
    mapped = batches_of(np.load(tmp_path / "tokens.npy", mmap_mode="r"), 4, seed=3)
    plain = TokenBatches(torch.from_numpy(tokens.astype(np.int64)), 4, seed=3)
    with closing(mapped):
        for step in (*range(12), 3, 4):
            found = mapped.at(step)
            assert torch.equal(found, plain.at(step)) and found.dtype == torch.int64
    assert mapped.describe()["rows"] == 20 and mapped.context == 3
    other = tokens.copy()
    other[19, 0] = 7
    np.save(tmp_path / "other.npy", other)
    assert batches_of(np.load(tmp_path / "other.npy", mmap_mode="r"), 4, 3).describe() != mapped.describe()


def rows(n=10):
    return [torch.arange(3) + 100 * i for i in range(n)]


@pytest.mark.parametrize(
    "data",
    [rows(), [r.tolist() for r in rows()], [{"tokens": r} for r in rows()], [{"input_ids": r.numpy()} for r in rows()]],
)
def test_rows_that_come_one_by_one_keep_their_order_over_epochs_and_after_resuming(data):
    with closing(batches_of(data, 4, seed=0)) as batches:
        found = [batches.at(step)[:, 0].div(100, rounding_mode="floor").tolist() for step in range(6)]
    assert [i for batch in found for i in batch] == [i % 10 for i in range(24)]
    with closing(batches_of(data, 4, seed=0)) as again:
        assert again.at(4)[:, 0].div(100, rounding_mode="floor").tolist() == found[4]
        assert again.at(5)[:, 0].div(100, rounding_mode="floor").tolist() == found[5]


def test_rows_are_fetched_ahead_and_the_thread_ends():
    recorded = []

    class Slow:
        def __iter__(self):
            for row in rows(100):
                recorded.append(int(row[0]))
                yield row

    before = threading.active_count()
    batches = batches_of(Slow(), 4, seed=0)
    batches.at(0)
    deadline = time.monotonic() + 10
    while len(recorded) < 4 * 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 4 * 4 <= len(recorded) <= 1 + 4 * 7  # a few batches ahead, and no more
    batches.close()
    assert threading.active_count() == before


def test_an_error_while_fetching_is_raised_at_the_step_that_needs_it():
    class Broken:
        def __iter__(self):
            yield from rows(4)
            raise OSError("the disk is gone")

    with closing(batches_of(Broken(), 4, seed=0)) as batches:
        batches.at(0)
        with pytest.raises(OSError, match="the disk is gone"):
            batches.at(1)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((r for r in rows()), ValueError, "read only once"),
        ([], ValueError, "no rows"),
        ([{"text": "x"}], ValueError, "A row has text"),
        ([torch.zeros(3)], ValueError, r"float32 of shape \(3,\)"),
        (3, TypeError, "The data is a int"),
        (np.zeros((2, 2, 2), dtype=np.int64), ValueError, r"rows \[n, pos\]"),
    ],
)
def test_what_holds_no_rows_of_tokens_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        batches_of(data, 1, seed=0)


def test_a_shorter_row_is_refused():
    with (
        closing(batches_of([torch.arange(3), torch.arange(2)], 2, seed=0)) as batches,
        pytest.raises(ValueError, match="fewer"),
    ):
        batches.at(0)


def test_datasets_of_tokens_and_of_text_streamed_or_not():
    tokenizer = bundled.model().tokenizer
    tokens = datasets.Dataset.from_dict({"tokens": [r.tolist() for r in rows(8)]})
    plain = TokenBatches(torch.stack(rows(8)), 4, seed=1)
    assert torch.equal(batches_of(tokens, 4, seed=1).at(3), plain.at(3))
    with closing(batches_of(tokens.to_iterable_dataset(), 4, seed=1)) as streamed:
        assert torch.equal(streamed.at(1), torch.stack(rows(8)[4:]))
        assert torch.equal(streamed.at(3), torch.stack(rows(8)[4:]))
    text = datasets.Dataset.from_dict({"text": ["import os\nimport sys\n" * 30] * 3})
    with closing(batches_of(text.to_iterable_dataset(), 2, seed=0, tokenizer=tokenizer, context=16)) as tokenised:
        batch = tokenised.at(0)
    assert batch.shape == (2, 16) and int(batch.max()) < 768
    assert tokenizer.decode(batch[0, 1:].tolist()).startswith("import os\nimport sys")
    with pytest.raises(ValueError, match="no tokenizer"):
        batches_of(text, 2, seed=0)


def sources(folder):
    """The same rows in every form, by name."""
    tokens = torch.stack(rows(10))
    np.save(folder / "tokens.npy", tokens.numpy().astype(np.uint16))
    text = datasets.Dataset.from_dict({"text": [f"import a{i}\n" * 40 for i in range(6)]})
    return {
        "tensor": tokens,
        "memory-mapped": np.load(folder / "tokens.npy", mmap_mode="r"),
        "list": list(tokens),
        "dataset": datasets.Dataset.from_dict({"tokens": tokens.tolist()}),
        "streamed": datasets.Dataset.from_dict({"tokens": tokens.tolist()}).to_iterable_dataset(),
        "streamed text": text.to_iterable_dataset(),
    }


@pytest.mark.parametrize("kind", ["tensor", "memory-mapped", "list", "dataset", "streamed", "streamed text"])
def test_processes_see_together_what_one_sees_and_after_resuming_too(tmp_path, kind):
    data, tokenizer = sources(tmp_path)[kind], bundled.model().tokenizer

    def found(row_slice, steps):
        with closing(batches_of(data, 4, seed=2, tokenizer=tokenizer, context=8, row_slice=row_slice)) as batches:
            return [batches.at(step) for step in steps]

    whole = found(slice(None), range(7))
    assert len({tuple(batch.flatten().tolist()) for batch in whole}) > 2
    shares = [found(slice(rank, rank + 2), range(3, 7)) for rank in (0, 2)]
    for step, parts in zip(range(3, 7), zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole[step]), step


@pytest.mark.parametrize("kind", ["memory-mapped", "dataset"])
def test_files_are_read_by_a_thread_of_their_own(tmp_path, monkeypatch, kind):
    readers = []
    plain = TokenBatches._rows

    def watched(self, chosen):
        readers.append(threading.current_thread())
        return plain(self, chosen)

    monkeypatch.setattr(TokenBatches, "_rows", watched)
    with closing(batches_of(sources(tmp_path)[kind], 2, seed=0)) as batches:
        batches.at(0)
        deadline = time.monotonic() + 10
        while len(readers) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(readers) >= 4 and threading.main_thread() not in readers


def test_a_process_reads_its_own_rows_of_a_file_alone(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        TokenBatches, "_rows", lambda self, rows: chosen.append(rows) or torch.zeros(len(rows), 3).long()
    )
    with closing(batches_of(sources(tmp_path)["memory-mapped"], 4, seed=0, row_slice=slice(1, 2))) as batches:
        assert batches.at(0).shape == (1, 3)
    assert all(len(rows) == 1 for rows in chosen)


def test_tokens_of_a_file_that_do_not_fit_the_model_are_found_before_anything_is_written(tmp_path):
    np.save(tmp_path / "tokens.npy", np.full((20, 6), 11))
    config = VPDConfig(steps=1, batch_size=4, C=3, gamma=GAMMA)
    with pytest.raises(ValueError, match=r"outside the vocabulary 0\.\.10"):
        decompose(
            tiny_model(),
            np.load(tmp_path / "tokens.npy", mmap_mode="r"),
            config,
            saving=SavingConfig(folder=tmp_path / "run"),
        )
    assert not (tmp_path / "run").exists()


def test_large_seeds_are_taken_and_small_ones_stay_what_they_were():
    rows = torch.arange(40).view(10, 4)
    assert batches_of(rows, 3, 20240101123456789).at(0).shape == (3, 4)
    generator = torch.Generator().manual_seed(7 * 1_000_003)
    assert torch.equal(batches_of(rows, 3, 7).at(0), rows[torch.randperm(10, generator=generator)[:3]])


def test_vectors_with_gradients_are_taken_as_numbers():
    x = torch.randn(6, 4, requires_grad=True)
    data = batches_of(x * 2, 2, 0)
    assert not data.at(0).requires_grad and len(data.describe()["sha256"]) == 64
    half = batches_of(x.detach().bfloat16(), 2, 0)
    assert half.at(0).dtype == torch.bfloat16 and len(half.describe()["sha256"]) == 64


def test_texts_without_a_list_and_datasets_without_text_are_named():
    with pytest.raises(
        ValueError, match="A row of the tokens is a text: pass a list of strings, or a split of the dataset"
    ):
        batches_of(("a", "b"), 1, 0).at(0)
    dataset = datasets.Dataset.from_dict({"content": ["a b c"] * 4})
    with pytest.raises(ValueError, match="The dataset has content; 'tokens', 'input_ids' or 'text' is needed"):
        batches_of(dataset, 1, 0, tokenizer=object(), context=4)


def test_a_length_of_rows_that_have_one_already_is_refused():
    with pytest.raises(ValueError, match="context=5 would do nothing: only datasets of text are cut into rows"):
        decompose(tiny_model(), torch.zeros(8, 6).long(), VPDConfig(steps=1, batch_size=4, C=3, gamma=GAMMA), context=5)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a[:, 1:3],
        lambda a: a[5:, :2],
        lambda a: a[::-2, ::-1],
        lambda a: np.asarray(a)[2:],
        lambda a: a.T[:2],
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_a_view_of_a_file_are_those_of_the_view(tmp_path, view, order):
    np.save(tmp_path / "tokens.npy", np.arange(80, dtype=np.int32).reshape(20, 4, order=order))
    mapped = view(np.load(tmp_path / "tokens.npy", mmap_mode="r"))
    with closing(batches_of(mapped, 2, seed=3)) as from_file:
        assert isinstance(from_file.tokens, MappedRows)
        plain = batches_of(np.array(mapped), 2, seed=3)
        assert all(torch.equal(from_file.at(step), plain.at(step)) for step in range(6))


def test_vectors_in_a_file_are_read_as_they_are(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    with closing(batches_of(np.load(tmp_path / "x.npy", mmap_mode="r"), 6, seed=0)) as batches:
        assert torch.equal(batches.at(0), batches_of(torch.from_numpy(x), 6, seed=0).at(0))


CUT = """
import os, sys
import numpy as np
from tl_vpd.training.data import batches_of
path = sys.argv[1]
batches = batches_of(np.load(path, mmap_mode="r"), 2, seed=0)
batches.at(0)
os.truncate(path, 200)
for step in range(1, 400):
    batches.at(step)
"""


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_not_the_end_of_the_process(tmp_path):
    np.save(tmp_path / "tokens.npy", np.zeros((1000, 512), dtype=np.int64))
    command = [sys.executable, "-c", CUT, str(tmp_path / "tokens.npy")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 1
    assert "tokens.npy became shorter while its tokens were read: put the file back and resume the run." in ended.stderr


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 3), dtype=bool),
        np.zeros((4, 3), dtype=complex),
        np.array([["a"]]),
        np.array([[None]]),
        np.zeros((4, 3), dtype="V2"),  # bfloat16, as NumPy reads it from a file
        torch.zeros(4, 3, dtype=torch.bool),
        torch.zeros(4, 3, dtype=torch.complex64),
    ],
)
def test_what_is_neither_integers_nor_vectors_is_refused(array):
    with pytest.raises(ValueError, match=r"^The data is \S+ of shape .*: give tokens as integers \[n, pos\]"):
        batches_of(array, 1, seed=0)


def test_a_mapping_whose_changes_are_not_in_the_file_is_refused(tmp_path):
    np.save(tmp_path / "tokens.npy", np.zeros((4, 3), dtype=np.int64))
    with pytest.raises(ValueError, match="memory-mapped in mode 'c': open the file with mode 'r'"):
        batches_of(np.load(tmp_path / "tokens.npy", mmap_mode="c"), 2, seed=0)


def test_after_an_error_of_the_reading_thread_the_step_can_be_read_again():
    class Rows:
        broken = True

        def __iter__(self):
            for i in range(8):
                if i == 5 and self.broken:
                    raise OSError("the disk is gone")
                yield torch.full((3,), i)

    rows = Rows()
    batches = batches_of(rows, 2, 0)
    assert [batches.at(step)[:, 0].tolist() for step in (0, 1)] == [[0, 1], [2, 3]]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            batches.at(2)
    rows.broken = False
    assert [batches.at(step)[:, 0].tolist() for step in (2, 3)] == [[4, 5], [6, 7]]
    batches.close()
