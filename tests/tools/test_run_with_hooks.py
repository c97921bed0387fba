"""``run_with_hooks``, ``hooks()``, ``add_hook``, backward and permanent hooks, on our HookPoints and on TransformerLens's."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

Z, Q = "blocks.0.attn.hook_z", "blocks.1.attn.hook_q"
TIGHT = dict(rtol=1e-9, atol=1e-10)


def acts_name(case, site="blocks.1.mlp.W_in"):
    return case.vpd.sites[site].hook_name("component_acts")


def halve(value, hook):
    return value * 0.5


def without_head_0(value, hook):
    value[:, :, 0] = 0.0
    return value


@pytest.mark.parametrize("masked", [False, True])
def test_hooks_on_transformerlenss_points_act_as_on_the_plain_or_edited_model(case, masked):
    hooks = [(Z, without_head_0), ("blocks.1.hook_resid_pre", halve), (lambda n: n.endswith("hook_mlp_out"), halve)]
    expected = (case.twin if masked else case.fresh()).run_with_hooks(case.tokens, fwd_hooks=hooks)
    with case.vpd.attach(case.model) as attached:
        if not masked:
            assert torch.equal(case.model.run_with_hooks(case.tokens, fwd_hooks=hooks), expected)
            return
        with attached.masked(case.masks):
            assert_close(case.model.run_with_hooks(case.tokens, fwd_hooks=hooks), expected, **TIGHT)


def test_a_hook_on_activations_moves_the_output_along_u(case):
    site = "blocks.1.mlp.W_out"
    _, cache = case.fresh().run_with_cache(case.tokens)
    recorded = {}

    def add_one(acts, hook):
        acts[:, 2, 3] += 1.0
        return acts

    def token_mask(value, hook):
        recorded[hook.name] = value

    with case.vpd.attach(case.model):
        case.model.run_with_hooks(
            case.tokens, fwd_hooks=[(acts_name(case, site), add_one), ("blocks.1.hook_resid_post", token_mask)]
        )
    expected = cache["blocks.1.hook_resid_post"].clone()
    expected[:, 2] += case.vpd.U[site][3].detach()
    assert_close(next(iter(recorded.values())), expected, **TIGHT)


def test_ours_and_theirs_compose_in_either_order(case):
    ours = [(acts_name(case), halve)]
    theirs = [(Z, without_head_0)]
    with case.vpd.attach(case.model):
        one = case.model.run_with_hooks(case.tokens, fwd_hooks=ours + theirs)
        other = case.model.run_with_hooks(case.tokens, fwd_hooks=theirs + ours)
        assert torch.equal(one, other)
        assert not torch.equal(one, case.model.run_with_hooks(case.tokens, fwd_hooks=theirs))


def test_contexts_of_hooks_nest_and_end_where_they_should(case):
    name, model, tokens = acts_name(case), case.model, case.tokens
    with case.vpd.attach(model):
        clean = model(tokens)
        outer = model.run_with_hooks(tokens, fwd_hooks=[(Z, halve)])
        both = model.run_with_hooks(tokens, fwd_hooks=[(Z, halve), (name, halve)])
        with model.hooks(fwd_hooks=[(Z, halve)]):
            with model.hooks(fwd_hooks=[(name, halve)]):
                assert torch.equal(model(tokens), both)
            assert torch.equal(model(tokens), outer)
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, halve)]), both)
            with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=[(name, halve)]):
                raise ZeroDivisionError
            assert torch.equal(model(tokens), outer)
        assert torch.equal(model(tokens), clean)


def test_hooks_that_were_added_stay_until_they_are_reset(case):
    name, model, tokens = acts_name(case), case.model, case.tokens
    with case.vpd.attach(model):
        clean = model(tokens)
        once = model.run_with_hooks(tokens, fwd_hooks=[(name, halve)])
        model.add_hook(name, halve)
        assert torch.equal(model(tokens), once) and not torch.equal(once, clean)
        model.reset_hooks()
        assert torch.equal(model(tokens), clean)
        model.add_hook(lambda n: n == name, halve)
        assert torch.equal(model(tokens), once)
    assert torch.equal(model(tokens), clean)  # they went with the HookPoint


def test_permanent_hooks_of_another_plugin_are_part_of_the_model(case):
    """Through resets, clean passes, importances and masks; and they are still there afterwards."""
    model, tokens = case.model, case.tokens
    case.twin.add_perma_hook("blocks.0.hook_resid_mid", halve)
    model.add_perma_hook("blocks.0.hook_resid_mid", halve)
    hooked = model(tokens)
    with case.vpd.attach(model) as attached:
        model.reset_hooks()
        assert torch.equal(model(tokens), hooked)
        with attached.masked(case.masks):
            assert_close(model(tokens), case.twin(tokens), **TIGHT)
        _, cache = model.run_with_cache(tokens)
        importances = case.vpd.causal_importances(model, tokens)
        for site in case.vpd.sites.values():
            assert_close(cache[site.hook_name("ci")], importances[site.name], **TIGHT)
        with attached.masked("rounded"):
            rounded = model(tokens)
    assert torch.equal(model(tokens), hooked)
    model.reset_hooks(including_permanent=True)
    with case.vpd.attach(model) as attached, attached.masked("rounded"):
        assert not torch.allclose(model(tokens), rounded)


@pytest.mark.parametrize("masked", [False, True])
def test_backward_hooks_see_the_gradients_of_autograd(case, masked):
    """Against gradients that autograd gives for the same tensors, kept by a forward hook."""
    model, name = case.model, acts_name(case)
    names = [Z, name, "blocks.1.hook_resid_mid", Q]
    kept, grads = {}, {}

    def token_mask(value, hook, key):
        kept[key] = value
        return value  # a bridge shows a reshaped view, which is part of the graph if it is given back

    def keep_grad(grad, hook, key):
        grads[key] = grad.clone()

    fwd = [(n, lambda v, hook, n=n: token_mask(v, hook, n)) for n in names]
    bwd = [(n, lambda g, hook, n=n: keep_grad(g, hook, n)) for n in names]
    with (
        case.vpd.attach(model) as attached,
        attached.masked(case.masks if masked else "unmasked", delta=None if masked else 1.0),
        model.hooks(fwd_hooks=fwd, bwd_hooks=bwd),
    ):
        loss = model(case.tokens, return_type="loss")
        expected = torch.autograd.grad(loss, [kept[n] for n in names], retain_graph=True)
        loss.backward()
    for n, want in zip(names, expected, strict=True):
        assert_close(grads[n], want, **TIGHT, msg=lambda m, n=n: f"{n}: {m}")


def test_gradients_of_an_attached_model_are_the_models_own(case):
    plain = case.fresh()
    plain(case.tokens, return_type="loss").backward()
    with case.vpd.attach(case.model):
        case.model.run_with_hooks(
            case.tokens, fwd_hooks=[(acts_name(case), lambda a, hook: a)], return_type="loss"
        ).backward()
    here = dict(case.model.named_parameters())
    assert all(
        (p.grad is None and here[n].grad is None) or torch.allclose(p.grad, here[n].grad, rtol=1e-9, atol=1e-11)
        for n, p in plain.named_parameters()
    )
