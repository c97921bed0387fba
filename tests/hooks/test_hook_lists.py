"""Lists that set Δ's factor and masks from functions, what they need on the model, and the gradient of a mask."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import draw, edited, some_tokens
from tl_vpd.masking import Masks, SiteMask

from .test_edited import as_masks, constant
from .test_generate import generate, greedy

IN, OUT, Q = "blocks.1.mlp.W_in", "blocks.1.mlp.W_out", "blocks.0.attn.W_Q"


@pytest.mark.parametrize("value", [0.0, 1.0, 0.25, -1.0])
def test_deltas_factor_is_an_edit_of_the_weight(model, vpd, tokens, value):
    ones = torch.ones(6, dtype=torch.float64)
    for sites in (None, "blocks.1.mlp.*", [Q, OUT]):
        with torch.no_grad(), vpd.attach(model):
            hooks = vpd.delta_hooks(value, sites=sites)
            got = model.run_with_hooks(tokens, fwd_hooks=hooks)
            clean = model(tokens)
        chosen = {None: list(vpd.sites), "blocks.1.mlp.*": [IN, OUT]}.get(
            sites if not isinstance(sites, list) else 0, [Q, OUT]
        )
        assert [name for name, _ in hooks] == [vpd.sites[n].hook_name("delta_mask") for n in vpd.sites if n in chosen]
        assert_close(got, edited(model, vpd, dict.fromkeys(chosen, (ones, value)))(tokens), rtol=1e-9, atol=1e-9)
        assert torch.equal(got, clean) is (value == 1.0)


@pytest.mark.parametrize("pos", [3, -1, [0, 5], slice(2, 4), slice(None, None, -2)])
def test_deltas_factor_at_some_positions_leaves_the_others(model, vpd, tokens, pos):
    where = torch.zeros(7, dtype=torch.bool)
    where[list(range(7)[pos]) if isinstance(pos, slice) else pos] = True
    delta = torch.where(where, 0.5, 1.0).double().expand(2, 7)
    masks = Masks({n: SiteMask(None, delta) for n in vpd.sites})
    with torch.no_grad(), vpd.attach(model) as attached:
        got, cache = None, None
        with model.hooks(fwd_hooks=vpd.delta_hooks(0.5, pos=pos)):
            got, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("delta_mask"))
        with attached.masked(masks):
            assert_close(got, model(tokens), rtol=1e-10, atol=1e-10)
        assert all(torch.equal(d.reshape(2, 7), delta) for d in cache.values())


def test_deltas_hooks_set_what_stands_in_a_mode_and_ablations_act_beside_them(model, vpd, tokens):
    mask = draw(6, seed=1)
    given = Masks({n: SiteMask(mask, torch.tensor(0.3, dtype=torch.float64)) for n in vpd.sites})
    cut = mask.clone()
    cut[2] = 0
    expected = edited(model, vpd, {n: (cut if n == OUT else mask, 0.75) for n in vpd.sites})(tokens)
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked(given):
        hooks = [*vpd.ablation_hooks(f"{OUT}:2"), *vpd.delta_hooks(0.75)]
        assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, rtol=1e-10, atol=1e-10)
        assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks[::-1]), expected, rtol=1e-10, atol=1e-10)


def by_size(site, acts):
    """Larger activations stay; Δ's factor by position; every second position is left alone."""
    mask = acts.abs() / (1 + acts.abs())
    delta = mask.mean(-1)
    routed = torch.arange(acts.shape[1], device=acts.device)[None] % 2 == 0
    return SiteMask(mask, delta, routed)


def mask_alone(site, acts):
    return torch.sigmoid(acts)


def delta_alone(site, acts):
    return SiteMask(None, torch.full(acts.shape[:-1], 0.5, dtype=acts.dtype))


def nothing(site, acts):
    return SiteMask(None, None)


def only_out(site, acts):
    return torch.zeros(acts.shape[-1]) if site == OUT else SiteMask(None, None)


@pytest.mark.parametrize("function", [by_size, mask_alone, delta_alone, nothing, only_out])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_function_means_the_same_as_a_context_and_as_hooks(model, vpd, tokens, function, context):
    with vpd.attach(model) as attached, context():
        tokens = tokens.clone()
        with attached.masked(function):
            expected = model(tokens)
        hooks = vpd.mask_hooks(function)
        got = model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert_close(got, expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(got, model(tokens)) is (function is nothing)
        again = model.run_with_hooks(tokens.flip(0), fwd_hooks=hooks)  # nothing is left of the pass before
        assert_close(again, expected.flip(0), rtol=1e-9, atol=1e-9)


def test_a_functions_masks_are_computed_by_hand_from_what_it_is_given(model, vpd, tokens):
    """Site by site: the given masks, from activations of the pass they act in."""
    calls = []

    def noting(site, acts):
        site_mask = by_size(site, acts)
        calls.append((site, site_mask, acts.clone()))
        return site_mask

    with torch.no_grad(), vpd.attach(model) as attached:
        got = model.run_with_hooks(tokens, fwd_hooks=vpd.mask_hooks(noting))
        assert [site for site, *_ in calls] == list(vpd.sites)
        masks = Masks({site: site_mask for site, site_mask, _ in calls})
        with attached.masked(masks):
            by_hand, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("component_acts"))
        assert_close(got, by_hand, rtol=1e-10, atol=1e-10)
        for site, _, acts in calls:
            assert_close(acts, cache[vpd.sites[site].hook_name("component_acts")], rtol=1e-10, atol=1e-10)


