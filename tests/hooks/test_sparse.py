"""Taking k subcomponents out: the same numbers as on the full axis, at k's cost, in any company."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import decomposition_of, draw, edited, options_of, some_tokens, tiny_model
from tl_vpd.hooks import attached_forward
from tl_vpd.hooks.sparse import Ablate, Replace, SparsePoint

OUT, Q = "blocks.1.mlp.W_out", "blocks.0.attn.W_Q"
SITES = (OUT, Q, "blocks.0.attn.W_O")
POSITIONS = [None, 3, -1, 0, [0, 5], [5, 0], (2,), range(1, 4), slice(2, 4), slice(None, None, 2),
             slice(None, None, -1), slice(5, 1, -2), slice(3, None), slice(-2, None)]  # fmt: skip


@pytest.fixture
def wide(model):
    """Sixteen subcomponents a site, so that a few are few."""
    return decomposition_of(model, C=16).double()


def listen(vpd, sites=SITES):
    """Listeners that change nothing and send every site through the full axis."""
    return [(vpd.sites[n].hook_name("mask"), lambda m, hook: None) for n in sites]


@pytest.fixture
def paths(monkeypatch):
    """Which way each site went, as it goes."""
    products = []
    for way in ("sparse", "hooked"):
        original = getattr(attached_forward, f"{way}_output")

        def counted(product, *arguments, original=original, way=way):
            products.append((product.name, way))
            return original(product, *arguments)

        monkeypatch.setattr(attached_forward, f"{way}_output", counted)
    return products


def both(model, vpd, tokens, hooks, paths, weights=None):
    """Results over few columns and over the full axis; with weights, gradients of V, U as well."""
    results = []
    for extra, way in (([], "sparse"), (listen(vpd), "hooked")):
        paths.clear()
        with nullcontext() if weights is not None else torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=[*hooks, *extra])
        assert {w for _, w in paths} == {way} and len(paths) >= 1
        if weights is None:
            results.append([logits])
        else:
            leaves = [t for n in (OUT, Q) for t in (vpd.V[n], vpd.U[n])]
            results.append([logits.detach(), *torch.autograd.grad((logits * weights).sum(), leaves)])
    return results


@pytest.mark.parametrize("pos", POSITIONS, ids=str)
def test_few_columns_give_what_the_full_axis_gives(model, wide, tokens, paths, pos):
    addresses = [f"{n}:{i}" for n in SITES for i in (9, 2)]
    values = wide.component_acts(model, tokens.flip(0))
    with wide.attach(model):
        for given, amount in itertools.product((None, values), (1.0, 0.5, 0.0, -1.0)):
            hooks = wide.ablation_hooks(addresses, pos=pos, amount=amount, values=given)
            sparse, dense = both(model, wide, tokens, hooks, paths)
            assert_close(sparse, dense, rtol=1e-10, atol=1e-11)


def test_several_lists_on_one_site_compose_in_their_order(model, wide, tokens, paths):
    a, b = (wide.component_acts(model, some_tokens(seed=s)) for s in (5, 6))
    weights = draw(2, 7, 11, seed=1)
    with wide.attach(model):
        made = [
            wide.ablation_hooks([f"{OUT}:1", f"{OUT}:2"], values=a),
            wide.ablation_hooks([f"{OUT}:2", f"{OUT}:3"], values=b, amount=0.25, pos=slice(1, 5)),
            wide.ablation_hooks([f"{OUT}:3"], amount=0.5),
            wide.ablation_hooks([f"{OUT}:3", f"{OUT}:7"], pos=[4, 6]),
            wide.ablation_hooks([f"{Q}:0"], pos=-1, amount=2.0),
        ]
        for order in (made, made[::-1]):
            hooks = [h for hook_list in order for h in hook_list]
            sparse, dense = both(model, wide, tokens, hooks, paths)
            assert_close(sparse, dense, rtol=1e-10, atol=1e-11)
        with_gradients = both(model, wide, tokens, [h for hook_list in made for h in hook_list], paths, weights)
        for x, y in zip(*with_gradients, strict=True):
            assert_close(x, y, rtol=1e-9, atol=1e-11)
    untouched = [c for c in range(16) if c not in (1, 2, 3, 7)]
    of_V, of_U = with_gradients[0][1:3]
    assert bool((of_V[:, [2, 3]] != 0).all()) and bool((of_U[[1, 2, 3]] != 0).all())
    assert bool((of_V[:, untouched] == 0).all()) and bool((of_U[untouched] == 0).all())


def test_the_order_of_two_replacements_counts_and_the_last_one_wins(model, wide, tokens):
    a, b = (wide.component_acts(model, some_tokens(seed=s)) for s in (5, 6))
    with torch.no_grad(), wide.attach(model):
        first, second = (wide.ablation_hooks(f"{OUT}:4", values=v) for v in (a, b))
        alone = model.run_with_hooks(tokens, fwd_hooks=second)
        assert_close(model.run_with_hooks(tokens, fwd_hooks=[*first, *second]), alone, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(model.run_with_hooks(tokens, fwd_hooks=[*second, *first]), alone)


def test_one_gone_and_another_replaced_is_the_formula(model, wide, tokens):
    """y = y₀ − a₃ U₃ − (a₅ − v₅) U₅, and a replaced one that is also halved: + (v₆ / 2 − a₆) U₆."""
    values = {OUT: draw(16, seed=3)}
    with torch.no_grad(), wide.attach(model):
        names = ["blocks.1.hook_out_component_acts", "blocks.1.hook_mlp_out"]
        _, cache = model.run_with_cache(tokens, names_filter=names)
        acts, U = cache["out_component_acts", 1], wide.U[OUT]
        hooks = [
            *wide.ablation_hooks([f"{OUT}:3"]),
            *wide.ablation_hooks([f"{OUT}:5", f"{OUT}:6"], values=values),
            *wide.ablation_hooks([f"{OUT}:6"], amount=0.5),
        ]
        with model.hooks(fwd_hooks=hooks):
            _, changed = model.run_with_cache(tokens, names_filter=names[1:])
        v = values[OUT]
        change = (
            -acts[..., 3, None] * U[3] + (v[5] - acts[..., 5, None]) * U[5] + (v[6] / 2 - acts[..., 6, None]) * U[6]
        )
    assert_close(changed["mlp_out", 1], cache["mlp_out", 1] + change, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("values", [False, True])
def test_it_costs_k_columns_of_each_site_and_not_c(model, tokens, values):
    vpd = decomposition_of(model, C=64).double()
    k, n = 3, tokens.numel()
    addresses = [f"{s}:{i}" for s in SITES for i in (0, 30, 63)]
    given = vpd.component_acts(model, tokens).mean() if values else None

    def flops(hooks=()):
        with FlopCounterMode(display=False) as counter:  # which does not count products in place
            model.run_with_hooks(tokens, fwd_hooks=list(hooks))
        return counter.get_total_flops()

    with vpd.attach(model):
        plain = flops()
        hooks = vpd.ablation_hooks(addresses, values=given)
        widths = sum(vpd.sites[s].d_in + vpd.sites[s].d_out for s in SITES)
        assert flops(hooks) - plain == 2 * n * k * widths
        assert flops(vpd.ablation_hooks(addresses[:3], values=given)) - plain == 2 * n * k * 20
        # Two lists that share columns pay for their union.
        assert flops([*hooks, *vpd.ablation_hooks(f"{OUT}:30", amount=0.5)]) - plain == 2 * n * k * widths
        assert flops([*hooks, *listen(vpd)]) - plain == 2 * n * 64 * widths
    bare = flops()
    assert plain == bare


def test_many_subcomponents_go_the_full_way_and_give_the_same(model, wide, tokens, paths):
    with torch.no_grad(), wide.attach(model):
        eight = [
            wide.ablation_hooks([f"{OUT}:{i}" for i in range(8)]),
            wide.ablation_hooks([f"{OUT}:{i}" for i in range(8, 9)]),
        ]
        paths.clear()
        model.run_with_hooks(tokens, fwd_hooks=eight[0])
        assert paths == [(OUT, "sparse")]
        paths.clear()
        nine = model.run_with_hooks(tokens, fwd_hooks=[*eight[0], *eight[1]])
        assert paths == [(OUT, "hooked")]
    mask = torch.ones(16, dtype=torch.float64)
    mask[:9] = 0
    assert_close(nine, edited(model, wide, {OUT: (mask, 1.0)})(tokens), rtol=1e-10, atol=1e-10)


def test_hooks_come_off_one_by_one(model, wide, tokens, paths):
    with torch.no_grad(), wide.attach(model) as attached:
        clean = model(tokens)
        with attached.ablated(f"{OUT}:1"):
            one = model(tokens)
            with attached.ablated(f"{OUT}:2"):
                two = model(tokens)
                point = model.blocks[1].hook_out_mask
                assert isinstance(point, SparsePoint) and len(point.sparse_hooks()) == 2
                with model.hooks(fwd_hooks=listen(wide, [OUT])):
                    assert point.sparse_hooks() is None
                    assert_close(model(tokens), two, rtol=1e-10, atol=1e-12)
                assert len(point.sparse_hooks()) == 2
            assert torch.equal(model(tokens), one) and not torch.equal(one, two)
        paths.clear()
        assert torch.equal(model(tokens), clean)
        assert paths == [] and point.sparse_hooks() == []
        model.add_hook("blocks.1.hook_out_mask", Ablate((1,), None, 1.0))
        assert torch.equal(model(tokens), one)
        model.reset_hooks()
        assert torch.equal(model(tokens), clean)
        model.blocks[1].hook_out_mask.add_hook(Ablate((1,), None, 1.0), is_permanent=True)
        model.reset_hooks()
        assert torch.equal(model(tokens), one)


def test_a_hook_put_before_the_others_runs_before_them(model, wide, tokens):
    a, b = ({OUT: draw(16, seed=s)} for s in (1, 2))
    with torch.no_grad(), wide.attach(model):
        ((name, first),), ((_, second),) = (wide.ablation_hooks(f"{OUT}:4", values=v) for v in (a, b))
        alone = model.run_with_hooks(tokens, fwd_hooks=[(name, second)])
        model.hook_dict[name].add_hook(second)
        model.hook_dict[name].add_hook(first, prepend=True)
        assert_close(model(tokens), alone, rtol=1e-10, atol=1e-12)


def test_a_backward_hook_on_the_mask_sees_the_full_gradient(model, wide, tokens):
    grads = []
    with wide.attach(model) as attached, attached.ablated(f"{OUT}:1"):
        model.add_hook("blocks.1.hook_out_mask", lambda g, hook: grads.append(g.clone()), dir="bwd")
        recorded = {}
        look = ("blocks.1.hook_mlp_out", lambda y, hook: recorded.update(y=y))
        names = ("blocks.1.hook_out_component_acts", lambda a, hook: recorded.update(a=a))
        logits = model.run_with_hooks(tokens, fwd_hooks=[look, names])
        (by_output,) = torch.autograd.grad(logits.sum(), recorded["y"], retain_graph=True)
        logits.sum().backward()
        model.reset_hooks()
    expected = (by_output @ wide.U[OUT].detach().T) * recorded["a"].detach()
    assert_close(grads[-1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("values", [False, True])
def test_a_deep_copy_made_while_ablated_is_the_model_itself(model, wide, tokens, values):
    given = wide.component_acts(model, tokens).mean() if values else None
    with torch.no_grad(), wide.attach(model) as attached:
        clean = model(tokens)
        with attached.ablated([f"{OUT}:1", f"{Q}:2"], values=given):
            assert not torch.equal(model(tokens), clean)
            other = copy.deepcopy(model)
            assert torch.equal(other(tokens), clean)
        assert torch.equal(model(tokens), clean)
    assert torch.equal(other(tokens), clean)


@pytest.mark.parametrize("mode", ["stochastic", "rounded", "ci", "zero", "unmasked"])
@pytest.mark.parametrize("values", [False, True])
def test_inside_a_mode_they_multiply_into_its_masks_and_patch_its_activations(model, wide, tokens, mode, values):
    given = wide.component_acts(model, some_tokens(seed=5)) if values else None
    with torch.no_grad(), wide.attach(model) as attached, attached.ablated(f"{OUT}:1", pos=slice(2, 5), values=given):
        with attached.masked(mode, **options_of(mode, seed=1)):
            got = model(tokens)
        with attached.masked(mode, **options_of(mode, seed=1)):
            _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.startswith("blocks.1.hook_"))
    with torch.no_grad(), wide.attach(model) as attached, attached.masked(mode, **options_of(mode, seed=1)):
        _, plain = model.run_with_cache(tokens, names_filter=lambda n: n.startswith("blocks.1.hook_"))
        mask, acts = plain["out_mask", 1].clone(), plain["out_component_acts", 1].clone()
        if values:
            acts[:, 2:5, 1] = given[OUT][:, 2:5, 1]
        else:
            mask[:, 2:5, 1] = 0
    assert torch.equal(cache["out_mask", 1], mask)
    assert_close(cache["out_component_acts", 1], acts, rtol=1e-12, atol=1e-12)
    change = (acts * mask - plain["out_component_acts", 1] * plain["out_mask", 1]) @ wide.U[OUT].detach()
    assert_close(cache["mlp_out", 1], plain["mlp_out", 1] + change, rtol=1e-9, atol=1e-11)
    last = model.unembed(model.ln_final(cache["resid_mid", 1] + cache["mlp_out", 1]))
    assert_close(got, last.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_with_and_without_gradients_they_are_the_same(model, wide, tokens, context):
    given = wide.component_acts(model, tokens.flip(1))
    with wide.attach(model):
        hooks = [
            *wide.ablation_hooks([f"{n}:2" for n in SITES], pos=[1, 3]),
            *wide.ablation_hooks([f"{n}:3" for n in SITES], values=given),
        ]
        with torch.no_grad():
            expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
        with context():
            assert_close(model.run_with_hooks(tokens.clone(), fwd_hooks=hooks), expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_values(model, wide, tokens):
    v = draw(2, 7, 16, seed=2).requires_grad_()
    step = torch.zeros_like(v)
    step[1, 4, 5] = 1e-5

    def loss(values):
        hooks = wide.ablation_hooks([f"{Q}:5", f"{Q}:6"], values={Q: values}, pos=slice(2, 6))
        return model.run_with_hooks(tokens, fwd_hooks=hooks).square().sum()

    with wide.attach(model):
        (gradient,) = torch.autograd.grad(loss(v), v)
        with torch.no_grad():
            by_difference = (loss(v + step) - loss(v - step)) / 2e-5
    assert_close(gradient[1, 4, 5], by_difference, rtol=1e-6, atol=1e-8)
    touched = (gradient != 0).nonzero()
    assert set(touched[:, 2].tolist()) == {5, 6} and set(touched[:, 1].tolist()) <= {2, 3, 4, 5}


def test_activations_are_listened_to_next_to_an_ablation(model, wide, tokens):
    """A listener sees activations before the mask, and as a replacement left them if it stands after it."""
    recorded = []
    look = ("blocks.1.hook_out_component_acts", lambda a, hook: recorded.append(a.clone()))
    with torch.no_grad(), wide.attach(model):
        model.run_with_hooks(tokens, fwd_hooks=[look])
        replace = wide.ablation_hooks(f"{OUT}:1", values={OUT: torch.zeros(16)})
        gone = model.run_with_hooks(tokens, fwd_hooks=[look, *wide.ablation_hooks(f"{OUT}:1")])
        replaced = model.run_with_hooks(tokens, fwd_hooks=[look, *replace, look])
        assert_close(gone, replaced, rtol=1e-10, atol=1e-12)
    plain, under_mask, before, after = recorded
    assert torch.equal(under_mask, plain) and torch.equal(before, plain)
    assert bool((after[..., 1] == 0).all()) and torch.equal(after[..., 2:], plain[..., 2:])


def test_ablating_nothing_changes_no_bit(model, wide, tokens):
    with torch.no_grad(), wide.attach(model) as attached:
        clean = model(tokens)
        with attached.ablated([f"{n}:1" for n in wide.sites], amount=0.0):
            assert torch.equal(model(tokens), clean)
        activations = wide.component_acts(model, tokens)
        with attached.ablated(f"{Q}:1", values=activations):
            assert_close(model(tokens), clean, rtol=1e-10, atol=1e-12)


def test_a_subcomponent_that_is_named_twice_is_ablated_once(model, wide, tokens):
    with torch.no_grad(), wide.attach(model):
        once, twice = (
            model.run_with_hooks(tokens, fwd_hooks=wide.ablation_hooks([f"{OUT}:1"] * n, amount=0.5)) for n in (1, 2)
        )
    assert torch.equal(once, twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_precisions_they_are_the_full_axis_to_rounding(tokens, dtype):
    model = tiny_model(dtype=dtype)
    vpd = decomposition_of(model, C=16)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    with torch.no_grad(), vpd.attach(model):
        hooks = vpd.ablation_hooks([f"{n}:1" for n in SITES], pos=[1, 2])
        few = model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert few.dtype == dtype
        full = model.run_with_hooks(tokens, fwd_hooks=[*hooks, *listen(vpd)])
        assert_close(few, full, rtol=tolerance, atol=tolerance)


def test_a_hooks_name_does_not_print_its_values():
    assert repr(Replace((1,), None, torch.ones(1000), 1.0)) == "Replace(indices=(1,), pos=None, amount=1.0)"
