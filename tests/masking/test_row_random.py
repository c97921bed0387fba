"""What a run draws depends on seed, step and row alone: not on threads, not on what else is drawn."""

from __future__ import annotations

import pytest
import torch

from tl_vpd.masking import row_random as module
from tl_vpd.masking.row_random import RowRandom


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [[0], [3, 1, 4], range(7)])
def test_rows_drawn_on_several_cores_are_those_drawn_on_one(rows, threads, monkeypatch):
    random = RowRandom(5, torch.device("cpu"))
    threads(1)
    alone = torch.stack([random.uniform("sources", 2, [row], (6, 4))[0] for row in rows])
    monkeypatch.setattr(module, "SPREAD", 1)
    for n in (2, 3):
        threads(n)
        out = torch.full((len(rows), 6, 4), -1.0)
        assert random.uniform("sources", 2, list(rows), (6, 4), out=out) is out
        assert torch.equal(out, alone)


def test_other_steps_rows_names_and_seeds_draw_others():
    def drawn(seed=0, what="sources", step=0, row=0):
        return RowRandom(seed, torch.device("cpu")).uniform(what, step, [row], (50,))

    others = [drawn(seed=1), drawn(what="slots"), drawn(step=1), drawn(row=1)]
    assert torch.equal(drawn(), drawn())
    assert not any(torch.equal(drawn(), other) for other in others)
    assert float(drawn().min()) >= 0 and float(drawn().max()) < 1
