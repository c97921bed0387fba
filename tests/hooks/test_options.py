"""An option that would do nothing where it is given raises, and says which mode it belongs to."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import draw
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.masking.modes import MODES, MODES_OF_OPTION

IN = "blocks.1.mlp.W_in"
VALUES = {"threshold": 0.1, "delta": 0.5, "seed": 0, "steps": 1, "step_size": 0.2}
BELONGS = {
    "threshold": "threshold belongs to 'rounded'",
    "delta": "attacks Δ as well",
    "seed": "seed belongs to 'stochastic' and 'adversarial'",
    "steps": "steps belongs to 'adversarial'",
    "step_size": "step_size belongs to 'adversarial'",
}
TAKES = {
    "unmasked": {"delta"},
    "stochastic": {"delta", "seed"},
    "rounded": {"delta", "threshold"},
    "ci": {"delta"},
    "adversarial": {"seed", "steps", "step_size"},
    "zero": {"delta"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", VALUES)
def test_a_mode_takes_its_options_and_no_others(model, vpd, tokens, mode, option):
    value = VALUES[option]
    with torch.no_grad(), vpd.attach(model) as attached:
        if option in TAKES[mode]:
            with attached.masked(mode, **{option: value}):
                model(tokens)
        else:
            message = rf"{option}={value!r} does nothing in the mode '{mode}'.*{BELONGS[option]}"
            with pytest.raises(ValueError, match=message.replace(": ", ".*")), attached.masked(mode, **{option: value}):
                pass
        with attached.masked(mode, **{option: None}):  # None is the default everywhere
            pass
    assert {mode for mode, takes in TAKES.items() if option in takes} == set(MODES_OF_OPTION[option])


@pytest.mark.parametrize(
    ("rest", "options", "message"),
    [
        ("zero", {"seed": 0}, r"seed=0 does nothing in keep_only with rest='zero'"),
        ("zero", {"steps": 3}, r"steps=3 does nothing in keep_only with rest='zero'"),
        ("zero", {"threshold": 0.1}, r"threshold=0\.1 does nothing in keep_only with rest='zero'"),
        ("stochastic", {"step_size": 0.1}, r"step_size=0\.1 does nothing in keep_only with rest='stochastic'"),
        ("adversarial", {"delta": 1.0}, r"delta=1\.0 does nothing in keep_only with rest='adversarial'.*attacks Δ"),
        ("adversarial", {"threshold": 0.1}, r"threshold=0\.1 does nothing"),
    ],
)
def test_keep_only_takes_the_options_of_its_rest(model, vpd, rest, options, message):
    with (
        vpd.attach(model) as attached,
        pytest.raises(ValueError, match=message),
        attached.keep_only(f"{IN}:0", rest=rest, **options),
    ):
        pass


def test_masks_of_importances_take_the_options_of_their_mode(model, vpd, tokens):
    ci = vpd.causal_importances(model, tokens)
    for mode, options in (("ci", {"threshold": 0.1}), ("zero", {"seed": 1}), ("rounded", {"seed": 1})):
        with pytest.raises(ValueError, match="does nothing in the mode"):
            ci.masks(mode, **options)
    drawn = [ci.masks("zero", delta="drawn", seed=s)[IN].delta for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_options_beside_masks_and_functions_are_refused(model, vpd):
    with vpd.attach(model) as attached:
        for masks in ({IN: SiteMask(None, None)}, Masks({}), lambda site, acts: acts):
            for option, value in VALUES.items():
                with (
                    pytest.raises(ValueError, match=rf"{option}={value!r} does nothing with masks or a function"),
                    attached.masked(masks, **{option: value}),
                ):
                    pass


def test_an_option_that_does_not_exist_is_named_with_the_nearest(model, vpd, tokens):
    with vpd.attach(model) as attached:
        misspelt = pytest.raises(TypeError, match=r"'treshold' is not an option .*did you mean 'threshold'")
        with misspelt, attached.masked("rounded", treshold=0.1):
            pass
    for options, error, message in (
        ({"delta": 0.0}, ValueError, "does nothing in adversarial_masks, which attacks Δ as well"),
        ({"threshold": 0.1}, ValueError, "does nothing in adversarial_masks"),
        ({"step": 3}, TypeError, "did you mean 'steps'"),
    ):
        with pytest.raises(error, match=message):
            vpd.adversarial_masks(model, tokens, **options)


def test_a_bare_tensor_and_a_number_for_delta_are_masks(model, vpd, tokens):
    mask = draw(6, seed=3)
    ones = torch.ones(2, 7, dtype=torch.float64)
    with torch.no_grad(), vpd.attach(model) as attached:
        for short, full in (
            (mask, SiteMask(mask, None)),
            (SiteMask(mask, 0.0), SiteMask(mask, 0 * ones)),
            (SiteMask(None, 0.25), SiteMask(None, 0.25 * ones)),
            (SiteMask(mask, 0.25, ones.bool()), SiteMask(mask, 0.25 * ones)),
        ):
            with attached.masked({IN: full}):
                expected = model(tokens)
            with attached.masked({IN: short}):
                assert torch.equal(model(tokens), expected)
            with attached.masked(lambda site, acts, short=short: short if site == IN else torch.ones_like(acts)):
                assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)
            hooks = vpd.mask_hooks({IN: short})
            assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, rtol=1e-12, atol=1e-12)


def test_a_number_for_delta_is_shown_in_the_models_dtype(model, vpd, tokens):
    model.to(torch.bfloat16)
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked({IN: SiteMask(None, 0.5)}):
        logits, cache = model.run_with_cache(tokens)
    assert cache["in_delta_mask", 1].dtype == logits.dtype == torch.bfloat16
    assert bool((cache["in_delta_mask", 1] == 0.5).all())
