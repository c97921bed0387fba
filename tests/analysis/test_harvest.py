"""Harvest: its small parts by hand, and the whole against loops over a tiny model's importances."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.tiny import some_tokens
from tl_vpd.analysis import HarvestConfig, harvest, pick
from tl_vpd.analysis.harvest.batch import Active, dots
from tl_vpd.analysis.harvest.pick import picks_per_site
from tl_vpd.analysis.harvest.tokens import Pairs, pmi, recall, token_texts
from tl_vpd.analysis.harvest.windows import cut, peaks
from tl_vpd.forward import MaskedModel
from tl_vpd.hooks import causal_importances


def test_pmi_and_recall_by_hand():
    together = torch.tensor([4.0, 1.0, 0.0])
    # 5 firings among 100 positions; the tokens occur 4, 20 and 76 times.
    values = pmi(together, 5, torch.tensor([4.0, 20.0, 76.0]), 100)
    assert_close(values, torch.tensor([math.log(20), 0.0, -math.inf]))
    assert recall(together, 5).tolist() == pytest.approx([0.8, 0.2, 0.0])


@pytest.mark.parametrize(
    ("peak", "radius", "expected"), [(3, 2, (1, 6)), (0, 2, (0, 3)), (6, 2, (4, 7)), (3, 0, (3, 4)), (3, 99, (0, 7))]
)
def test_windows_stop_at_the_ends_of_the_row(peak, radius, expected):
    assert cut(peak, radius, torch.ones(7, dtype=torch.bool)) == expected


def test_windows_stop_at_padding():
    assert cut(3, 9, torch.tensor([False, False, True, True, True, False])) == (2, 5)


def test_the_peak_is_the_largest_importance_and_among_equals_the_largest_activation():
    g = torch.tensor([[0.5, 1.0, 1.0, 0.0], [0.2, 0.3, 0.1, 0.3]])[..., None]
    a = torch.tensor([[9.0, 1.0, -3.0, 9.0], [9.0, 1.0, 9.0, -0.5]])[..., None]
    g, a = (torch.cat([values, torch.zeros(1, 4, 1)]) for values in (g, a))
    token = (g.flatten() > 0.15).nonzero()[:, 0]
    score, at = peaks(Active(token, torch.zeros_like(token), g.flatten()[token], a.flatten()[token]), shape=(3, 4), C=1)
    assert at[:2, 0].tolist() == [2, 1]
    assert score[:, 0].tolist() == pytest.approx([1 + 0.75e-6, 0.3 + 0.5e-6, -1.0], abs=1e-7)
    assert score[0] - 1 == pytest.approx(0.75e-6, rel=1e-6)


@pytest.mark.parametrize("n", [0, 3, 400])
def test_products_at_few_pairs_are_those_of_the_whole_product(n):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(30, 5, generator=generator), torch.randn(5, 40, generator=generator)
    i = torch.randint(0, 30, (n,), generator=generator).sort().values
    j = torch.randint(0, 40, (n,), generator=generator)
    expected = (left[i].double() * right.T[j].double()).sum(-1)
    assert_close(dots(left, right, i, j).double(), expected, atol=1e-6, rtol=1e-5)


def test_pairs_add_up_over_batches():
    pairs = Pairs(2, limit=99, device=torch.device("cpu"))
    pairs.add(torch.tensor([4, 1, 4]), torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 0]))
    pairs.add(torch.tensor([0, -1, 4]), torch.tensor([0, 1, 2]), torch.tensor([1, 0, 0]))
    counts = pairs.counts()
    result = list(zip(counts.index.tolist(), counts.token.tolist(), counts.count.tolist(), strict=True))
    assert result == [(0, 1, 1), (0, 4, 3), (1, 0, 1), (1, 1, 1)]
    assert counts.occurrences.tolist() == [1, 1, 0, 0, 3]
    assert counts.firings.tolist() == [4, 2]
    assert counts.n == 5
    names = {i: "abcde"[i] for i in range(5)}
    table = counts.table(0, names, k=9, by="pmi", min_count=1)
    assert table["token"].tolist() == ["e", "b"]  # both have PMI ln(5/4); the one of larger recall comes first
    assert table["pmi"].tolist() == pytest.approx([math.log(5 / 4)] * 2)
    assert table["recall"].tolist() == [0.75, 0.25]
    assert counts.table(0, names, k=9, by="recall", min_count=2)["token"].tolist() == ["e"]
    with pytest.raises(ValueError, match="by='lift': choose from"):
        counts.table(0, names, k=9, by="lift", min_count=1)


def _by_hand(vpd, model, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """All importances and shown activations ``[n, pos, C_total]``."""
    with MaskedModel(vpd, model) as masked_model:
        _, inputs = masked_model.clean(tokens)
    shown = [(inputs[s] @ vpd.V[s] * vpd.U[s].norm(dim=-1)).detach() for s in vpd.sites]
    return causal_importances(vpd, model, tokens).concatenated.detach(), torch.cat(shown, -1)


@pytest.mark.parametrize(("batch_size", "density"), [(1, 0.5), (2, 0.5), (32, 0.5), (3, 0.1)])
def test_everything_against_loops(model, vpd, batch_size, density):
    tokens = some_tokens(shape=(5, 7))
    if density < 0.5:
        vpd = copy.deepcopy(vpd)
        vpd.gamma.unembed.bias.data[torch.arange(72) % 5 > 0] = -1e3  # so few that products are made one at a time
    result = harvest(
        vpd, model, tokens, config=HarvestConfig(windows=3, radius=2, batch_size=batch_size, threshold=0.2, bins=4)
    )
    g, a = _by_hand(vpd, model, tokens)
    fires = g > 0.2
    assert 0.4 * density < float(fires.double().mean()) < 1.6 * density
    assert_close(result.mean_importance, g.mean((0, 1)).float())
    assert_close(result.density, (g > 0).double().mean((0, 1)).float())
    assert result.firings.tolist() == fires.sum((0, 1)).tolist()
    for concatenated in range(vpd.site_axis.total):
        address = vpd.site_axis.at(concatenated)
        record = result[str(address)]
        own_g, own_a, own_fires = g[..., concatenated], a[..., concatenated], fires[..., concatenated]
        V, U = vpd.V[address.site].detach()[:, address.index], vpd.U[address.site].detach()[address.index]
        assert record.norm == pytest.approx(float(torch.outer(V, U).norm()), rel=1e-5)
        edges = (0, 0.25, 0.5, 0.75, 1)
        in_bins = [int(((own_g > low) & (own_g <= high)).sum()) for low, high in pairwise(edges)]
        assert record.histogram.tolist() == in_bins
        if record.firings:
            assert record.mean_activation == pytest.approx(float(own_a[own_fires].mean()), rel=1e-4, abs=1e-6)
        else:
            assert math.isnan(record.mean_activation)
        best = sorted(
            ((float(own_g[r].max()), r) for r in range(5) if bool(own_fires[r].any())), key=lambda pair: -pair[0]
        )[:3]
        assert [float(w.importances[w.peak]) for w in record.windows] == pytest.approx([value for value, _ in best])
        assert len({w.row for w in record.windows}) == len(record.windows)
        for w in record.windows:
            inside = slice(max(0, w.pos - 2), w.pos + 3)
            assert w.token_ids == tuple(tokens[w.row, inside].tolist())
            assert w.start == inside.start
            assert_close(w.importances, own_g[w.row, inside].float())
            assert_close(w.activations, own_a[w.row, inside].float())
        for table, at, text in (
            (record.input_tokens(99, min_count=1), own_fires, tokens),
            (record.output_tokens(99, min_count=1), own_fires[:, :-1], tokens[:, 1:]),
        ):
            met = {t: int((at & (text == t)).sum()) for t in range(11) if bool((at & (text == t)).any())}
            assert dict(zip(table["token_id"], table["count"], strict=True)) == met
            for row in table.itertuples():
                occurrences = int((text == row.token_id).sum())
                assert row.recall == pytest.approx(met[row.token_id] / int(at.sum()))
                chance = int(at.sum()) * occurrences / text.numel()
                assert row.pmi == pytest.approx(math.log(met[row.token_id] / chance), abs=1e-9)
            assert table["pmi"].is_monotonic_decreasing


def test_padding_changes_nothing(model, vpd):
    tokens = some_tokens(shape=(2, 7))
    real = torch.ones_like(tokens)
    real[1, 4:] = 0
    padded = harvest(vpd, model, tokens, config=HarvestConfig(windows=2, radius=9), attention_mask=real)
    first, second = (
        harvest(vpd, model, t, config=HarvestConfig(windows=1, radius=9)) for t in (tokens[:1], tokens[1:, :4])
    )
    assert padded.inputs.n == 11
    assert padded.outputs.n == 9
    assert_close(padded.mean_importance * 11, first.mean_importance * 7 + second.mean_importance * 4)
    assert torch.equal(padded.firings, first.firings + second.firings)
    assert torch.equal(padded.outputs.firings, first.outputs.firings + second.outputs.firings)
    windows = [w for a in vpd.site_axis.subcomponents() for w in padded[a].windows if w.row == 1]
    assert windows
    assert all(len(w.tokens) == 4 for w in windows)


def test_named_subcomponents_are_found_as_among_all(model, vpd):
    tokens = some_tokens(shape=(4, 7))
    names = ["blocks.1.mlp.W_out:5", "blocks.0.attn.W_K:2", "blocks.1.mlp.W_out:0"]
    everything, some = harvest(vpd, model, tokens), harvest(vpd, model, tokens, subcomponents=names)
    assert len(some) == 3
    assert sorted(some.to_pandas()["subcomponent"]) == sorted(names)
    for name in names:
        one, other = everything[name], some[name]
        assert (one.density, one.firings) == (other.density, other.firings)
        assert other.mean_importance == pytest.approx(one.mean_importance)
        assert other.norm == one.norm
        assert one.to_pandas().round(5).equals(other.to_pandas().round(5))
        assert one.input_tokens().equals(other.input_tokens())
    with pytest.raises(KeyError, match="W_Q:0 was not harvested"):
        some["blocks.0.attn.W_Q:0"]


def test_the_table_of_all_is_in_packed_order_and_top_in_order_of_importance(model, vpd, tokens):
    result = harvest(vpd, model, tokens)
    table = result.to_pandas()
    assert table["subcomponent"].tolist() == [str(a) for a in vpd.site_axis.subcomponents()]
    top = result.top(4)
    assert top["mean_importance"].tolist() == sorted(table["mean_importance"], reverse=True)[:4]


def test_what_is_wrong_is_said(model, vpd, tokens):
    result = harvest(vpd, model, tokens)
    with pytest.raises(KeyError, match=r"did you mean 'blocks\.0\.attn\.W_Q'"):
        result["blocks.0.attn.W_q:1"]
    with pytest.raises(IndexError, match="0 to 5"):
        result["blocks.0.attn.W_Q:6"]
    with pytest.raises(ValueError, match="write 'site:index'"):
        result["W_Q"]
    for option in ({"windows": 0}, {"radius": -1}, {"batch_size": 0}, {"threshold": 1.0}, {"threshold": -0.1}):
        with pytest.raises(ValueError, match=next(iter(option))):
            harvest(vpd, model, tokens, config=HarvestConfig(**option))
    with pytest.raises(ValueError, match="subcomponents is empty"):
        harvest(vpd, model, tokens, subcomponents=[])
    with pytest.raises(IndexError):
        harvest(vpd, model, tokens, subcomponents=["blocks.0.attn.W_Q:6"])


class _Tokenizer:
    pieces: ClassVar = {0: ("a", "a"), 1: ("b", "▁b"), 2: ("\ufffd", "x"), 3: ("", "y"), 4: (" c", "Ġc")}

    def batch_decode(self, rows, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return [self.pieces[i][0] for (i,) in rows]

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i][1] for i in ids]


def test_names_of_tokens():
    tokens = torch.tensor([[4, 3], [2, 1], [0, 0]])
    assert token_texts(_Tokenizer(), tokens) == {0: "a", 1: " b", 2: "⟨2⟩", 3: "⟨3⟩", 4: " c"}
    assert token_texts(None, tokens[:1]) == {3: "3", 4: "4"}


def test_shares_are_even_and_spread():
    assert picks_per_site({"a": 9, "b": 1, "c": 9}, 6) == {"a": 3, "b": 1, "c": 2}
    assert picks_per_site({"a": 1, "b": 1}, 6) == {"a": 1, "b": 1}
    assert picks_per_site(dict.fromkeys("abcdefghijkl", 5), 3) == {"c": 1, "g": 1, "k": 1}


def test_pick_passes_over_the_dead_and_the_always_on(model, vpd):
    result = harvest(vpd, model, some_tokens(shape=(8, 7)))
    C = len(result)
    positive, firings = torch.linspace(0, 1000, C).long(), torch.full((C,), 50)
    firings[::2] = 9
    importance = torch.where(torch.arange(C) % 6 == 3, 0.9, 0.5).double() * positive
    result = replace(result, n=1000, positive=positive, firings=firings, importance=importance)
    density = result.density
    picked = pick(result, 8)
    assert picked == pick(result, 8)
    assert len(set(picked)) == 8
    table = result.to_pandas().set_index("subcomponent").loc[[str(p) for p in picked]]
    assert (table["firings"] >= 10).all()
    assert (table["density"] <= 0.5).all()
    assert table["site"].nunique() == 6
    assert "blocks.1.mlp.W_out" not in set(table["site"])
    assert all(p.index == 3 for p in pick(result, 6))  # the strongest of each site's three
    assert len(pick(result, 999)) == int(((firings >= 10) & (density <= 0.5)).sum())
    with pytest.raises(ValueError, match="fires 51 times or more"):
        pick(result, min_firings=51)
    with pytest.raises(ValueError, match="n=0"):
        pick(result, 0)
