"""Lists of hooks that take subcomponents out or set masks."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import decomposition_of, draw, edited, tiny_model
from tl_vpd.hooks.setters import SetTo
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.site import Subcomponent

OUT = "blocks.1.mlp.W_out"


def output_and_change(model, vpd, tokens, **how):
    """The ablated last MLP output minus the plain one, and what each subcomponent writes there."""
    with torch.no_grad(), vpd.attach(model):
        names = ["blocks.1.hook_mlp_out", "blocks.1.hook_out_component_acts"]
        _, cache = model.run_with_cache(tokens, names_filter=names)
        with model.hooks(fwd_hooks=vpd.ablation_hooks([f"{OUT}:2", f"{OUT}:4"], **how)):
            _, ablated = model.run_with_cache(tokens, names_filter=names[:1])
    writes = cache["out_component_acts", 1][..., [2, 4], None] * vpd.U[OUT].detach()[[2, 4]]
    return ablated["mlp_out", 1] - cache["mlp_out", 1], writes.sum(-2)


@pytest.mark.parametrize("amount", [1.0, 0.5, 0.0, 2.0])
@pytest.mark.parametrize("pos", [None, 3, -1, [0, 5], slice(2, 4), slice(None, None, 2)])
def test_the_output_loses_amount_times_what_was_written(model, vpd, tokens, amount, pos):
    change, writes = output_and_change(model, vpd, tokens, amount=amount, pos=pos)
    where = torch.zeros(7, dtype=torch.bool)
    where[slice(None) if pos is None else pos] = True
    assert_close(change, torch.where(where[:, None], -amount * writes, torch.zeros(())), rtol=1e-10, atol=1e-12)


def test_ablating_everywhere_is_editing_the_weight(model, vpd, tokens):
    mask = torch.ones(6, dtype=torch.float64)
    mask[[1, 3]] = 0
    expected = edited(model, vpd, dict.fromkeys(("blocks.0.attn.W_V", OUT), (mask, 1.0)))(tokens)
    addresses = [f"{n}:{i}" for n in ("blocks.0.attn.W_V", OUT) for i in (1, 3)]
    with vpd.attach(model) as attached:
        assert_close(model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks(addresses)), expected)
        with attached.ablated(addresses):
            assert_close(model(tokens), expected)
        forms = ("blocks.0.attn.W_V:1", ["blocks.0.attn.W_V:1"], [Subcomponent("blocks.0.attn.W_V", 1)])
        results = [model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks(form)) for form in forms]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_lists_compose_with_each_other_and_with_modes(model, vpd, tokens):
    recorded = {}
    look = ("blocks.1.hook_out_mask", lambda m, hook: recorded.update(m=m.clone()))
    masks = Masks({OUT: SiteMask(draw(2, 7, 6), None)})
    with torch.no_grad(), vpd.attach(model) as attached:
        half = vpd.ablation_hooks([f"{OUT}:0"], amount=0.5)
        gone = vpd.ablation_hooks([f"{OUT}:0", f"{OUT}:1"], pos=2)
        model.run_with_hooks(tokens, fwd_hooks=[*vpd.mask_hooks(masks), *half, *gone, look])
        expected = draw(2, 7, 6)
        expected[..., 0] *= 0.5
        expected[:, 2, :2] = 0
        assert_close(recorded["m"], expected)
        with attached.masked("rounded"), attached.ablated(f"{OUT}:0"):
            model.run_with_hooks(tokens, fwd_hooks=[look])
        rounded = vpd.causal_importances(model, tokens).masks("rounded")[OUT].mask.clone()
        rounded[..., 0] = 0
        assert_close(recorded["m"], rounded)


def test_mask_hooks_leave_sites_that_are_not_named(model, vpd, tokens):
    masks = Masks({OUT: SiteMask(draw(6), torch.tensor(0.5))})
    with torch.no_grad(), vpd.attach(model):
        hooks = vpd.mask_hooks(masks)
        assert [name for name, _ in hooks] == ["blocks.1.hook_out_mask", "blocks.1.hook_out_delta_mask"]
        with model.hooks(fwd_hooks=hooks):
            _, cache = model.run_with_cache(tokens)
        assert torch.equal(cache["out_mask", 1], draw(6).expand(2, 7, 6)) and bool((cache["out_mask", 0] == 1).all())
        assert vpd.mask_hooks(Masks({OUT: SiteMask(None, None)})) == []


def test_gradients_reach_masks_set_by_hooks(model, vpd, tokens):
    mask = draw(2, 7, 6).requires_grad_()
    with vpd.attach(model):
        hooks = vpd.mask_hooks(Masks({OUT: SiteMask(mask, None)}))
        loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks)
    (gradient,) = torch.autograd.grad(loss, mask)
    step = torch.zeros_like(mask)
    step[0, 3, 2] = 1e-5

    def at(m):
        with torch.no_grad(), vpd.attach(model):
            hooks = vpd.mask_hooks(Masks({OUT: SiteMask(m.detach(), None)}))
            return model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks)

    assert_close(gradient[0, 3, 2], (at(mask + step) - at(mask - step)) / 2e-5, rtol=1e-6, atol=1e-9)


def test_hooks_need_an_attached_model_and_things_that_exist(model, vpd, tokens):
    for make in (lambda: vpd.ablation_hooks([f"{OUT}:0"]), lambda: vpd.mask_hooks({OUT: draw(6)})):
        with pytest.raises(RuntimeError, match=r"attached to none: call `with vpd\.attach\(model\):` first"):
            make()
    with decomposition_of(tiny_model()).attach(model), pytest.raises(RuntimeError, match="attached to none"):
        vpd.ablation_hooks([f"{OUT}:0"])
    with vpd.attach(model):
        with pytest.raises(ValueError, match="There are no masks, so nothing would be masked"):
            vpd.mask_hooks(Masks({}))
        with pytest.raises(IndexError, match="6 subcomponents, 0 to 5"):
            vpd.ablation_hooks([f"{OUT}:6"])
        with pytest.raises(KeyError, match="did you mean"):
            vpd.ablation_hooks(["blocks.1.mlp.W_ou:0"])
        with pytest.raises(KeyError, match=r"name 'blocks\.9\.mlp\.W_in'"):
            vpd.mask_hooks(Masks({"blocks.9.mlp.W_in": SiteMask(None, None)}))
        with pytest.raises(IndexError, match=r"pos=7 is outside the 7 positions at blocks\.1\.hook_out_mask"):
            model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks([f"{OUT}:0"], pos=7))
        with pytest.raises(
            ValueError, match=r"The mask for blocks\.1\.hook_out_mask is \(2, 6, 6\).*needs \(2, 7, 6\)"
        ):
            model.run_with_hooks(tokens, fwd_hooks=vpd.mask_hooks(Masks({OUT: SiteMask(draw(2, 6, 6), None)})))


def test_a_hooks_name_does_not_print_the_mask():
    assert repr(SetTo(torch.ones(1000, 1000))) == "SetTo()"
