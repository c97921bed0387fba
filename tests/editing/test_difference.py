"""Hand-made changes of known subcomponents are found exactly; with data, what counts is the output."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.editing.conftest import OUT, WO, Q
from tests.editing.test_apply import edited_model
from tests.tiny import decomposition_of, draw, matrix_of, some_tokens, tiny_model
from tl_vpd.editing import DifferenceConfig, add, bake, explain_difference, remove, scale, write_direction
from tl_vpd.editing.tangent import explain


@pytest.fixture(scope="module")
def wide():
    """A model wide enough that its subcomponents are not in each other's span."""
    model = tiny_model(d_model=32, n_heads=4, d_head=8, d_mlp=48, rotary_dim=8)
    return model, decomposition_of(model, C=24).double()


@pytest.mark.parametrize("with_data", [False, True])
def test_hand_made_changes_are_found_exactly(wide, with_data):
    model, vpd = wide
    prompts = some_tokens(seed=3, shape=(16, 9)) if with_data else None
    direction = draw(32, seed=1) - 0.5
    u = vpd.U[WO][7].detach()
    new = u + direction - (direction @ u) / (u @ u) * u  # another direction, the same strength
    edit = remove(vpd, f"{OUT}:5") + scale(vpd, f"{Q}:11", 2.5) + write_direction(vpd, f"{WO}:7", new)
    found = explain_difference(vpd, model, edited_model(model, vpd, edit), prompts=prompts)
    table = found.to_pandas().set_index("subcomponent")
    assert set(table.index) == {f"{OUT}:5", f"{Q}:11", f"{WO}:7"}
    for name, strength in ((f"{OUT}:5", -1.0), (f"{Q}:11", 1.5), (f"{WO}:7", 0.0)):
        assert table["strength"][name] == pytest.approx(strength, abs=1e-6)
        assert table["fraction"][name] == pytest.approx(1.0, abs=1e-6)
        assert table["read"][name] == pytest.approx(0.0, abs=1e-6)
        piece = next(p for p in edit.pieces if p.name == name)
        assert table["norm"][name] == pytest.approx(piece.norm, rel=1e-6)
    assert table["write"][f"{OUT}:5"] == pytest.approx(0.0, abs=1e-6)
    assert table["write"][f"{WO}:7"] == pytest.approx(table["norm"][f"{WO}:7"], rel=1e-6)
    assert found.sites["explained"].tolist() == pytest.approx([1.0] * 3, abs=1e-9)
    assert found.sites["explained_norm"].tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    for site in edit.sites:
        assert_close(found.keep([c for c in edit.subcomponents if c.site == site]).delta(site), edit.delta(site))
    if with_data:
        x = model_inputs(vpd, model, prompts)[OUT].flatten(0, 1)
        rms = (x @ edit.delta(OUT)).square().sum(-1).mean().sqrt()
        assert table["effect"][f"{OUT}:5"] == pytest.approx(float(rms), rel=1e-3)


def model_inputs(vpd, model, prompts):
    from tl_vpd.forward import MaskedModel

    with MaskedModel(vpd, model) as masked_model:
        return masked_model.clean(prompts)[1]


def test_changes_of_read_directions_too(wide):
    _, vpd = wide
    V, U = vpd.V[OUT].detach(), vpd.U[OUT].detach()
    e = draw(48, seed=2) - 0.5
    e = e - V[:, [3]] @ torch.linalg.pinv(V[:, [3]]) @ e
    delta = 0.5 * torch.outer(V[:, 3], U[3]) + torch.outer(e, U[3])
    explained = explain(delta, V, U, None, pieces=4, smallest=1e-6)
    assert explained.indices == [3]
    writes, reads = explained.changes([3])
    assert_close(writes, 0.5 * U[[3]])
    assert_close(reads, e[None])
    assert float(rest_of(explained, delta, [3]).norm()) < 1e-9


def rest_of(explained, delta, indices):
    writes, reads = explained.changes(indices)
    at = [explained.indices.index(i) for i in indices]
    return delta - explained.V[:, at] @ writes - reads.T @ explained.U[at]


def test_what_is_left_is_the_least_squares_rest(wide):
    """For the chosen subcomponents, all or a part of them, no other D and E do better: the rest is orthogonal to all of them."""
    _, vpd = wide
    V, U, delta = vpd.V[OUT].detach(), vpd.U[OUT].detach(), draw(48, 32, seed=8) - 0.5
    X = draw(60, 48, seed=9) - 0.5
    moment = X.T @ X / 60
    values, vectors = torch.linalg.eigh(moment)
    root = vectors @ (values.sqrt()[:, None] * vectors.T)
    e = explain(delta, V, U, root, pieces=3, smallest=1e-6)
    assert len(e.indices) == 3
    for indices in (e.indices, e.indices[1:]):
        rest = rest_of(e, delta, indices)
        assert_close(V[:, indices].T @ moment @ rest, 0 * rest[: len(indices)], atol=1e-9, rtol=0)
        assert_close(moment @ rest @ U[indices].T, 0 * rest[:, : len(indices)], atol=1e-9, rtol=0)
    one = explain(delta, V, U, root, pieces=1, smallest=1e-6)

    def size(rest):
        return float((root @ rest).square().sum())

    single = []
    for c in range(24):  # the first choice is the best of all single ones
        P = torch.outer(root @ V[:, c], root @ V[:, c]) / (root @ V[:, c]).square().sum()
        Pu = torch.outer(U[c], U[c]) / U[c].square().sum()
        left = root @ delta - P @ root @ delta
        single.append(float((left - left @ Pu).square().sum()))
    assert size(rest_of(one, delta, one.indices)) == pytest.approx(min(single)) and one.indices == [
        single.index(min(single))
    ]


