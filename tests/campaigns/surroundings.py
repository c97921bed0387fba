"""Every public call where gradients are switched off for everything, as notebooks do, and in inference mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from tests.campaigns.calls.judge import difference, same
from tests.campaigns.counts import Budget, Counts
from tests.campaigns.wrong_calls import Campaign

TRIED = (
    "Every public call with right arguments, with gradients switched off for everything and in inference mode: the same result "
    "as without, to rounding, and the user's setting, the model and its tensors as they were."
)
SHORT = Budget(tries=400, seconds=60)
LONG = Budget(tries=1000, seconds=300)
SURROUNDINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "gradients off": torch.no_grad,
    "inference mode": torch.inference_mode,
}


def run(budget: Budget, seed: int) -> Counts:
    """Each call in each of the surroundings."""
    counts, campaign = Counts(), Campaign()
    tries = [(name, around) for around in SURROUNDINGS for name in campaign.calls]
    for i in budget.tries_left():
        if i >= len(tries):
            break
        name, around = tries[i]
        outcome, what = one(campaign, name, around)
        counts.add(outcome, f"{name}, {around}: {what}")
        if outcome != "right":
            campaign.renew()
    return counts


def one(campaign: Campaign, name: str, around: str) -> tuple[str, str]:
    """One call: the outcome, and what is wrong."""
    call = campaign.calls[name]
    expected, _ = campaign.result(call)
    with SURROUNDINGS[around]():
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        result, error, _ = campaign.make(call)
        after = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    if after != modes:
        return "left behind", "the grad mode"
    if left := difference(campaign.state, campaign.state_now()):
        return "left behind", left
    if error is not None:
        return "wrong exception", repr(error)[:200]
    return ("right" if near(expected, result) else "silent"), "another result"


def near(a: object, b: object) -> bool:
    """Whether two results are the same to rounding."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and a.shape == b.shape:
        return torch.allclose(a, b, rtol=1e-6, atol=1e-8, equal_nan=True)
    return same(a, b)
