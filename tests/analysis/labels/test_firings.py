"""Firings against a tiny model's importances, by rows, by components, and their nulls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from tests.analysis.labels.synthetic import firings_where, ruled
from tests.tiny import some_tokens
from tl_vpd.analysis import ClusterConfig, cluster
from tl_vpd.analysis.labels import FiringsConfig, firings, null_firings
from tl_vpd.forward import MaskedModel


@pytest.mark.parametrize("batch_size", [1, 3])
def test_firings_are_where_importances_exceed_the_threshold(model, vpd, batch_size):
    tokens = some_tokens(shape=(4, 7))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    fires = firings(vpd, model, tokens, config=FiringsConfig(threshold=0.2, batch_size=batch_size), attention_mask=mask)
    g = vpd.causal_importances(model, tokens, attention_mask=mask).concatenated.detach()
    with MaskedModel(vpd, model) as masked_model:
        _, inputs = masked_model.clean(tokens, mask.bool())
    a = torch.cat([inputs[s] @ vpd.V[s] * vpd.U[s].norm(dim=-1) for s in vpd.sites], -1).detach()
    assert fires.addresses == tuple(map(str, vpd.site_axis.subcomponents()))
    for i in range(len(fires)):
        where = ((g[..., i] > 0.2) & mask.bool()).flatten().nonzero()[:, 0]
        assert_array_equal(fires.at[fires.of(i)], where)
        assert_allclose(fires.importances[fires.of(i)], g[..., i].flatten()[where], rtol=1e-6)
        assert_allclose(fires.activations[fires.of(i)], a[..., i].flatten()[where], rtol=1e-5)
    assert fires.counts.sum() == len(fires.at) > 100
    assert_allclose(fires.density, fires.counts / 26)


def test_named_ones_are_as_among_all(model, vpd, tokens):
    names = ["blocks.1.mlp.W_out:5", "blocks.0.attn.W_K:2"]
    everything, two = firings(vpd, model, tokens), firings(vpd, model, tokens, names)
    assert two.addresses == (names[1], names[0])
    for name in names:
        there, here = everything.of(everything.number(name)), two.of(two.number(name))
        assert_array_equal(everything.at[there], two.at[here])
        assert_allclose(everything.activations[there], two.activations[here], rtol=1e-6)
    with pytest.raises(KeyError, match="W_Q:0 is not among the 2"):
        two.number("blocks.0.attn.W_Q:0")


def test_rows_have_nothing_of_the_others():
    fires = ruled()
    rows = np.array([7, 3, 50])
    few = fires.in_rows(rows)
    assert few.tokens.shape == (3, 40)
    for i in range(len(fires)):
        row, pos = np.divmod(fires.at[fires.of(i)], 40)
        expected = sorted((rows.tolist().index(r), p) for r, p in zip(row, pos, strict=True) if r in rows)
        assert [divmod(t, 40) for t in few.at[few.of(i)].tolist()] == expected
    at = few.at[few.of(0)]
    assert np.isin(few.tokens.reshape(-1)[at], [0, 1]).all()


@pytest.mark.parametrize("lags", [0, 2])
def test_components_fire_where_a_member_does_with_its_largest_importance(model, vpd, lags):
    tokens = some_tokens(shape=(6, 7))
    mask = torch.ones_like(tokens)
    mask[1, 5:], mask[3, :2] = 0, 0
    fires = firings(vpd, model, tokens, attention_mask=mask)
    config = ClusterConfig(alpha=1.0 if lags else 5.0, threshold=0.1, lags=lags)
    clustering = cluster(vpd, model, tokens, config=config)
    assert any(max(c.lags) for c in clustering) == bool(lags)
    together = fires.components(clustering)
    g = clustering.importances(vpd.causal_importances(model, tokens, attention_mask=mask)).detach()
    assert not bool(g[mask == 0].any())
    g = g.flatten(0, 1)
    assert together.addresses[1] == "component:1"
    assert max(len(c.members) for c in clustering) > 1
    for component in clustering:
        found = together.of(component.number)
        where = (g[:, component.number] > 0.1).nonzero()[:, 0]
        assert_array_equal(together.at[found], where)
        assert_allclose(together.importances[found], g[where, component.number], rtol=1e-6)
    with pytest.raises(KeyError, match="is not among"):
        firings(vpd, model, tokens, ["blocks.0.attn.W_K:2"]).components(clustering)


def test_nulls_fire_as_often_elsewhere(model, vpd):
    tokens = some_tokens(shape=(6, 7))
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    fires = firings(vpd, model, tokens, attention_mask=mask)
    for null in ("untrained", "random directions", "shuffled"):
        other = null_firings(vpd, model, fires, null=null, seed=1)
        assert_array_equal(other.ends, fires.ends)
        assert not np.array_equal(other.at, fires.at)
        assert all((np.diff(other.at[other.of(i)]) > 0).all() for i in range(len(other)))
        assert other.real.reshape(-1)[other.at].all()
        again = null_firings(vpd, model, fires, null=null, seed=1, batch_size=4, max_bytes=4 * 42 * 40)
        assert_array_equal(again.at, other.at)
        assert_allclose(np.sort(other.importances[other.of(3)]), np.sort(fires.importances[fires.of(3)]))
    with pytest.raises(KeyError, match="component"):
        null_firings(vpd, model, firings_where(fires.tokens, {"component:0": fires.real}), null="untrained")


def test_random_directions_fire_at_their_largest_projections(model, vpd):
    tokens = some_tokens(shape=(6, 7))
    fires = firings(vpd, model, tokens, [f"blocks.0.attn.W_Q:{i}" for i in range(6)])
    i = next(i for i, n in enumerate(fires.counts) if 8 < n < 40)
    null = null_firings(vpd, model, fires, null="random directions")
    with MaskedModel(vpd, model) as masked_model:
        _, inputs = masked_model.clean(tokens)
    x = inputs["blocks.0.attn.W_Q"].flatten(0, 1)
    x = x - x.mean(0)
    on = torch.zeros(len(x), dtype=torch.bool)
    on[torch.from_numpy(null.at[null.of(i)])] = True
    values = torch.from_numpy(null.activations[null.of(i)]).double()
    direction = torch.linalg.lstsq(x[on], values[:, None]).solution  # more tokens than dimensions: it is the only one
    projected = (x @ direction)[:, 0]
    assert_allclose(projected[on], values, atol=1e-5)
    assert float(projected[on].min()) > float(projected[~on].max())
