"""Measures against a known truth: by hand, and on a decomposition that is the truth itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tl_vpd import VPDConfig
from tl_vpd.baselines import RankOne
from tl_vpd.evaluation.ground_truth import ground_truth
from tl_vpd.evaluation.matching import count_errors, mmcs_and_ml2r, overlap, pattern_errors
from tl_vpd.evaluation.truth import SiteTruth, Truth
from tl_vpd.toys import TMS
from tl_vpd.training import new_decomposition

GAMMA = dict(kind="per_subcomponent_mlps", hidden=2)


def one_a_feature(W: torch.Tensor) -> torch.Tensor:
    """The true pieces of a weight with features on its input axis."""
    return torch.stack([torch.diag(row) @ W for row in torch.eye(len(W))])


def test_the_truth_itself_has_cosines_and_ratios_of_one_on_either_axis():
    W = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 1.0]])
    for pieces, weight, axis in ((one_a_feature(W), W, "in"), (one_a_feature(W).transpose(1, 2), W.T, "out")):
        known = SiteTruth(3, torch.eye(3, dtype=torch.bool), axis, torch.eye(3))
        cosines, ratios = mmcs_and_ml2r(known.effects(pieces[[2, 0, 1]]), known.effects(weight))
        assert_close(cosines, torch.ones(3))
        assert_close(ratios, torch.ones(3))


def test_shrunk_and_turned_pieces_are_measured_by_hand():
    W = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    pieces = torch.zeros(2, 2, 2)
    pieces[0, 0] = torch.tensor([0.9, 0.0])  # feature 0: shrunk
    pieces[1, 1] = torch.tensor([1.0, 1.0])  # feature 1: turned by 45 degrees
    cosines, ratios = mmcs_and_ml2r(pieces, W)  # on the axis of features, whose basis is the identity
    assert_close(cosines, torch.tensor([1.0, math.sqrt(0.5)]))
    assert_close(ratios, torch.tensor([0.9, math.sqrt(2) / 2]))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
def test_features_in_a_rotated_basis_are_measured_in_it(d_in, d_out, n, seed):
    generator = torch.Generator().manual_seed(seed)
    W, pieces = torch.randn(d_in, d_out, generator=generator), torch.randn(n, d_in, d_out, generator=generator)
    turned, _ = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))
    in_basis = SiteTruth(d_in, torch.ones(1, d_in, dtype=torch.bool), "in", turned.T.contiguous())
    plain = mmcs_and_ml2r(pieces, W)
    other = mmcs_and_ml2r(in_basis.effects(turned @ pieces), in_basis.effects(turned @ W))
    assert_close(plain[0], other[0], atol=1e-4, rtol=1e-4)
    assert ((plain[0] <= 1 + 1e-6) & (plain[0] >= -1 - 1e-6)).all() and (plain[1] >= 0).all()


def test_no_pieces_at_all_score_nothing():
    cosines, ratios = mmcs_and_ml2r(torch.zeros(0, 2, 3), torch.ones(2, 3))
    assert cosines.tolist() == ratios.tolist() == [0, 0]


def test_what_nothing_sees_does_not_count():
    W = torch.tensor([[3.0, 4.0, 0.0], [0.0, 2.0, 5.0]])
    pieces = one_a_feature(W)
    pieces[0, 0, 2], pieces[1, 1, 2] = 70.0, -70.0
    known = SiteTruth(2, torch.eye(2, dtype=torch.bool), "in", torch.eye(2), visible=torch.eye(3)[:, :2])
    cosines, ratios = mmcs_and_ml2r(known.effects(pieces), known.effects(W))
    assert_close(cosines, torch.ones(2))
    assert_close(ratios, torch.ones(2))


def test_entries_of_which_either_is_right_do_not_count():
    truth, result, either = torch.eye(3, dtype=torch.bool), torch.eye(3), torch.zeros(3, 3, dtype=torch.bool)
    result[0, 1], result[2, 2] = 1.0, 0.4
    assert pattern_errors(result, truth) == pattern_errors(result, truth, either) == (2, 9)
    either[0, 1] = True
    assert pattern_errors(result, truth, either) == (1, 8)
    either[2, 2] = True
    assert pattern_errors(result[:, [2, 0, 1]], truth, either) == (0, 7)


def test_patterns_are_compared_under_the_best_matching():
    truth = torch.eye(3, dtype=torch.bool)
    result = torch.zeros(3, 5)
    result[[0, 1, 2], [4, 0, 2]] = 1.0
    assert pattern_errors(result, truth) == (0, 9)
    assert pattern_errors(result + 0.05, truth) == (0, 9)
    extra = result.clone()
    extra[1, 1] = 0.5
    assert pattern_errors(extra, truth) == (1, 9)
    assert pattern_errors(result[:, [0, 2]], truth) == (1, 9)
    assert pattern_errors(torch.ones(3, 3), truth) == (6, 9)
    assert pattern_errors(torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bool)) == (0, 6)


def test_a_dense_site_has_as_many_pieces_as_it_should():
    g = torch.zeros(4, 5)
    g[[0, 1, 3], 4], g[[1, 2], 0] = 1.0, 0.95
    assert count_errors(g, 2) == 0
    assert count_errors(g, 3) == 1  # one is missing
    assert count_errors(g[:, [0, 4]], 3) == 1  # there is no third piece at all
    assert count_errors(g, 1) == 2  # two importances of one that should not be there
    g[[0, 1, 2, 3], 1] = 0.6
    assert count_errors(g, 2) == 3  # always half on: it pushes out the second, and is never fully needed


def test_overlap_is_one_at_exactly_the_latents_tokens():
    latents = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]], dtype=torch.bool)
    g = torch.tensor([[1.0, 0.5], [1.0, 0.5], [0.0, 0.5], [0.0, 0.5]])
    assert_close(overlap(latents, g), torch.tensor([[1.0, 1 / 3], [0.0, 0.5 / 2.5]]))


def perfect(toy: TMS, C: int):
    """A target and the decomposition that is its truth: piece c is feature c, important where the feature is on; others are 0."""
    model = toy.build(0)
    vpd = new_decomposition(model, VPDConfig(C=C, gamma=GAMMA))
    n, m = toy.n_features, toy.n_hidden
    with torch.no_grad():
        for parameter in vpd.parameters():
            parameter.zero_()
        W = model.embed.weight.T
        vpd.V["embed"][:, :n], vpd.U["embed"][:n] = torch.eye(n), W
        vpd.V["unembed"][:, :n], vpd.U["unembed"][:n] = W.T, torch.eye(n)
        sign = torch.zeros(2 * C + (C if toy.identity else 0), 2)
        sign[:n, 0], sign[-C : -C + n] = 100.0, torch.tensor([100.0, -100.0])
        if toy.identity:
            vpd.V["identity"][:, :m], vpd.U["identity"][:m] = torch.eye(m), torch.eye(m)
            sign[C : C + m] = torch.tensor([100.0, -100.0])
        # |a| · 100 from two GELU units, so that any activation makes a subcomponent important.
        vpd.gamma.w_in.copy_(sign)
        vpd.gamma.w_out.copy_(sign.abs())
    return model, vpd


@pytest.mark.parametrize("identity", [False, True])
def test_the_true_decomposition_of_tms_scores_as_true(identity):
    toy = TMS(5, 2, identity=identity)
    model, vpd = perfect(toy, C=7)
    x = toy.batches(8, seed=3).at(0)
    result = ground_truth(RankOne(vpd, model), model, x, toy.truth(model))
    rows = result.sites.set_index("site")
    for site in ("embed", "unembed"):
        assert rows.loc[site, "mmcs"] == pytest.approx(1, abs=1e-6) and rows.loc[site, "ml2r"] == pytest.approx(
            1, abs=1e-6
        )
        assert np.isnan(rows.loc[site, "together"])
    assert (rows["alive"] == rows["true"]).all() and rows.loc["embed", "pattern_errors"] == 0
    if identity:
        assert rows.loc["identity", "true"] == 2 and rows.loc["identity", "together"] > 0.99
        assert rows.loc["identity", "pattern_errors"] == 0 and np.isnan(rows.loc["identity", "mmcs"])
    assert (rows["count_errors"] == 0).all()
    assert result.reconstruction["unmasked"] < 1e-12 and result.reconstruction["importances"] < 1e-9
    with torch.no_grad():
        without = (model(x) - model.unembed.bias.relu()).square().mean()
    assert result.reconstruction["zero"] == pytest.approx(float(without), rel=1e-5)
    assert len(result.latents) == 0 and len(result.needed) == 0


def test_reconstruction_is_that_of_edited_weights():
    toy = TMS(4, 2)
    model = toy.build(1)
    vpd = new_decomposition(model, VPDConfig(C=3, gamma=GAMMA, seed=4))
    with torch.no_grad():
        model.unembed.bias.fill_(0.3)
        vpd.gamma.b_out.copy_(torch.linspace(-0.2, 1.2, 6))
        vpd.gamma.w_out.mul_(0.3)
    x = toy.batches(2, seed=5).at(0) + 0.3
    result = ground_truth(RankOne(vpd, model), model, x, toy.truth(model))
    g = RankOne(vpd, model).importances(x)
    V, U = ({name: part.detach().double().numpy() for name, part in matrices.items()} for matrices in (vpd.V, vpd.U))
    W, b = model.embed.weight.detach().double().numpy().T, model.unembed.bias.detach().double().numpy()
    flat = x.flatten(0, 1).double().numpy()
    target = np.maximum(flat @ W @ W.T + b, 0)
    for name, masks in {"importances": g, "rounded": {k: (v > 0.5).float() for k, v in g.items()}}.items():
        errors = []
        for row, m1, m2, wanted in zip(
            flat, *(masks[s].flatten(0, 1).double().numpy() for s in ("embed", "unembed")), target, strict=True
        ):
            edited = np.maximum(row @ (V["embed"] * m1) @ U["embed"] @ (V["unembed"] * m2) @ U["unembed"] + b, 0)
            errors.append(((edited - wanted) ** 2).mean())
        assert result.reconstruction[name] == pytest.approx(float(np.mean(errors)), rel=1e-4)
    assert result.reconstruction["adversarial"] > result.reconstruction["stochastic"] > 0


class Written:
    """Importances written down by hand."""

    def __init__(self, g: dict[str, torch.Tensor], pieces: dict[str, torch.Tensor]) -> None:
        self.g, self._pieces = g, pieces

    def pieces(self, site):
        return self._pieces[site]

    def importances(self, inputs):
        return self.g

    def output(self, inputs, masks):
        return masks["embed"][..., :3].expand(inputs.shape)


def test_dead_pieces_do_not_count_and_latents_find_their_subcomponent():
    toy = TMS(3, 2)
    model = toy.build(0)
    W = model.embed.weight.detach().T
    pieces = torch.cat([0.5 * one_a_feature(W), 1e-9 * one_a_feature(W)])
    pieces[1] = 0.5 * pieces[1].flip(-1)
    g = torch.zeros(4, 2, 6)
    g[0, :, 0], g[1, 0, 1], g[2, 1, 2] = 1.0, 0.2, 1e-5
    inputs = torch.rand(4, 2, 3)
    latents = {"a": g[..., 0] > 0, "b": g[..., 1] > 0}
    one_each = torch.eye(3, dtype=torch.bool)
    truth = Truth(inputs, {"embed": SiteTruth(3, one_each.repeat(3, 1)[:8], "in", torch.eye(3))}, latents)
    result = ground_truth(Written({"embed": g}, {"embed": pieces}), model, inputs, truth)
    row = result.sites.iloc[0]
    assert row["alive"] == 3 and row["mmcs_all"] == pytest.approx(1, abs=1e-6) and row["mmcs"] < 0.99
    rows = result.latents.set_index("latent")
    assert rows.loc["a", "subcomponent"] == "embed:0" and rows.loc["a", "overlap"] == pytest.approx(1)
    assert rows.loc["b", "subcomponent"] == "embed:1" and rows.loc["b", "overlap"] == pytest.approx(0.2)
    assert (rows["chance"] < 1).all() and rows["tokens"].tolist() == [2, 1]


def test_where_a_site_is_needed_is_set_beside_its_largest_importance():
    toy = TMS(3, 2)
    model = toy.build(0)
    W = model.embed.weight.detach().T
    g = torch.zeros(2, 3, 3)
    g[0, 0, 0], g[0, 0, 1], g[0, 1, 2], g[1, 2, 2] = 1.0, 0.75, 0.5, 1.0
    where = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    truth = Truth(torch.rand(2, 3, 3), needed={"embed": where})
    result = ground_truth(Written({"embed": g}, {"embed": one_a_feature(W)}), model, truth.probe, truth)
    row = result.needed.set_index("site").loc["embed"]
    assert row["tokens"] == pytest.approx(2 / 6)
    assert row["overlap"] == pytest.approx(1.5 / 3)  # 1 and 0.5 of two tokens, and one where it is not needed
    assert row["here"] == pytest.approx(1.0) and row["elsewhere"] == pytest.approx(0.25)
    assert 0 <= row["chance"] <= 1 and len(result.sites) == 0


def test_a_truth_needs_both_axis_and_basis():
    with pytest.raises(ValueError, match="both axis and basis"):
        SiteTruth(2, torch.ones(1, 2, dtype=torch.bool), axis="in")
