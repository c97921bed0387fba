"""Edits as data: what they change, how they print, compose, invert and are stored."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.editing.conftest import OUT, WO, Q
from tests.tiny import decomposition_of, draw, tiny_model
from tl_vpd.editing import Edit, add, remove, scale, swap, write_direction, write_token


def test_what_each_edit_changes(vpd):
    V, U = vpd.V[OUT].detach(), vpd.U[OUT].detach()
    vector = draw(8, seed=1)
    for edit, write in (
        (remove(vpd, f"{OUT}:2"), 0 * U[2]),
        (scale(vpd, f"{OUT}:2", 0.25), 0.25 * U[2]),
        (write_direction(vpd, f"{OUT}:2", vector), vector),
    ):
        assert_close(edit.delta(OUT), torch.outer(V[:, 2], write - U[2]))
        assert_close(torch.tensor(edit.to_pandas()["norm"][0]).double(), edit.delta(OUT).norm())
    read, write = draw(12, seed=2), draw(8, seed=3)
    assert_close(add(vpd, OUT, read, write).delta(OUT), torch.outer(read, write))
    two = scale(vpd, [f"{OUT}:0", f"{OUT}:5"], 3.0)
    assert_close(two.delta(OUT), V[:, [0, 5]] @ (2 * U[[0, 5]]))


def test_a_token_is_written_with_the_sign_of_the_mean_activation(model, vpd, tokens):
    g, acts = vpd.causal_importances(model, tokens), vpd.component_acts(model, tokens)
    signs = set()
    for c in range(6):
        important = g[OUT][..., c] > 0
        if not bool(important.any()):
            continue
        sign = 1.0 if float(acts[OUT][..., c][important].mean()) > 0 else -1.0
        signs.add(sign)
        column = model.unembed.W_U[:, 7].detach()
        new = sign * 2.5 * column / column.norm()
        edit = write_token(vpd, model, tokens, f"{OUT}:{c}", 7, alpha=2.5)
        assert_close(edit.pieces[0].write + edit.pieces[0].change, new)
    assert signs == {1.0, -1.0}


def test_swapped_directions_are_scaled_by_the_ratio_of_activations(model, vpd, tokens):
    g, acts = vpd.causal_importances(model, tokens), vpd.component_acts(model, tokens)

    def mean(site, c):
        return float(acts[site][..., c][g[site][..., c] > 0].mean())

    firing = [(site, c) for site in (OUT, WO) for c in range(6) if bool((g[site][..., c] > 0).any())]
    (a, i), (b, j) = firing[0], firing[-1]
    assert a != b
    ratio = mean(b, j) / mean(a, i)
    edit = swap(vpd, model, tokens, f"{a}:{i}", f"{b}:{j}")
    new = [p.write + p.change for p in edit.pieces]
    assert_close(new[0], ratio * vpd.U[b][j].detach())
    assert_close(new[1], vpd.U[a][i].detach() / ratio)
    assert len(swap(vpd, model, tokens, f"{a}:{i}", f"{b}:{j}", both=False)) == 1


def test_it_has_copies_of_the_directions(vpd):
    edit = remove(vpd, f"{OUT}:2")
    expected = edit.delta(OUT)
    with torch.no_grad():
        vpd.U[OUT][2] += 1.0
    assert_close(edit.delta(OUT), expected)


def test_print_table_and_sum(vpd, edit):
    text = str(edit)
    assert text.startswith("Edit of 4 weights, rank-one changes: 5\n") and f"{OUT}:2" in text and "removed" in text
    table = edit.to_pandas()
    assert table["relative"][0] == pytest.approx(1.0) and table["relative"][1] == pytest.approx(1.5)
    assert edit.top(2)["norm"].is_monotonic_decreasing and len(edit.top(2)) == 2
    assert [str(c) for c in edit.subcomponents] == [f"{OUT}:2", f"{Q}:1", f"{Q}:4", f"{WO}:0"]
    with pytest.raises(ValueError, match=f"change the write direction of {Q}:1"):
        edit + remove(vpd, f"{Q}:1")
    assert len(edit + add(vpd, Q, draw(8), draw(8))) == 6


def test_edits_of_two_models_do_not_add(vpd):
    other = decomposition_of(tiny_model(seed=5)).double()
    with pytest.raises(ValueError, match="The edits are of different models"):
        remove(vpd, f"{OUT}:2") + remove(other, f"{Q}:2")


def test_the_inverse_takes_it_back(edit):
    for site in edit.sites:
        assert torch.equal((-edit).delta(site), -edit.delta(site))
        assert torch.equal(edit.inverse().inverse().delta(site), edit.delta(site))


def test_saved_and_loaded(edit, tmp_path):
    path = edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(path)
    assert (
        str(loaded) == str(edit) and loaded.fingerprints == edit.fingerprints and loaded.processing == edit.processing
    )
    for mine, theirs in zip(edit.pieces, loaded.pieces, strict=True):
        assert (mine.site, mine.index, mine.about) == (theirs.site, theirs.index, theirs.about)
        assert all(torch.equal(getattr(mine, k), getattr(theirs, k)) for k in ("read", "write", "change"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged, its checksum differs"):
        Edit.load(path)


def test_other_files_are_not_edits(vpd, tmp_path):
    vpd.save(tmp_path)
    with pytest.raises(ValueError, match=r"is not an edit: give a file that Edit\.save wrote\.$"):
        Edit.load(tmp_path / "decomposition.safetensors")
    with pytest.raises(FileNotFoundError):
        Edit.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda v, m, t: scale(v, f"{OUT}:1", 1.0), ValueError, "factor=1 changes nothing"),
        (lambda v, m, t: scale(v, f"{OUT}:1", float("nan")), ValueError, "factor=nan: give a finite number"),
        (lambda v, m, t: write_token(v, m, t, f"{OUT}:1", 3, alpha=0.0), ValueError, "alpha=0 would write nothing"),
        (
            lambda v, m, t: write_token(v, m, t, f"{OUT}:1", 3, alpha=float("nan")),
            ValueError,
            "alpha=nan: give a finite",
        ),
        (lambda v, m, t: write_token(v, m, t, f"{OUT}:1", 99), IndexError, "the vocabulary has tokens 0 to 10"),
        (lambda v, m, t: write_token(v, m, t, f"{Q}:1", 3), ValueError, "does not write into the residual stream"),
        (lambda v, m, t: swap(v, m, t, f"{Q}:1", f"{WO}:1"), ValueError, "do not write into the same space"),
        (lambda v, m, t: swap(v, m, t, f"{Q}:1", f"{Q}:1"), ValueError, "cannot be swapped with itself"),
        (lambda v, m, t: write_direction(v, f"{OUT}:1", torch.ones(7)), ValueError, "give 8 real numbers"),
        (lambda v, m, t: write_direction(v, f"{OUT}:1", v.U[OUT][1]), ValueError, "is the present write direction"),
        (lambda v, m, t: add(v, OUT, torch.zeros(12), torch.ones(8)), ValueError, "the piece would change nothing"),
        (lambda v, m, t: remove(v, []), ValueError, "There are no subcomponents to edit"),
        (lambda v, m, t: remove(v, f"{OUT}:6"), IndexError, "does not exist"),
        (lambda v, m, t: remove(v, "blocks.1.mlp.W_ou:1"), KeyError, "did you mean"),
    ],
)
def test_refused_in_a_sentence(model, vpd, tokens, call, error, match):
    with pytest.raises(error, match=match) as raised:
        call(vpd, model, tokens)
    assert "\n" not in str(raised.value)


def test_a_dead_subcomponent_is_warned_of_with_its_frequency(model, vpd, tokens):
    with torch.no_grad():
        vpd.gamma.unembed.bias -= 100.0
    with pytest.warns(RuntimeWarning, match=r"W_out:1 is important at 0 of 14 tokens \(frequency 0\)"):
        write_token(vpd, model, tokens, f"{OUT}:1", 3)
