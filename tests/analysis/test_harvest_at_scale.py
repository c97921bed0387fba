"""Harvest at scale: parts, streams, interruptions and a small memory give what one pass over everything gives."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.tiny import some_tokens
from tl_vpd.analysis import Harvest, HarvestConfig, harvest, logit_effects, merge
from tl_vpd.analysis.harvest.run import budget
from tl_vpd.analysis.harvest.tokens import Pairs, TokenCounts, total
from tl_vpd.analysis.harvest.windows import Windows, random_firings
from tl_vpd.forward import MaskedModel
from tl_vpd.hooks import causal_importances

ALL = HarvestConfig(windows=2, radius=2, bins=4, samples=3, seed=5, lags=2, threshold=0.2, batch_size=2)
SMALL = replace(ALL, memory=240_000)
"""So little that importances go to the disk after every few rows."""


def check_equal(one: Harvest, other: Harvest) -> None:
    """Every number of two harvests; sums of floats to rounding."""
    for field in fields(Harvest):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            assert_close(a, b, rtol=1e-5, atol=1e-9, msg=lambda text, name=field.name: f"{name}: {text}")
        elif isinstance(a, Windows | TokenCounts):
            for inner in fields(a):
                left, right = getattr(a, inner.name), getattr(b, inner.name)
                assert_close(left, right, rtol=1e-5, atol=1e-7, msg=lambda text, name=inner.name: f"{name}: {text}")
        elif field.name not in ("columns", "config", "site_axis"):
            assert a == b, field.name
    if one.columns is not None and other.columns is not None:
        for i in range(0, len(one), 11):
            a, b = one.columns.read(i), other.columns.read(i)
            for field in fields(a):
                assert_close(getattr(a, field.name), getattr(b, field.name), rtol=1e-5, atol=1e-6)


@pytest.fixture
def rows() -> Tensor:
    """Nine rows of seven tokens."""
    return some_tokens(shape=(9, 7))


@pytest.fixture
def whole(model, vpd, rows, tmp_path) -> Harvest:
    """All rows in one call."""
    return harvest(vpd, model, rows, config=ALL, folder=tmp_path / "whole")


@pytest.mark.parametrize("split", [1, 4, 8])
def test_two_halves_are_the_whole(model, vpd, rows, whole, tmp_path, split):
    first = harvest(vpd, model, rows[:split], config=ALL, folder=tmp_path / "first")
    rest = replace(ALL, first_row=split, batch_size=3)
    second = harvest(vpd, model, rows[split:], config=rest, folder=tmp_path / "second")
    for both in (merge(first, second), merge(second, first)):
        check_equal(both, whole)
        assert both.rows == ((0, 9),)
    saved = merge(first, second).save(tmp_path / "both")
    check_equal(Harvest.load(saved), whole)
    assert {path.parent for path in Harvest.load(saved).columns.files} == {saved}


def test_parts_that_do_not_fit_together_are_refused(model, vpd, rows, whole):
    part = harvest(vpd, model, rows[:2], config=replace(ALL, first_row=9))
    with pytest.raises(ValueError, match="the other has none"):
        merge(whole, part)
    one = harvest(vpd, model, rows[:2], config=ALL)
    with pytest.raises(ValueError, match=r"rows in common.*first_row"):
        merge(one, harvest(vpd, model, rows[1:3], config=replace(ALL, first_row=1)))
    with pytest.raises(ValueError, match="windows=2 and windows=1"):
        merge(one, harvest(vpd, model, rows[:2], config=replace(ALL, windows=1, first_row=2)))
    with pytest.raises(ValueError, match="rows of 7 and of 6 tokens"):
        merge(one, harvest(vpd, model, rows[2:, :6], config=replace(ALL, first_row=2)))
    with pytest.raises(ValueError, match="of different decompositions"):
        merge(one, harvest(vpd, model, rows[2:], "blocks.0.attn.W_Q:1", config=replace(ALL, first_row=2)))


def test_a_small_memory_changes_nothing(model, vpd, rows, whole, tmp_path):
    small = harvest(vpd, model, rows, config=SMALL, folder=tmp_path / "small")
    assert len(small.columns.files) > 2
    check_equal(small, whole)
    with pytest.raises(ValueError, match=r"memory=9 is too little: 72 subcomponents need [\d,]+ bytes"):
        harvest(vpd, model, rows, config=replace(ALL, memory=9))


def test_the_memory_bounds_rows_pairs_and_entries():
    config = HarvestConfig(windows=8, samples=8, radius=20, lags=1)
    for memory in (1 << 30, 1 << 31):
        parts = budget(replace(config, memory=memory), C=2500, total=2500, context=128)
        fixed = 2 * (Windows.bytes_for(2500, 16, 20) + 4 * 2 * 2500**2)
        row = 4 * 128 * 2500 * 9
        assert fixed + parts.rows * row + parts.pairs * 100 + parts.entries < memory
        assert parts.rows == min(32, (memory - fixed) // 2 // row)


def _dense(vpd, model, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with MaskedModel(vpd, model) as masked_model:
        _, inputs = masked_model.clean(tokens)
    shown = [(inputs[s] @ vpd.V[s] * vpd.U[s].norm(dim=-1)).detach() for s in vpd.sites]
    return causal_importances(vpd, model, tokens).concatenated.detach(), torch.cat(shown, -1)


def test_columns_have_all_importances_above_0(model, vpd, rows, tmp_path):
    small = harvest(vpd, model, rows, config=SMALL, folder=tmp_path / "small")
    g, a = _dense(vpd, model, rows)
    for i in range(0, len(small), 5):
        column, where = small.columns.read(i), (g[..., i] > 0).nonzero()
        assert torch.stack([column.rows, column.positions], 1).tolist() == where.tolist()
        assert_close(column.importances, g[..., i][g[..., i] > 0].half())
        assert_close(column.activations, a[..., i][g[..., i] > 0].float())
    assert small.columns.bytes == sum(path.stat().st_size for path in (tmp_path / "small").glob("columns-*"))


def test_pairs_at_lags_against_loops(model, vpd, rows):
    tokens = rows[:3]
    real = torch.ones_like(tokens)
    real[1, 5:] = 0
    result = harvest(vpd, model, tokens, config=ALL, attention_mask=real)
    with MaskedModel(vpd, model) as masked_model:
        _, inputs = masked_model.clean(tokens, real.bool())
        fires = (vpd.importances(inputs, real.bool()) > 0.2).detach().numpy()
    expected = np.zeros((3, 72, 72), dtype=int)
    for row in fires:
        for t in range(7):
            for lag in range(min(t, 2) + 1):
                expected[lag] += row[t][:, None] & row[t - lag][None, :]
    assert np.array_equal(result.together.numpy(), expected)
    assert expected[1].sum() > 0
    address = "blocks.1.mlp.W_in:2"
    i = result.index(address)
    table = result[address].neighbours(k=9999, min_count=1)
    met = {(row.subcomponent, row.lag): row for row in table.itertuples()}
    for j, other in enumerate(vpd.site_axis.subcomponents()):
        for lag in range(-2, 3):
            count = expected[-lag][i, j] if lag <= 0 else expected[lag][j, i]
            if count and not (lag == 0 and i == j):
                row = met.pop((str(other), lag))
                assert row.together == count
                either = int(result.firings[i] + result.firings[j]) - count
                assert row.jaccard == pytest.approx(count / either)
    assert not met
    assert table["jaccard"].is_monotonic_decreasing
    with pytest.raises(ValueError, match="did not count pairs"):
        harvest(vpd, model, tokens)[address].neighbours()


def test_samples_are_random_firings_that_follow_from_the_seed(model, vpd, rows, whole):
    other = harvest(vpd, model, rows, config=replace(ALL, batch_size=7))
    for address in map(str, vpd.site_axis.subcomponents()):
        samples, again = whole[address].samples, other[address].samples
        assert [(w.row, w.pos) for w in samples] == [(w.row, w.pos) for w in again]
        strengths = [float(w.importances[w.peak]) for w in samples]
        assert strengths == sorted(strengths, reverse=True) and all(value > 0.2 for value in strengths)
        assert len(samples) == min(3, len({w.row for w in samples}))
        groups = whole[address].by_quantile(2)
        assert [w.row for group in groups for w in group] == [w.row for w in samples]
        assert len(groups[1]) - len(groups[0]) in (0, 1)
    reseeded = harvest(vpd, model, rows, config=replace(ALL, seed=6))
    assert not torch.equal(reseeded.samples.positions, whole.samples.positions)
    with pytest.raises(ValueError, match="seed=3 does nothing without samples"):
        HarvestConfig(seed=3)


def test_every_firing_is_sampled_equally_often():
    fires = torch.zeros(50, 6, 200, dtype=torch.bool)
    fires[:, [0, 2, 3, 5]] = True
    shape, chosen, (token, c) = fires.shape[:2], torch.arange(200), fires.flatten(0, 1).nonzero(as_tuple=True)
    score, at = random_firings(token, c, shape, chosen, 1, 0)
    counts = torch.bincount(at.flatten(), minlength=6).tolist()
    assert counts[1] == counts[4] == 0
    assert all(abs(counts[i] - 2500) < 5 * (2500 * 0.75) ** 0.5 for i in (0, 2, 3, 5))
    # The largest of four uniform numbers has the mean 4/5.
    assert float(score.mean()) == pytest.approx(0.8, abs=0.01)
    assert float(random_firings(token[:0], c[:0], (0, 6), chosen, 1, 0)[0].sum()) == 0
    assert bool((random_firings(token[:0], c[:0], shape, chosen, 1, 0)[0] == -1).all())


class Stream:
    """Rows one by one, until the power goes."""

    def __init__(self, rows: Any, last: int | None = None) -> None:
        self.rows, self.last = rows, last

    def __iter__(self):
        for i, row in enumerate(self.rows):
            if i == self.last:
                raise KeyboardInterrupt
            yield row


@pytest.mark.parametrize("kind", ["mapped", "iterable", "dataset rows"])
def test_streams_are_read_as_tensors_are(model, vpd, rows, whole, tmp_path, kind):
    np.save(tmp_path / "rows.npy", rows.numpy().astype(np.uint16))
    stream = {
        "mapped": np.load(tmp_path / "rows.npy", mmap_mode="r"),
        "iterable": Stream(rows),
        "dataset rows": ({"input_ids": row.tolist()} for row in rows),
    }[kind]
    check_equal(harvest(vpd, model, stream, config=SMALL, folder=tmp_path / kind), whole)


def test_streams_that_are_no_rows_are_refused(model, vpd, rows):
    with pytest.raises(ValueError, match="has 3 tokens and the first has 7"):
        harvest(vpd, model, Stream([*rows, rows[0, :3]]))
    with pytest.raises(ValueError, match="a stream without rows"):
        harvest(vpd, model, Stream([]))
    with pytest.raises(ValueError, match="attention_mask does nothing for a stream"):
        harvest(vpd, model, Stream(rows), attention_mask=torch.ones_like(rows))
    with pytest.raises(ValueError, match="vocabulary"):
        harvest(vpd, model, Stream([rows[0], rows[0] + 90]))


@pytest.mark.parametrize("last", [3, 8])
def test_an_interrupted_harvest_goes_on(model, vpd, rows, whole, tmp_path, last):
    folder = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        harvest(vpd, model, Stream(rows, last), config=SMALL, folder=folder)
    with pytest.raises(ValueError, match="was interrupted: call harvest"):
        Harvest.load(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("columns-*")}
    assert before
    again = harvest(vpd, model, Stream(rows), config=SMALL, folder=folder)
    check_equal(again, whole)
    check_equal(Harvest.load(folder), whole)
    assert all((folder / name).read_bytes() == content for name, content in before.items())


def test_what_is_in_the_folder_is_not_run_again(model, vpd, rows, tmp_path, monkeypatch):
    folder = tmp_path / "done"
    first = harvest(vpd, model, rows[:5], config=ALL, folder=folder)
    ran = []
    clean = MaskedModel.clean
    monkeypatch.setattr(MaskedModel, "clean", lambda self, t, m=None: ran.append(len(t)) or clean(self, t, m))
    check_equal(harvest(vpd, model, rows[:5], config=ALL, folder=folder), first)
    assert not ran
    longer = harvest(vpd, model, rows, config=ALL, folder=folder)
    assert sum(ran) == 4
    monkeypatch.undo()
    check_equal(longer, harvest(vpd, model, rows, config=ALL, folder=tmp_path / "new"))


def test_another_harvest_in_the_folder_is_refused(model, vpd, rows, tmp_path):
    folder = tmp_path / "done"
    harvest(vpd, model, rows, config=ALL, folder=folder)
    for other, message in (
        (dict(config=replace(ALL, threshold=0.3)), "with another config"),
        (dict(config=ALL, subcomponents=["blocks.0.attn.W_Q:1"]), "of other subcomponents"),
        (dict(config=ALL, prompts=rows.flip(0)), "of other rows"),
        (dict(config=ALL, prompts=rows[:4]), "of 9 rows, and there are 4"),
    ):
        with pytest.raises(ValueError, match=f"holds a harvest {message}"):
            harvest(vpd, model, **{"prompts": rows, **other}, folder=folder)


def test_damage_is_noticed(whole, tmp_path):
    folder = whole.save(tmp_path / "saved")
    path: Path = next(folder.glob("columns-*"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is damaged"):
        Harvest.load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        Harvest.load(folder)
    with pytest.raises(FileNotFoundError):
        Harvest.load(tmp_path / "nothing")


def test_beyond_the_limit_the_rarest_pairs_are_dropped_and_it_is_said():
    generator = torch.Generator().manual_seed(0)
    exact, limited = (Pairs(2, limit, torch.device("cpu")) for limit in (10**6, 40))
    for _ in range(60):
        tokens = (torch.rand(50, generator=generator) ** 3 * 90).long()
        at, c = (torch.rand(50, 2, generator=generator) < 0.5).nonzero(as_tuple=True)
        exact.add(tokens, at, c)
        limited.add(tokens, at, c)
    full, part = exact.counts(), limited.counts()
    assert full.missing == 0 < part.missing < int(full.count.max())
    assert len(part.count) <= 40 < len(full.count)
    true = {(i, t): n for i, t, n in zip(full.index.tolist(), full.token.tolist(), full.count.tolist(), strict=True)}
    known = {(i, t): n for i, t, n in zip(part.index.tolist(), part.token.tolist(), part.count.tolist(), strict=True)}
    assert all(0 <= n - known.get(pair, 0) <= part.missing for pair, n in true.items())
    assert torch.equal(part.occurrences, full.occurrences) and torch.equal(part.firings, full.firings)


def test_counts_of_several_vocabularies_add_up():
    one, other = (Pairs(1, 99, torch.device("cpu")) for _ in range(2))
    one.add(torch.tensor([4, 1]), torch.tensor([0, 1]), torch.tensor([0, 0]))
    other.add(torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([0]))
    both = total([one.counts(), other.counts()])
    assert both.occurrences.tolist() == [1, 2, 0, 0, 1]
    assert both.token.tolist() == [1, 4] and both.count.tolist() == [2, 1]


def test_logit_effects_by_hand(model, vpd):
    effects = logit_effects(vpd, model, k=3)
    assert {c.site.rpartition(".")[2] for c in effects.subcomponents} == {"W_O", "W_out"}
    assert len(effects) == 4 * 6
    W_U = model.W_U.detach()
    for c in effects.subcomponents:
        logits = vpd.U[c.site].detach()[c.index] @ W_U
        order = logits.argsort(descending=True).tolist()
        table = effects[c]
        assert table["token_id"].tolist() == order[:3] + order[-3:]
        assert_close(torch.tensor(table["logit"].tolist()), logits[order[:3] + order[-3:]].float())
    one = logit_effects(vpd, model, "blocks.1.mlp.W_out:4", k=99)
    assert len(one[one.subcomponents[0]]) == 22 and "blocks.0.mlp.W_out:4" not in one
    assert len(one.to_pandas()) == 22
    with pytest.raises(ValueError, match="does not write into the residual stream"):
        logit_effects(vpd, model, "blocks.1.mlp.W_in:4")
    with pytest.raises(KeyError, match="has no logit effects"):
        effects["blocks.1.mlp.W_in:4"]
