"""The order of batches follows from seed and step alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_vpd.training.data import TokenBatches


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
