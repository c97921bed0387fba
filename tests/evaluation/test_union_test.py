"""Unions of important sets, by hand and against models with edited weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.evaluation import handmade
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.evaluation import sampled, union_test, union_test_pairs
from tl_vpd.evaluation.union_test import union_distances, union_of_groups, with_random_partners
from tl_vpd.losses import kl_divergence
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.site import ConcatenatedAxis


def test_union_of_groups_by_hand():
    important = torch.tensor([[[1, 0, 0]], [[0, 1, 0]], [[0, 0, 0]], [[0, 0, 1]]]).bool()
    expected = torch.tensor([[[1, 1, 0]], [[1, 1, 0]], [[0, 0, 1]], [[0, 0, 1]]]).bool()
    assert torch.equal(union_of_groups(important, 2), expected)
    assert torch.equal(union_of_groups(important, 4), torch.ones(4, 1, 3, dtype=torch.bool))


def test_random_partners_are_as_many_living_and_new():
    site_axis = ConcatenatedAxis({"blocks.0.mlp.W_in": 6, "blocks.0.mlp.W_out": 5})
    draw = torch.rand(4, 3, 11, generator=torch.Generator().manual_seed(0))
    alone, union = draw > 0.8, draw > 0.6
    alive = torch.ones(11, dtype=torch.bool)
    alive[2] = False
    alone[..., 2] = union[..., 2] = False
    result = with_random_partners(
        alone, union, alive, site_axis, torch.rand(alone.shape, generator=torch.Generator().manual_seed(1))
    )
    assert (result | ~alone).all() and not result[..., 2].any()
    for name in site_axis.names:
        assert torch.equal(site_axis.split_sites(result)[name].sum(-1), site_axis.split_sites(union)[name].sum(-1))
    assert not torch.equal(result, union)


def test_pairs_against_the_model_run_by_hand():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(5, 7))
    g = vpd.causal_importances(model, tokens)
    with sampled(vpd, model, tokens, batch_size=2) as sample:
        table, pairs = union_test(sample, sizes=(2,)), union_test_pairs(sample)
    assert table.loc[2, "groups"] == len(pairs) == 2
    assert len({*pairs["a"], *pairs["b"]}) == 4  # nobody twice; the fifth row has no partner
    with torch.no_grad(), vpd.attach(model) as attached:
        target = model(tokens).log_softmax(-1)

        def kl(row: int, mask: torch.Tensor) -> float:
            off = torch.zeros(1, tokens.shape[1])
            by_site = Masks(
                {n: SiteMask(alone.float(), off) for n, alone in g.site_axis.split_sites(mask[None]).items()}
            )
            with attached.masked(by_site):
                return float(kl_divergence(target[row : row + 1], model(tokens[row : row + 1])))

        for pair in pairs.itertuples():
            union = (g.concatenated[pair.a] > 0) | (g.concatenated[pair.b] > 0)
            assert pair.kl_union_a == pytest.approx(kl(pair.a, union), rel=1e-4)
            assert pair.kl_union_b == pytest.approx(kl(pair.b, union), rel=1e-4)
            assert pair.kl_alone_a == pytest.approx(kl(pair.a, g.concatenated[pair.a] > 0), rel=1e-4)
            assert pair.kl_alone_b == pytest.approx(kl(pair.b, g.concatenated[pair.b] > 0), rel=1e-4)
    assert table.loc[2, "kl_union"] == pytest.approx(float(pairs[["kl_union_a", "kl_union_b"]].to_numpy().mean()))
    assert table.loc[2, "added"] == pytest.approx(table.loc[2, "kl_union"] - table.loc[2, "kl_alone"])


def test_a_lookup_table_breaks_and_the_right_decomposition_does_not():
    model = handmade.known_model()
    tokens = handmade.one_token_rows(0, handmade.KNOWN)
    harm = {}
    for name, vpd in {"right": handmade.right(model), "table": handmade.lookup_table(model)}.items():
        with sampled(vpd, model, tokens) as sample:
            harm[name] = union_test(sample, sizes=(2, 8))
    assert_close(
        torch.tensor(harm["right"]["kl_union"].to_numpy()), torch.zeros(2, dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert (harm["table"]["kl_alone"] < 1e-5).all()
    assert harm["table"].loc[2, "kl_union"] > 0.05
    assert harm["table"].loc[8, "kl_union"] > harm["table"].loc[2, "kl_union"]


def test_groups_larger_than_the_sample_are_refused():
    model = tiny_model(torch.float32)
    with sampled(decomposition_of(model), model, some_tokens(shape=(3, 5))) as sample:
        with pytest.raises(ValueError, match="Groups of 4 cannot be formed of 3 rows"):
            union_test(sample, sizes=(4,))
        distances = union_distances(sample, 3)
        assert sorted(distances.rows) == [0, 1, 2]
        assert np.isfinite(distances.random.values).all()
