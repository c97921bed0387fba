"""A hook name that does not exist raises with the nearest one; the model's methods are restored afterwards."""

from __future__ import annotations

import copy

import pytest
import torch

from tl_vpd.hooks.checked_names import METHODS

SLIPS = {
    "blocks.1.hook_q_component_act": "blocks.1.hook_q_component_acts",
    "blocks.1.hook_Q_component_acts": "blocks.1.hook_q_component_acts",
    "blocks.0.attn.hook_q_ci": "blocks.0.hook_q_ci",
    "blocks.2.hook_out_mask": "blocks.1.hook_out_mask",
    "blocks.0.hook_v_deltamask": "blocks.0.hook_v_delta_mask",
    "blocks.0.attn.hook_patern": "blocks.0.attn.hook_pattern",
    "blocks.1.hook_resid_prr": "blocks.1.hook_resid_pre",
}


def nothing(value, hook):
    return None


WAYS = {
    "run_with_hooks": lambda model, tokens, name: model.run_with_hooks(tokens, fwd_hooks=[(name, nothing)]),
    "run_with_hooks, backward": lambda model, tokens, name: model.run_with_hooks(
        tokens, bwd_hooks=[(name, nothing)], reset_hooks_end=False
    ),
    "hooks": lambda model, tokens, name: model.hooks(fwd_hooks=[(name, nothing)]).__enter__(),
    "hooks, by position": lambda model, tokens, name: model.hooks([(name, nothing)]).__enter__(),
    "add_hook": lambda model, tokens, name: model.add_hook(name, nothing),
    "add_perma_hook": lambda model, tokens, name: model.add_perma_hook(name, nothing),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SLIPS)
def test_a_hook_for_a_name_that_does_not_exist_raises_with_the_nearest(case, way, name):
    with case.vpd.attach(case.model), pytest.raises(KeyError, match=f"did you mean '{SLIPS[name]}'"):
        WAYS[way](case.model, case.tokens, name)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_filter_for_a_hook_of_ours_that_does_not_exist_raises_with_the_nearest(case, as_list):
    for name, near in SLIPS.items():
        if near.endswith(("_acts", "_ci", "_mask")):
            names = ["blocks.0.attn.hook_z", name] if as_list else name
            with case.vpd.attach(case.model), pytest.raises(KeyError, match=f"did you mean '{near}'"):
                case.model.run_with_cache(case.tokens, names_filter=names)


def test_a_filter_may_go_on_naming_what_this_model_lacks(case):
    """A notebook's list of TransformerLens names for deeper models keeps its meaning."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(5)]
    _, plain = case.fresh().run_with_cache(case.tokens, names_filter=names)
    with case.vpd.attach(case.model):
        _, cache = case.model.run_with_cache(case.tokens, names_filter=names)
    assert set(cache.keys()) == set(plain.keys()) and len(cache) >= 2


def test_hook_points_that_were_not_attached_do_not_exist(case):
    with case.vpd.attach(case.model, sites="blocks.0.*", hooks=["component_acts"]):
        for name in ("blocks.0.hook_q_ci", "blocks.1.hook_q_component_acts"):
            with pytest.raises(KeyError, match=r"did you mean 'blocks.0.hook_\w+_component_acts'"):
                case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, nothing)])


def test_every_name_that_the_model_knows_is_accepted(case):
    with case.vpd.attach(case.model):
        gated = ("mlp_in", "attn_in", "_input", "hook_result")
        names = [name for name in case.model.hook_dict if not name.endswith(gated)]
        with case.model.hooks(fwd_hooks=[(name, nothing) for name in names]):
            pass
        for name in names:
            case.model.add_hook(name, nothing)


def test_a_slip_leaves_no_hook_behind(case):
    name = "blocks.1.hook_q_component_acts"
    with case.vpd.attach(case.model):
        with pytest.raises(KeyError):
            case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, nothing), (name + "s", nothing)])
        assert not case.model.hook_dict[name].fwd_hooks


def test_leaving_gives_the_methods_back(case):
    before = dict(vars(case.model))
    with case.vpd.attach(case.model):
        assert all(method in vars(case.model) for method in METHODS)
        assert case.model.run_with_cache.__doc__ == type(case.model).run_with_cache.__doc__
    assert vars(case.model).keys() == before.keys()
    assert not any(method in vars(case.model) for method in METHODS)


def test_methods_that_another_plugin_wrapped_stay_wrapped(case):
    calls = []
    plain = case.model.run_with_hooks

    def counted(*arguments, **keywords):
        calls.append(1)
        return plain(*arguments, **keywords)

    case.model.__dict__["run_with_hooks"] = counted
    with case.vpd.attach(case.model):
        case.model.run_with_hooks(case.tokens, fwd_hooks=[("blocks.0.hook_q_ci", nothing)])
    assert calls == [1] and case.model.run_with_hooks is counted
    attached = case.vpd.attach(case.model)
    case.model.__dict__["hooks"] = counted
    attached.detach()
    assert vars(case.model)["hooks"] is counted


def test_a_deep_copy_is_the_clean_model_and_checks_names_when_attached_itself(case):
    with case.vpd.attach(case.model):
        other = copy.deepcopy(case.model)
    assert "blocks.1.hook_q_component_acts" not in other.hook_dict
    recorded = []
    with case.vpd.attach(other):
        with pytest.raises(KeyError, match="did you mean"):
            other.run_with_hooks(case.tokens, fwd_hooks=[("blocks.1.hook_q_component_act", nothing)])
        other.run_with_hooks(
            case.tokens, fwd_hooks=[("blocks.1.hook_q_component_acts", lambda a, hook: recorded.append(a))]
        )
        assert len(recorded) == 1 and torch.equal(other(case.tokens), case.model(case.tokens))
