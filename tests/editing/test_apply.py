"""An edit on an attached model is the model with the edit in its weights, unmasked and under every mode."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close

from tests.editing.conftest import OUT, WO, Q, deltas
from tests.tiny import ARCHITECTURES, decomposition_of, draw, matrix_of, options_of, some_tokens, tiny_model, weight_of
from tl_vpd.editing import add, remove, scale, write_direction

MODES = ("unmasked", "stochastic", "rounded", "ci", "adversarial", "zero")


def edited_model(model, vpd, edit):
    """A copy of the model with every outer product added to its weights, written out."""
    other = copy.deepcopy(model)
    for site, delta in deltas(vpd, edit).items():
        new, stored = matrix_of(model, site) + delta, weight_of(other, site)
        if site.endswith(("W_Q", "W_K", "W_V")):
            new = torch.stack(new.chunk(stored.shape[0], dim=1))
        elif site.endswith("W_O"):
            new = torch.stack(new.chunk(stored.shape[0], dim=0))
        with torch.no_grad():
            stored.copy_(new)
    return other


def edited_decomposition(vpd, edit):
    """A copy with the new write directions: what the edited model decomposes into, with the same Δ but for added pieces."""
    other = copy.deepcopy(vpd)
    with torch.no_grad():
        for piece in edit.pieces:
            if piece.index is not None:
                other.U[piece.site][piece.index] = piece.write + piece.change
    return other


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inside_the_model_is_the_edited_one(name):
    model = tiny_model(**ARCHITECTURES[name])
    vpd, tokens = decomposition_of(model).double(), some_tokens()
    sites = [n for n in vpd.sites if n.startswith("blocks.1.")]
    edit = scale(vpd, [f"{n}:{i}" for i, n in enumerate(sites[:6])], -1.5)
    expected, clean = edited_model(model, vpd, edit)(tokens), model(tokens)
    assert bool(((expected - clean).abs() > 1e-2).any())
    with vpd.attach(model) as attached:
        with attached.edited(edit):
            assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(model(tokens), clean)
    assert torch.equal(model(tokens), clean)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("delta", [None, 0.3])
def test_under_masks_it_is_the_decomposition_of_the_edited_model(model, vpd, tokens, edit, mode, delta):
    """Importances included: Γ reads what the edited model passes to its sites."""
    options = options_of(mode, threshold=0.3, seed=3, steps=3, delta=delta)
    other, other_vpd = edited_model(model, vpd, edit), edited_decomposition(vpd, edit)
    with other_vpd.attach(other, check_weights=False) as attached, attached.masked(mode, **options):
        expected = other(tokens)
    with vpd.attach(model) as attached:
        with attached.edited(edit), attached.masked(mode, **options):
            assert_close(model(tokens), expected, rtol=1e-9, atol=1e-9)
        with attached.masked(mode, **options), attached.edited(edit):
            assert_close(model(tokens), expected, rtol=1e-9, atol=1e-9)


def test_ablations_patches_and_caches_see_the_edit(model, vpd, tokens, edit):
    other, other_vpd = edited_model(model, vpd, edit), edited_decomposition(vpd, edit)
    results = []
    for m, v, e in ((other, other_vpd, None), (model, vpd, edit)):
        with v.attach(m, check_weights=False) as attached:
            context = nullcontext() if e is None else attached.edited(e)
            with context, attached.ablated([f"{WO}:0", f"{Q}:2"]):
                ablated = m(tokens)
            context = nullcontext() if e is None else attached.edited(e)
            double = (v.sites[Q].hook_name("component_acts"), lambda acts, hook: 2 * acts)
            with context:
                patched = m.run_with_hooks(tokens, fwd_hooks=[double])
                _, cache = m.run_with_cache(tokens)
        results.append((ablated, patched, cache))
    assert_close(results[1][0], results[0][0], rtol=1e-9, atol=1e-9)
    assert_close(results[1][1], results[0][1], rtol=1e-9, atol=1e-9)
    for key in results[0][2]:
        assert_close(results[1][2][key], results[0][2][key], rtol=1e-9, atol=1e-9, msg=key)


def test_with_inputs_and_results_by_head(model, vpd, tokens, edit):
    expected = edited_model(model, vpd, edit)(tokens)
    model.set_use_split_qkv_input(True)
    model.set_use_attn_result(True)
    with vpd.attach(model) as attached, attached.edited(edit):
        assert_close(model(tokens), expected, rtol=1e-9, atol=1e-9)


def test_edits_of_nested_contexts_add_up(model, vpd, tokens):
    first, second = remove(vpd, f"{OUT}:2"), scale(vpd, f"{Q}:1", 2.0)
    expected = edited_model(model, vpd, first + second)(tokens)
    with vpd.attach(model) as attached:
        with attached.edited(first):
            with attached.edited(second):
                assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
            assert_close(model(tokens), edited_model(model, vpd, first)(tokens), rtol=1e-10, atol=1e-10)
        with pytest.raises(ZeroDivisionError), attached.edited(first):
            1 / 0
        assert torch.equal(model(tokens), edited_model(model, vpd, first)(tokens)) is False
    with vpd.attach(model):
        clean = model(tokens)
    assert torch.equal(model(tokens), clean)


def test_generation_with_a_kv_cache(tokens):
    def generate(model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model.generate(tokens, max_new_tokens=9, do_sample=True, stop_at_eos=False, verbose=False)

    model = tiny_model(n_ctx=16)
    vpd = decomposition_of(model).double()
    edit = scale(vpd, [f"{OUT}:{i}" for i in range(6)], -40.0)
    expected = generate(edited_model(model, vpd, edit))
    with vpd.attach(model) as attached, attached.edited(edit):
        assert torch.equal(generate(model), expected)
    assert not torch.equal(generate(model), expected)


def test_residual_pieces_are_computed_with_the_edit(model, vpd, tokens):
    """What TransformerLens computes from the stored W_O is refused, as under masks."""
    with vpd.attach(model) as attached, attached.edited(remove(vpd, f"{WO}:1")):
        _, cache = model.run_with_cache(tokens)
    assert type(cache).__name__ == "MaskedCache"


def test_refused(model, vpd, tokens, edit):
    other = decomposition_of(model, seed=5).double()
    with (
        other.attach(model) as attached,
        pytest.raises(ValueError, match=r"This edit is of another decomposition: the read direction of .* differs by"),
    ):
        attached.edited(edit)
    smaller = decomposition_of(model, C=2).double()
    with smaller.attach(model) as attached, pytest.raises(ValueError, match="has 2 subcomponents here"):
        attached.edited(remove(vpd, f"{OUT}:4"))
    with vpd.attach(model) as attached:
        context = attached.edited(add(vpd, OUT, draw(12), draw(8)) + write_direction(vpd, f"{WO}:0", draw(8)))
    with pytest.raises(RuntimeError, match="nothing would be edited"), context:
        pass