def test_gradients_pass_through_a_functions_masks(model, vpd, tokens):
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def run(scale):
        hooks = vpd.mask_hooks(lambda site, acts: torch.sigmoid(scale * acts))
        return model.run_with_hooks(tokens, fwd_hooks=hooks).square().sum()

    with vpd.attach(model) as attached:
        (gradient,) = torch.autograd.grad(run(scale), scale)
        with attached.masked(lambda site, acts: torch.sigmoid(scale * acts)):
            (in_context,) = torch.autograd.grad(model(tokens).square().sum(), scale)
        with torch.no_grad():
            by_difference = (run(scale + 1e-6) - run(scale - 1e-6)) / 2e-6
    assert_close(gradient, by_difference, rtol=1e-6, atol=1e-8)
    assert_close(gradient, in_context, rtol=1e-9, atol=1e-9)


def test_a_function_works_with_a_kv_cache_which_shows_it_one_position_at_a_time(model, vpd, tokens):
    lengths = []

    def noting(site, acts):
        lengths.append(acts.shape[1])
        return torch.sigmoid(acts)

    with torch.no_grad(), vpd.attach(model), model.hooks(fwd_hooks=vpd.mask_hooks(noting)):
        got = generate(model, tokens)
        assert sorted(set(lengths)) == [1, 7]
        assert torch.equal(got, greedy(model, tokens))


def test_a_function_acts_on_the_sites_that_are_attached(model, vpd, tokens):
    with vpd.attach(model, sites="*.mlp.*"):
        names = {name for name, _ in vpd.mask_hooks(mask_alone)}
    assert names == {
        vpd.sites[n].hook_name(k) for n in vpd.sites if ".mlp." in n for k in ("component_acts", "mask", "delta_mask")
    }


def test_a_backward_hook_on_a_mask_shows_each_subcomponents_attribution(model, vpd, tokens):
    """∂loss/∂m_c = a_c · (U[c] · ∂loss/∂y): first-order ablation effects in one backward pass."""
    names = [f"blocks.1.hook_{n}" for n in ("out_mask", "out_delta_mask", "out_component_acts", "mlp_out")]
    with vpd.attach(model):
        _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=names)
    acts, by_output = cache["out_component_acts", 1], cache["blocks.1.hook_mlp_out_grad"]
    U = vpd.U[OUT].detach()
    assert_close(cache["blocks.1.hook_out_mask_grad"], acts * (by_output @ U.T), rtol=1e-9, atol=1e-12)
    delta = cache["mlp_out", 1] - model.blocks[1].mlp.b_out.detach() - acts @ U
    by_delta = cache["blocks.1.hook_out_delta_mask_grad"].reshape(2, 7)
    assert_close(by_delta, (delta * by_output).sum(-1), rtol=1e-9, atol=1e-12)


def test_a_deep_copy_made_while_masked_is_the_model_itself(model, vpd, tokens):
    masks = as_masks(constant(vpd))
    with torch.no_grad(), vpd.attach(model) as attached:
        clean = model(tokens)
        for given in (masks, by_size):
            with model.hooks(fwd_hooks=vpd.mask_hooks(given)):
                assert not torch.equal(model(tokens), clean)
                other = copy.deepcopy(model)
            assert torch.equal(other(tokens), clean) and torch.equal(model(tokens), clean)
            with attached.masked(given, pos=[1, 2]):
                assert not torch.equal(model(tokens), clean)
                other = copy.deepcopy(model)
            assert torch.equal(other(tokens), clean) and torch.equal(model(tokens), clean)


