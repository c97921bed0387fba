"""Pictures of what was found of a toy."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tl_vpd.evaluation.truth import SiteTruth, Truth
from tl_vpd.toys import TMS
from tl_vpd.viz.ground_truth import ground_truth, needed


class Columns:
    """The truth itself as pieces, in another order, with a dead one between."""

    def __init__(self, model, order):
        W = {"embed": model.embed.weight.detach().T, "unembed": model.unembed.weight.detach().T}
        self.by_site = {}
        for name, weight in W.items():
            axis = 0 if name == "embed" else 1
            n = weight.shape[axis]
            eye = torch.eye(n)
            matrices = [eye[j][:, None] * weight if axis == 0 else weight * eye[j] for j in order]
            self.by_site[name] = torch.stack([*matrices, torch.zeros_like(weight)])

    def pieces(self, site):
        return self.by_site[site]

    def importances(self, inputs):
        rows, pos = inputs.shape[:2]
        alive = torch.tensor([1.0] * (len(self.by_site["embed"]) - 1) + [0.0])
        return {site: alive.expand(rows, pos, -1) for site in self.by_site}

    def output(self, inputs, masks):
        raise AssertionError("A picture needs no output.")


@pytest.mark.parametrize(("features", "hidden"), [(4, 2), (5, 3)])
def test_every_piece_lies_on_its_feature(features, hidden):
    toy = TMS(features, hidden)
    model = toy.build(0)
    truth = toy.truth(model)
    order = list(torch.randperm(features, generator=torch.Generator().manual_seed(1)))
    result = Columns(model, order)
    for name, known in truth.sites.items():
        weight = {"embed": model.embed, "unembed": model.unembed}[name].weight.detach().T
        true, effects = known.effects(weight), known.effects(result.pieces(name)[:-1])
        for piece, j in enumerate(order):
            assert_close(effects[piece, j], true[j])
    figure = ground_truth(result, model, toy.batches(2, seed=0).at(0), truth)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [f"{n}: {features} alive of {features} true" for n in truth.sites]
    if hidden == 2:
        arrows = [note.xy for note in panels[0].texts if not note.get_text()]
        for line, end in zip(panels[0].lines, arrows, strict=True):
            assert line.get_xydata()[1] == pytest.approx(end)
    else:
        drawn = torch.as_tensor(panels[0].images[0].get_array())
        assert_close(drawn.diagonal(), torch.ones(features, dtype=drawn.dtype))


def test_a_truth_without_features_has_nothing_to_show():
    model = TMS(3, 2).build(0)
    dense = Truth(torch.zeros(1, 1, 3), {"embed": SiteTruth(2, torch.ones(1, 2, dtype=torch.bool))})
    with pytest.raises(ValueError, match="None of embed has one subcomponent per feature"):
        ground_truth(Columns(model, [0, 1, 2]), model, torch.zeros(1, 1, 3), dense)


class Fixed:
    """Importances written down."""

    def __init__(self, g):
        self.g = g

    def importances(self, inputs):
        return {site: values[: len(inputs)] for site, values in self.g.items()}

    def pieces(self, site):
        raise AssertionError("This picture needs no pieces.")

    output = Columns.output


def test_where_sites_are_needed_is_framed_over_their_largest_importance():
    probe = torch.tensor([[7, 8, 9], [9, 8, 7]])
    g = {"a": torch.tensor([[[0.2, 0.9], [0.0, 0.0], [0.4, 0.1]]]), "b": torch.zeros(1, 3, 1)}
    where = torch.tensor([[0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    truth = Truth(probe, needed={"a": where, "b": ~where})
    (axes, _) = needed(Fixed(g), truth, row=1).axes
    assert_close(torch.as_tensor(axes.images[0].get_array()), torch.tensor([[0.9, 0.0, 0.4], [0.0, 0.0, 0.0]]))
    frames = [(round(p.get_x() + 0.46), round(p.get_y() + 0.42)) for p in axes.patches]
    assert frames == [(0, 0), (2, 0), (1, 1)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["9", "8", "7"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_where_sites_are_needed_has_to_be_known_and_the_row_to_exist():
    with pytest.raises(ValueError, match="does not say where"):
        needed(Fixed({}), Truth(torch.zeros(1, 2, dtype=torch.long)))
    with pytest.raises(IndexError, match="rows 0 to 0"):
        needed(Fixed({}), Truth(torch.zeros(1, 2, dtype=torch.long), needed={"a": torch.ones(1, 2).bool()}), row=1)
