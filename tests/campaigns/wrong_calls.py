"""Wrong calls: every argument of every public call, one at a time, replaced by everything that people pass by mistake."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

from tests.campaigns.calls import table
from tests.campaigns.calls.judge import Late, difference, fault_of, outcome_of, same, state_of
from tests.campaigns.calls.values import bad_values, equivalents, random_value
from tests.campaigns.calls.world import Call, World
from tests.campaigns.counts import Budget, Counts

TRIED = """Every argument of every public call, one at a time: about 130 values of wrong type, shape or range, values put together
at random, and other forms of the right one (NumPy numbers, int32 tokens …). A right value must be accepted, with the same result
in each of its forms; any other must be refused by one sentence of this package that names the argument or what came. Model,
tensors, flags and random generators must be as before."""
SHORT = Budget(1500, 60)
LONG = Budget(40_000, 900)
PATIENCE, LARGE = 60, 3
"""Seconds for a call, and for one that may be as large as its argument says (a billion steps)."""
RANDOM = 30
"""Random values per argument in the long form."""


class Campaign:
    """A world, its table of calls, and the state that every call must leave."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """A new world, as after its start."""
        if hasattr(self, "world"):
            self.world.close()
        self.world = World()
        self.calls = {call.name: call for call in table.calls(self.world)}
        self.values = bad_values(self.world.paths)
        self.results: dict[str, tuple[Any, bool]] = {}
        self.state = self.state_now()

    def state_now(self) -> dict[str, Any]:
        """What a call must leave as it is."""
        tensors = {"tokens": self.world.tokens, "prompt": self.world.prompt, **self.world.vpd.state_dict()}
        return state_of(self.world.model, tensors)

    def tries(self, seed: int) -> list[tuple[str, str, str]]:
        """Every call, argument and value's name, in a random order."""
        every = [
            (call.name, argument, value)
            for call in self.calls.values()
            for argument, (canonical, _) in call.arguments.items()
            for value in [*self.values, *equivalents(canonical), *(f"random {i}" for i in range(RANDOM))]
        ]
        random.Random(seed).shuffle(every)
        return every

    def value(self, call: Call, argument: str, name: str, seed: int) -> Any:
        """A value by its name in ``tries``."""
        if name.startswith("random "):
            chooses = random.Random(f"{seed}:{call.name}:{argument}:{name}")
            return random_value(chooses, list(self.values.values()))
        others = equivalents(call.arguments[argument][0])
        return others[name] if name in others else self.values[name]()

    def make(
        self, call: Call, replaced: dict[str, Any] | None = None, seconds: int = PATIENCE
    ) -> tuple[Any, BaseException | None, bool]:
        """Makes a call from the same state of torch's generator each time: its result, its error, whether it draws.

        Args:
            call: from the table.
            replaced: arguments that differ from the table's.
            seconds: after which it is ended.
        """
        torch.set_rng_state(self.world.generator)
        arguments = {name: canonical for name, (canonical, _) in call.arguments.items()}
        result, error = outcome_of(lambda: call.run(**{**arguments, **(replaced or {})}), seconds)
        return result, error, not torch.equal(torch.get_rng_state(), self.world.generator)

    def result(self, call: Call) -> tuple[Any, bool]:
        """A call's result with right arguments, and whether it draws from torch's generator."""
        if call.name not in self.results:
            result, error, draws = self.make(call)
            if error is not None:
                raise AssertionError(f"The table's arguments of {call.name} are refused.") from error
            self.results[call.name] = (result, draws)
        return self.results[call.name]

    def attempt(self, name: str, argument: str, label: str, seed: int) -> tuple[str, str]:
        """One wrong call: its outcome, and what is wrong with it."""
        call = self.calls[name]
        expected, draws = self.result(call)
        value = self.value(call, argument, label, seed)
        kind = call.arguments[argument][1]
        verdict = kind(value)
        result, error, drew = self.make(call, {argument: value}, LARGE if verdict is None else PATIENCE)
        left = difference(self.state, self.state_now())
        if drew and not draws and value is not None:
            left = "torch's generator"
        if left:
            self.renew()
            return "left behind", f"{left} differs"
        if error is None:
            if verdict is False:
                return "silent", "accepted"
            if label in equivalents(call.arguments[argument][0]) and not same(expected, result):
                return "silent", "another result"
            return ("right" if verdict else "accepted as sensible"), ""
        if isinstance(error, Late) and verdict is not False:
            return "runs as long as asked", ""
        if isinstance(error, Late):
            return "hung", "does not end"
        if verdict is None and callable(value):
            return "error of the caller's function", ""
        if verdict is not False and "allocate memory" in str(error):
            return "larger than this machine", ""
        fault = fault_of(error, argument, value)
        if fault:
            return "wrong exception", fault
        if verdict:
            return "wrong exception", f"a right value is refused: {str(error)[:200]!r}"
        return "refused", ""


def attempts(budget: Budget, seed: int, calls: str = "") -> Iterator[tuple[str, str, str, str, str]]:
    """The call, argument and value of each try, with its outcome and what is wrong.

    Args:
        budget: how many.
        seed: of their order and of random values.
        calls: only calls whose name has this in it.
    """
    campaign = Campaign()
    tries = [t for t in campaign.tries(seed) if calls in t[0]]
    for i in budget.tries_left():
        if i >= len(tries):
            return
        yield (*tries[i], *campaign.attempt(*tries[i], seed))


def run(budget: Budget, seed: int) -> Counts:
    """The campaign."""
    counts = Counts()
    for name, argument, label, outcome, fault in attempts(budget, seed):
        counts.add(outcome, f"{name}({argument}={label}): {fault}")
    return counts
