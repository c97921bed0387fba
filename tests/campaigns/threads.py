"""Two or three threads that use one model at the same time: every result is that of one thread alone, or is refused.

Each thread makes a few random calls; each call's result is compared, to the bit, with the same call before the threads began. In
every other round the first block is not decomposed, so that evaluations start late.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from tests.campaigns.counts import Budget, Counts
from tests.hooks.snapshots import snapshot
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.evaluation import EvaluationConfig, evaluate

TRIED = (
    "Calls of one model, attached or not, by two or three threads at the same time (plain, masked, cached and hooked passes, "
    "importances, activations, adversarial masks, evaluations that start late); each result is compared to the bit with that of "
    "one thread, and the model with what it was."
)
SITES = ("*", "blocks.1.*")
SHORT = Budget(tries=60, seconds=40)
LONG = Budget(tries=4000, seconds=560)
NAMES = ["blocks.1.attn.W_Q:1", "blocks.1.mlp.W_in:2"]
MODES = EvaluationConfig(measures=(), budgets=(), controls=False)
Call = Callable[[Any, Any, Any], dict[str, torch.Tensor]]


def _masked(mode: str, **options: Any) -> Call:
    def call(vpd: Any, attached: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        with attached.masked(mode, **options):
            return {"logits": attached.model(tokens)}

    return call


def _ablated(vpd: Any, attached: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    with attached.ablated(NAMES):
        return {"logits": attached.model(tokens)}


def _patched(vpd: Any, attached: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    hooks = [("blocks.0.attn.hook_z", lambda z, hook: z * 0.5)]
    return {"logits": attached.model.run_with_hooks(tokens, fwd_hooks=hooks)}


def _evaluated(vpd: Any, attached: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"kl": torch.tensor(list(evaluate(vpd, attached.model, tokens, MODES).record["kl"].values()))}


ATTACHED: dict[str, Call] = {
    "plain": lambda vpd, attached, tokens: {"logits": attached.model(tokens)},
    "zero": _masked("zero"),
    "ci": _masked("ci"),
    "stochastic": _masked("stochastic", seed=3),
    "adversarial": _masked("adversarial", steps=1, seed=3),
    "ablated": _ablated,
    "patched": _patched,
    "cached": lambda vpd, attached, tokens: dict(attached.model.run_with_cache(tokens)[1].items()),
    "ablation_hooks": lambda vpd, attached, tokens: {
        "logits": attached.model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks(NAMES))
    },
}
ALWAYS: dict[str, Call] = {
    "importances": lambda vpd, attached, tokens: dict(vpd.causal_importances(attached.model, tokens).by_site),
    "component_acts": lambda vpd, attached, tokens: dict(vpd.component_acts(attached.model, tokens).by_site),
    "adversarial_masks": lambda vpd, attached, tokens: {
        name: mask.mask for name, mask in vpd.adversarial_masks(attached.model, tokens, steps=1, seed=3).items()
    },
    "evaluation": _evaluated,
}


class Bare:
    """A model that nothing is attached to, in the place of an attachment."""

    def __init__(self, model: Any) -> None:
        self.model = model


class World:
    """A model, a decomposition, tokens, and what every call gives in one thread.

    Args:
        sites: that are decomposed.
    """

    def __init__(self, sites: str) -> None:
        self.model = tiny_model()
        self.vpd = decomposition_of(self.model, sites=(sites,)).to(torch.float64)
        self.tokens = [some_tokens(seed) for seed in range(3)]
        with self.vpd.attach(self.model) as attached:
            calls = {**ATTACHED, **ALWAYS}
            self.expected = {
                (name, i): call(self.vpd, attached, tokens)
                for name, call in calls.items()
                for i, tokens in enumerate(self.tokens)
            }
        self.before = snapshot(self.model)


def run(budget: Budget, seed: int) -> Counts:
    """Rounds of threads, one after the other."""
    counts, worlds = Counts(), [World(sites) for sites in SITES]
    sys.setswitchinterval(1e-5)
    for i in budget.tries_left():
        chooses, world = random.Random(f"{seed}:{i}"), worlds[i % 2]
        attached = chooses.random() < 0.6
        calls = {**ATTACHED, **ALWAYS} if attached else {**ALWAYS, "plain": ATTACHED["plain"]}
        threads = [
            [(chooses.choice(list(calls)), chooses.randrange(3)) for _ in range(4)]
            for _ in range(chooses.choice((2, 3)))
        ]
        together(world, calls, threads, attached, counts, f"round {i}, {'attached' if attached else 'bare'}: {threads}")
        if not unchanged(world):
            counts.add("left behind", f"round {i}: {threads}")
            worlds[i % 2] = World(SITES[i % 2])
    return counts


def together(
    world: World,
    calls: dict[str, Call],
    threads: list[list[tuple[str, int]]],
    attached: bool,
    counts: Counts,
    what: str,
) -> None:
    """One round.

    Args:
        world: of the model.
        calls: by name.
        threads: the calls of each, with the index of their tokens.
        attached: whether the decomposition is attached.
        counts: gets the outcomes.
        what: the round, for examples.
    """
    start = threading.Barrier(len(threads))
    outcomes: list[tuple[str, str]] = []

    def work(mine: list[tuple[str, int]]) -> None:
        start.wait()
        for name, i in mine:
            try:
                result = calls[name](world.vpd, on, world.tokens[i])
            except RuntimeError as error:
                refused = "This model is in a context of masks or hooks in thread" in str(error)
                outcomes.append(("refused" if refused else "wrong exception", f"{name}: {error!r}"))
            except Exception as error:
                outcomes.append(("wrong exception", f"{name}: {error!r}"))
            else:
                expected = world.expected[name, i]
                right = result.keys() == expected.keys() and all(torch.equal(result[k], expected[k]) for k in result)
                outcomes.append(("right" if right else "silent", name))

    with ExitStack() as stack:
        on: Any = stack.enter_context(world.vpd.attach(world.model)) if attached else Bare(world.model)
        workers = [threading.Thread(target=work, args=(mine,)) for mine in threads]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for outcome, example in outcomes:
        counts.add(outcome, f"{example} in {what}")


def unchanged(world: World) -> bool:
    """Whether the model is as it was."""
    after = snapshot(world.model)
    return all(after[key] == world.before[key] for key in world.before if key not in ("state", "grads")) and all(
        torch.equal(after["state"][k], v) for k, v in world.before["state"].items()
    )