@pytest.mark.parametrize(
    ("hooks", "make", "missing"),
    [
        (["ci"], lambda vpd: vpd.ablation_hooks(f"{OUT}:0"), "blocks.1.hook_out_mask"),
        (
            ["mask"],
            lambda vpd: vpd.ablation_hooks(f"{OUT}:0", values={OUT: torch.zeros(6)}),
            "blocks.1.hook_out_component_acts",
        ),
        (["component_acts"], lambda vpd: vpd.delta_hooks(0.0), "blocks.0.hook_q_delta_mask"),
        (["component_acts", "mask"], lambda vpd: vpd.mask_hooks(mask_alone), "blocks.0.hook_q_delta_mask"),
        (
            ["mask"],
            lambda vpd: vpd.mask_hooks(Masks({OUT: SiteMask(None, torch.ones(()))})),
            "blocks.1.hook_out_delta_mask",
        ),
    ],
)
def test_a_hook_point_that_was_not_put_up_is_named(model, vpd, hooks, make, missing):
    with vpd.attach(model, hooks=hooks) as attached:
        with pytest.raises(
            KeyError, match=rf"needs {missing.replace('.', '[.]')}, which is not on the model: attach with"
        ):
            make(vpd)
        if hooks == ["ci"]:
            with pytest.raises(KeyError, match="ablation_hooks needs"), attached.ablated(f"{OUT}:0"):
                pass
        with attached.masked("zero"):  # contexts need no HookPoints
            assert model(some_tokens()).shape == (2, 7, 11)


def test_a_site_that_was_not_attached_is_named(model, vpd):
    with vpd.attach(model, sites="blocks.0.*"):
        with pytest.raises(KeyError, match=r"needs blocks\.1\.hook_out_mask, which is not on the model"):
            vpd.ablation_hooks(f"{OUT}:0")
        with pytest.raises(
            KeyError, match=r"No site matches 'blocks\.1\.mlp\.W_out'.*did you mean 'blocks\.0\.mlp\.W_out'"
        ):
            vpd.delta_hooks(0.0, sites=OUT)
        with pytest.raises(KeyError, match=r"did you mean 'blocks\.0\.mlp\.W_in'"):
            vpd.delta_hooks(0.0, sites="blocks.0.mlp.W_ni")


@pytest.mark.parametrize("make", ["delta_hooks", "mask_hooks", "ablation_hooks"])
def test_an_unattached_decomposition_makes_no_hooks(vpd, make):
    argument = {"delta_hooks": 0.0, "mask_hooks": mask_alone, "ablation_hooks": f"{OUT}:0"}[make]
    with pytest.raises(RuntimeError, match=f"{make} makes hooks for an attached model.*attached to none"):
        getattr(vpd, make)(argument)


@pytest.mark.parametrize(
    "form", [list, tuple, iter, lambda hooks: (pair for pair in hooks), lambda hooks: map(tuple, hooks)]
)
def test_a_list_of_hooks_that_can_be_read_once_only_acts(model, vpd, tokens, form):
    hooks = [("blocks.0.hook_resid_pre", lambda x, hook: 2 * x), ("blocks.1.hook_mlp_out", lambda x, hook: 0 * x)]
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
        with vpd.attach(model):
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=form(hooks)), expected)
            with model.hooks(form(hooks)):
                assert torch.equal(model(tokens), expected)
            with pytest.raises(KeyError, match="hook_resid_prä"):
                model.run_with_hooks(tokens, fwd_hooks=form([("blocks.0.hook_resid_prä", hooks[0][1])]))


@pytest.mark.parametrize(
    ("kind", "result", "error", "message"),
    [
        ("component_acts", 0.5, TypeError, r"A hook on the activations of .*W_Q returned a float: return a tensor \(2, 7, 6\)"),
        ("component_acts", torch.ones(7, 6), ValueError, r"activations of .*W_Q returned \(7, 6\): return \(2, 7, 6\) or None"),
        ("ci", (torch.ones(2, 7, 6),), TypeError, r"A hook on the importances of .*W_Q returned a tuple: return a tensor"),
        ("ci", torch.ones(2, 7, 5), ValueError, r"importances of .*W_Q returned \(2, 7, 5\): return \(2, 7, 6\) or None"),
    ],
)  # fmt: skip
def test_what_a_hook_returns_fits_or_is_refused(model, vpd, tokens, kind, result, error, message):
    hooks = [(vpd.sites[Q].hook_name(kind), lambda x, hook: result)]
    with vpd.attach(model) as attached, torch.no_grad():
        for context in (attached.masked("ci"), contextlib.nullcontext()):
            with context, pytest.raises(error, match=message):
                model.run_with_hooks(tokens, fwd_hooks=hooks)


def test_what_a_hook_returns_is_taken_in_the_models_dtype(model, vpd, tokens):
    point = vpd.sites[Q].hook_name("component_acts")
    with vpd.attach(model), torch.no_grad():
        for rounded in (lambda x, hook: x.to(torch.float32), lambda x, hook: x > 0):
            expected = model.run_with_hooks(tokens, fwd_hooks=[(point, rounded), (point, lambda x, hook: x.double())])
            got = model.run_with_hooks(tokens, fwd_hooks=[(point, rounded)])
            assert got.dtype == torch.float64 and torch.equal(got, expected)
        number = model.run_with_hooks(tokens, fwd_hooks=[(vpd.sites[Q].hook_name("delta_mask"), lambda x, hook: 0.25)])
        assert torch.equal(number, model.run_with_hooks(tokens, fwd_hooks=vpd.delta_hooks(0.25, sites=Q)))
