"""Leaving, by the door or by an exception, leaves everything as it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

from tests.hooks.snapshots import assert_same, snapshot
from tests.tiny import decomposition_of, options_of, tiny_model
from tl_vpd.forward import MaskedModel
from tl_vpd.hooks import attached_to


@pytest.fixture
def lived_in(model, tokens):
    """A model that its user has changed: hooks of three sorts, a frozen weight, a submodule in eval mode, gradients."""
    model(tokens, return_type="loss").backward()
    model.blocks[0].attn.W_Q.requires_grad_(False)
    model.blocks[1].mlp.eval()
    model.add_hook("blocks.0.attn.hook_z", lambda z, hook: z * 0.5)
    model.add_perma_hook("blocks.1.hook_resid_pre", lambda x, hook: x + 0.1)
    model.add_hook("blocks.1.hook_mlp_out", lambda g, hook: None, dir="bwd")
    model.blocks[0].register_forward_hook(lambda m, a, out: out + 0.01)
    return model


def test_leaving_by_the_door(lived_in, vpd, tokens):
    before, clean = snapshot(lived_in), lived_in(tokens)
    with vpd.attach(lived_in) as attached:
        assert torch.equal(lived_in(tokens), clean)
        for mode in ("stochastic", "rounded", "zero"):
            with attached.masked(mode, **options_of(mode, seed=0)):
                assert not torch.equal(lived_in(tokens), clean)
        with attached.masked("adversarial", steps=2), attached.ablated("blocks.0.mlp.W_in:1"):
            lived_in(tokens)
        lived_in.add_hook("blocks.0.hook_q_ci", lambda g, hook: None)
        lived_in(tokens)
    assert_same(before, snapshot(lived_in))
    assert torch.equal(lived_in(tokens), clean)


class Stop(Exception):
    pass


def stop(*_, **__):
    raise Stop


def test_leaving_by_an_exception(lived_in, vpd, tokens):
    before = snapshot(lived_in)
    with pytest.raises(Stop), vpd.attach(lived_in) as attached, attached.masked("rounded"):
        lived_in.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_q", stop)])
    assert_same(before, snapshot(lived_in))


@pytest.mark.parametrize(
    "where", ["blocks.0.hook_k_component_acts", "blocks.1.hook_out_mask", "blocks.0.hook_v_ci", "hook_embed"]
)
@pytest.mark.parametrize("mode", [None, "rounded", "adversarial"])
def test_an_exception_in_a_pass_does_not_poison_the_next(model, vpd, tokens, where, mode):
    def run():
        if mode is None:
            return model.run_with_cache(tokens, names_filter=lambda n: n.endswith("_ci"))
        with attached.masked(mode, **options_of(mode, seed=3, steps=2)):
            return model.run_with_cache(tokens, names_filter=lambda n: n.endswith("_ci"))

    with vpd.attach(model) as attached:
        expected, cache = run()
        with pytest.raises(Stop):
            if mode is None:
                model.run_with_hooks(tokens, fwd_hooks=[(where, stop)])
            else:
                with attached.masked(mode, **options_of(mode, seed=3, steps=2)):
                    model.run_with_hooks(tokens, fwd_hooks=[(where, stop)])
        again, cache_again = run()
        assert torch.equal(again, expected)
        assert all(torch.equal(cache[k], cache_again[k]) for k in cache)


def test_a_keyboard_interrupt_in_a_pass_does_not_poison_the_next(model, vpd, tokens):
    def interrupt(value, hook):
        raise KeyboardInterrupt

    clean = model(tokens)
    with vpd.attach(model) as attached:
        with pytest.raises(KeyboardInterrupt), attached.masked("rounded"):
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", interrupt)])
        assert torch.equal(model(tokens), clean)
    assert torch.equal(model(tokens), clean)


def test_an_exception_while_another_is_handled_still_checks_the_pass(model, vpd, tokens):
    recorded = []
    with vpd.attach(model):
        try:
            raise Stop
        except Stop:
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_q_ci", lambda g, hook: recorded.append(g))])
    assert len(recorded) == 1


def test_detaching_twice_is_the_same_as_once_and_masking_afterwards_is_refused(model, vpd, tokens):
    before, clean = snapshot(model), model(tokens)
    attached = vpd.attach(model)
    attached.detach()
    attached.detach()
    assert_same(before, snapshot(model))
    with pytest.raises(RuntimeError, match="detached"), attached.masked("zero"):
        pass
    with vpd.attach(model) as again:
        attached.detach()  # of the one that is gone: the other stays
        with again.masked("zero"):
            assert not torch.equal(model(tokens), clean)


def test_detaching_inside_a_masked_context_ends_the_masking(model, vpd, tokens):
    clean = model(tokens)
    attached = vpd.attach(model)
    with attached.masked("zero"):
        attached.detach()
        assert torch.equal(model(tokens), clean)


def test_a_second_decomposition_is_refused_until_the_first_is_gone(model, vpd):
    with vpd.attach(model):
        for other in (vpd, decomposition_of(model)):
            with pytest.raises(ValueError, match="attached to this model already"):
                other.attach(model)
    vpd.attach(model).detach()


def test_one_decomposition_on_two_models_at_once(model, vpd, tokens):
    other = tiny_model()
    with vpd.attach(model) as first, vpd.attach(other), first.masked("zero"):
        assert not torch.equal(model(tokens), other(tokens))
    assert torch.equal(model(tokens), other(tokens))


def test_a_forward_of_the_users_own_comes_back_and_one_put_on_later_stays(model, vpd, tokens):
    clean, plain = model(tokens), model.forward
    model.forward = lambda *a, **k: plain(*a, **k) + 1
    with vpd.attach(model) as attached, attached.masked("unmasked", delta=1.0):
        assert torch.equal(model(tokens), clean + 1)
    assert torch.equal(model(tokens), clean + 1)
    del model.forward
    attached = vpd.attach(model)
    wrapped = model.forward
    model.forward = lambda *a, **k: wrapped(*a, **k) + 2
    attached.detach()
    assert torch.equal(model(tokens), clean + 2)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_an_attached_model_is_the_model_with_nothing_attached(model, vpd, tokens, way):
    clean, before = model(tokens), snapshot(model)
    untouched = snapshot(COPIES[way](model))
    with vpd.attach(model) as attached:
        attached_state = snapshot(model)
        with attached.masked("zero"):
            other = COPIES[way](model)
            assert torch.equal(other(tokens), clean)
        assert_same(attached_state, snapshot(model))
        after = snapshot(other)
        assert other.hook_dict.keys() == before["hook_dict"].keys() and attached_to(other) is None
        for key in ("children", "state", "hooks", "training", "requires_grad", "attributes"):
            assert_same({key: untouched[key]}, {key: after[key]})
        with vpd.attach(other) as second, second.masked("zero"):
            assert not torch.equal(other(tokens), clean) and torch.equal(model(tokens), clean)
    assert other.blocks[0].attn.W_Q.data_ptr() != model.blocks[0].attn.W_Q.data_ptr()


def test_a_copy_has_the_users_hooks_and_forward(model, vpd, tokens):
    clean, plain = model(tokens), model.forward
    model.forward = lambda *a, **k: plain(*a, **k) + 1
    model.add_hook("blocks.1.hook_resid_post", lambda x, hook: x * 0)
    with vpd.attach(model):
        other = copy.deepcopy(model)
        expected = model(tokens)
    assert torch.equal(other.forward(tokens), expected) and not torch.equal(expected, clean)
    assert other.hook_dict["blocks.1.hook_resid_post"].fwd_hooks


def test_a_copy_made_inside_a_masked_model_is_the_model(model, vpd, tokens):
    clean, keys = model(tokens), set(vars(model))
    with MaskedModel(vpd, model) as masked_model:
        other = copy.deepcopy(model)
        masked_model.clean(tokens)
    assert torch.equal(other(tokens), clean) and set(vars(other)) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def test_the_copy_of_a_part_can_be_used_and_attached_to(model, vpd, tokens):
    with vpd.attach(model):
        block = copy.deepcopy(model.blocks[0])
    other = tiny_model()
    clean = other(tokens)
    other.blocks[0] = block
    other.setup()
    assert torch.equal(other(tokens), clean)
    with vpd.attach(other) as attached, attached.masked("zero"):
        assert not torch.equal(other(tokens), clean)
    assert not any("component_acts" in name for name in other.hook_dict) and torch.equal(other(tokens), clean)


def test_models_that_have_the_same_layers_are_refused_by_name(model, vpd):
    other = copy.copy(model)
    with vpd.attach(model), pytest.raises(ValueError, match="has layers of another model that a decomposition is"):
        vpd.attach(other)


def test_an_attachment_that_nobody_has_stays_and_makes_way_for_the_next(model, vpd, tokens):
    before, clean = snapshot(model), model(tokens)
    vpd.attach(model)
    gc.collect()
    assert "blocks.0.hook_q_ci" in model.hook_dict and model.run_with_cache(tokens)[1]["q_ci", 0].shape == (2, 7, 6)
    attached_state = snapshot(model)
    attached = attached_to(model)
    with attached.masked("zero"):
        assert not torch.equal(model(tokens), clean)
    del attached
    second = decomposition_of(model).to(torch.float64).attach(model)
    assert attached_state["hook_dict"].keys() == snapshot(model)["hook_dict"].keys()
    with pytest.raises(ValueError, match=r"detach it first, with tl_vpd.hooks.attached_to\(model\).detach\(\)"):
        vpd.attach(model)
    second.detach()
    assert_same(before, snapshot(model))


CONTEXTS = {
    "masked": lambda attached: attached.masked("zero"),
    "keep_only": lambda attached: attached.keep_only([]),
    "ablated": lambda attached: attached.ablated("blocks.0.mlp.W_in:1"),
}


@pytest.mark.parametrize("method", CONTEXTS)
def test_a_context_that_is_never_entered_is_said(model, vpd, tokens, method):
    clean = model(tokens)
    with vpd.attach(model) as attached:
        with pytest.warns(RuntimeWarning, match=rf"attached.{method}\(...\) without `with` does nothing"):
            CONTEXTS[method](attached)
        assert torch.equal(model(tokens), clean)
        context = CONTEXTS[method](attached)
        for _ in range(2):
            with context:
                assert not torch.equal(model(tokens), clean)
        with context, pytest.raises(RuntimeError, match="is entered already"):
            context.__enter__()
        assert torch.equal(model(tokens), clean)


def test_a_context_has_the_attachment_for_as_long_as_it_lasts(model, vpd, tokens):
    clean = model(tokens)
    with vpd.attach(model).masked("zero"):
        gc.collect()
        assert not torch.equal(model(tokens), clean)
        with pytest.raises(ValueError, match="attached to this model already"):
            vpd.attach(model)
    assert torch.equal(model(tokens), clean)


def test_an_attached_model_that_is_forgotten_goes_away():
    model = tiny_model()
    decomposition_of(model).attach(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_train_and_eval_reach_the_hook_points(model, vpd):
    model.eval()
    with vpd.attach(model):
        assert not any(m.training for m in model.modules())
        model.train()
        assert model.blocks[0].hook_q_ci.training


def test_attaching_adds_nothing_to_the_state_dict(model, vpd):
    keys, parameters = set(model.state_dict()), len(list(model.parameters()))
    with vpd.attach(model):
        assert set(model.state_dict()) == keys and len(list(model.parameters())) == parameters


@pytest.mark.parametrize("path", ["attn.hook_q", "mlp.hook_pre", "attn", "mlp"])
def test_what_a_hook_before_the_masks_has_stored_is_not_overwritten(model, vpd, tokens, path):
    stored = []
    module = model.blocks[0].get_submodule(path)
    masks = {name: torch.zeros(6) for name in vpd.sites if name.startswith("blocks.0")}
    with torch.no_grad(), vpd.attach(model) as attached:
        handle = module.register_forward_hook(lambda m, arguments, y: stored.append((y, y.clone())), prepend=True)
        with attached.masked(masks):
            masked = model(tokens)
        with attached.ablated(
            ["blocks.0.attn.W_Q:1", "blocks.0.attn.W_O:2", "blocks.0.mlp.W_in:3", "blocks.0.mlp.W_out:4"]
        ):
            model(tokens)
        handle.remove()
        with attached.masked(masks):
            assert torch.equal(model(tokens), masked)
    assert len(stored) == 2 and all(torch.equal(y, copied) for y, copied in stored)