def test_kept_and_undone(wide, tokens):
    model, vpd = wide
    edit = scale(vpd, [f"{OUT}:5", f"{Q}:11", f"{WO}:7"], -2.0)
    finetuned = edited_model(model, vpd, edit)
    found = explain_difference(vpd, model, finetuned, prompts=some_tokens(seed=3, shape=(16, 9)))
    before, after = model(tokens), finetuned(tokens)
    names = found.named(3)
    with vpd.attach(model) as attached, attached.edited(found.keep(names)):
        assert_close(model(tokens), after, atol=1e-6, rtol=1e-6)
    with vpd.attach(finetuned, check_weights=False) as attached:
        with attached.edited(found.undo(names)):
            assert_close(finetuned(tokens), before, atol=1e-6, rtol=1e-6)
        with attached.edited(found.undo(names[:1])):
            assert float((finetuned(tokens) - before).detach().abs().max()) > 1e-3
    bake(found.undo(names), finetuned)
    assert_close(finetuned(tokens), before, atol=1e-6, rtol=1e-6)


def test_contributions_to_the_output_add_up(wide):
    """Integrated along the path they sum to the difference of the losses, to the error of the midpoint rule."""
    model, vpd = wide
    edit = scale(vpd, [f"{OUT}:5", f"{Q}:11", f"{WO}:7"], 2.0)
    prompts, finetuned = some_tokens(seed=3, shape=(8, 9)), edited_model(model, vpd, edit)

    def loss(logits):
        return -logits[:, -1].log_softmax(-1)[:, 2].mean()

    config = DifferenceConfig(steps=20)
    found = explain_difference(vpd, model, finetuned, prompts=prompts, loss=loss, config=config)
    with torch.no_grad():
        expected = float(loss(finetuned(prompts)) - loss(model(prompts)))
        p, q = (m(prompts).log_softmax(-1) for m in (model, finetuned))
        kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert found.table["output"].sum() == pytest.approx(expected, rel=1e-2)
    assert found.table["output"].abs().is_monotonic_decreasing
    config = DifferenceConfig(steps=20, batch_size=3)
    found = explain_difference(vpd, model, finetuned, prompts=prompts, config=config)
    assert found.table["output"].sum() == pytest.approx(kl, rel=1e-2)
    with pytest.raises(ValueError, match="A loss does nothing without prompts"):
        explain_difference(vpd, model, finetuned, loss=loss)


def test_contributions_do_not_depend_on_the_batches_of_padded_prompts(padded):
    model, vpd, tokens = padded
    finetuned = edited_model(model, vpd, scale(vpd, [f"{OUT}:5", f"{Q}:1"], 2.0))
    one, all_rows = (
        explain_difference(vpd, model, finetuned, prompts=tokens, config=DifferenceConfig(batch_size=n)).table["output"]
        for n in (1, 4)
    )
    assert one.tolist() == pytest.approx(all_rows.tolist(), rel=1e-9)


def test_a_piece_outside_is_the_rest(wide):
    model, vpd = wide
    edit = add(vpd, OUT, draw(48) - 0.5, draw(32) - 0.5)
    found = explain_difference(vpd, model, edited_model(model, vpd, edit), config=DifferenceConfig(pieces=1))
    assert 0 < found.sites["explained"][0] < 0.9 and len(found.table) == 1


def test_refused_and_warned(model, vpd):
    with pytest.raises(ValueError, match="has the same weights at every decomposed site"):
        explain_difference(vpd, model, copy.deepcopy(model))
    with pytest.raises(ValueError, match="W_in is 8x16 in this model and 8x12"):
        explain_difference(vpd, model, tiny_model(d_mlp=16))
    other = edited_model(model, vpd, remove(vpd, f"{OUT}:1"))
    with torch.no_grad():
        other.embed.W_E += 1
    with pytest.warns(RuntimeWarning, match="1 parameters that are not decomposed, embed.W_E among them"):
        found = explain_difference(vpd, model, other)
    assert float((matrix_of(other, OUT) - matrix_of(model, OUT)).norm()) == pytest.approx(found.sites["norm"][0])
    with pytest.raises(KeyError, match="is not among the changed subcomponents"):
        found.keep(f"{Q}:1")
