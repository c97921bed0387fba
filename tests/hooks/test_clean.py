"""Leaving, by the door or by an exception, leaves everything as it was."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from tests.tiny import decomposition_of, options_of, tiny_model


def snapshot(model):
    """Everything about a model that a plugin could leave changed."""
    return {
        "hook_dict": {k: id(v) for k, v in model.hook_dict.items()},
        "mod_dict": {k: id(v) for k, v in model.mod_dict.items()},
        "modules": {k: id(v) for k, v in model.named_modules()},
        "children": {k: list(m._modules) for k, m in model.named_modules()},
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "hooks": {k: tuple(map(tuple, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._forward_hooks_with_kwargs,
                                       m._forward_pre_hooks_with_kwargs, m._forward_hooks_always_called)))
                  for k, m in model.named_modules()},
        "users": {k: [getattr(h, "user_hook", h.hook.id) for h in (*p.fwd_hooks, *p.bwd_hooks)]
                  for k, p in model.hook_dict.items()},
        "training": {k: m.training for k, m in model.named_modules()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "attributes": set(vars(model)),
        "context_level": model.context_level,
    }  # fmt: skip


def assert_same(before, after):
    for key in before:
        if key in ("state", "grads"):
            assert before[key].keys() == after[key].keys()
            for k, v in before[key].items():
                assert (v is None and after[key][k] is None) or torch.equal(v, after[key][k]), (key, k)
        else:
            assert before[key] == after[key], key


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


def test_a_deep_copy_of_an_attached_model_is_masked_on_its_own(model, vpd, tokens):
    clean = model(tokens)
    with vpd.attach(model) as attached:
        with attached.masked("zero"):
            masked = model(tokens)
            other = copy.deepcopy(model)
        assert torch.equal(model(tokens), clean)
        assert torch.equal(other(tokens), masked)


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
