"""Interrupts at any moment of what puts something on a model: nothing stays on it.

An interrupt comes in one of three ways: Ctrl-C at a time that a timer chooses (in torch and TransformerLens too), Ctrl-C at the
n-th bytecode instruction of this package and of ``contextlib``, and a ``KeyboardInterrupt`` raised at such an instruction
(``at once``), which nothing can put off. Then everything about the model is compared with what it was before.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

import tl_vpd
from tests.campaigns.counts import Budget, Counts
from tests.hooks.snapshots import snapshot
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.forward.turns import turns_of
from tl_vpd.hooks import attached_to

TRIED = (
    "Ctrl-C, and exceptions that cannot be put off, at a random instruction or time of attaching, detaching, masked, ablated and "
    "cached passes, importances and adversarial masks; then hooks, modules, attributes, flags, gradients, random numbers and "
    "logits are compared with those before. `healed` means: as before once the next attach has cleared what was left."
)
SHORT = Budget(tries=120, seconds=45)
LONG = Budget(tries=6000, seconds=560)
WAYS = ("timer", "signal", "at once")
PACKAGE = os.path.dirname(tl_vpd.__file__)
NAMES = ["blocks.0.attn.W_Q:1", "blocks.1.mlp.W_in:2"]


@dataclass
class World:
    """A model that its user has changed, a decomposition of it, and what both gave before."""

    model: Any = field(default_factory=tiny_model)

    def __post_init__(self) -> None:
        self.vpd = decomposition_of(self.model).to(torch.float64)
        self.tokens = some_tokens()
        self.model(self.tokens, return_type="loss").backward()
        self.model.blocks[0].attn.W_Q.requires_grad_(False)
        self.model.blocks[1].mlp.eval()
        self.model.add_hook("blocks.0.attn.hook_z", lambda z, hook: z * 0.5)
        self.model.add_perma_hook("blocks.1.hook_resid_pre", lambda x, hook: x + 0.1)
        self.model.blocks[0].register_forward_hook(lambda m, a, out: out + 0.01)
        self.vpd.causal_importances(self.model, self.tokens)  # fingerprints are remembered from now on

    def state(self) -> dict[str, Any]:
        """All that an interrupted call could leave changed."""
        state = snapshot(self.model)
        # A counter of TransformerLens's own, which its ``hooks`` leaves when it is interrupted, and which changes nothing.
        del state["context_level"]
        state["attributes"] = {name: set(vars(m)) for name, m in self.model.named_modules()}
        state["forwards"] = {n: m.__dict__.get("forward") for n, m in self.model.named_modules()}
        state["global"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), signal.getsignal(signal.SIGINT))
        state["turns"] = turns_of(self.model).owner
        state["random"] = torch.get_rng_state()
        attached = attached_to(self.model)
        passes = None if attached is None else attached._attachment.passes
        state["passes"] = passes and (
            passes._inside,
            passes._call,
            passes.taps.current,
            list(passes.specs),
            len(passes.contexts),
        )
        state["logits"] = self.model(self.tokens).detach()
        return state


def attach(world: World) -> None:
    """Attaches and leaves."""
    with world.vpd.attach(world.model):
        pass


def attach_and_use(world: World) -> None:
    """Attaches, runs masked, leaves."""
    with world.vpd.attach(world.model) as attached, attached.masked("zero"):
        world.model(world.tokens)


def modes(mode: str, **options: Any) -> Callable[[World], None]:
    """A masked pass of the attached model."""

    def action(world: World) -> None:
        with attached_to(world.model).masked(mode, **options):  # type: ignore[union-attr]
            world.model(world.tokens)

    return action


def keep_only(world: World) -> None:
    """A pass with a node set."""
    with attached_to(world.model).keep_only(NAMES, rest="stochastic", seed=0):  # type: ignore[union-attr]
        world.model(world.tokens)


def ablated(world: World) -> None:
    """A pass with ablations."""
    with attached_to(world.model).ablated(NAMES):  # type: ignore[union-attr]
        world.model(world.tokens)


def cached(world: World) -> None:
    """A pass with a cache of everything."""
    world.model.run_with_cache(world.tokens)


def hooked(world: World) -> None:
    """A pass with hooks that ablate."""
    world.model.run_with_hooks(world.tokens, fwd_hooks=world.vpd.ablation_hooks(NAMES))


def importances(world: World) -> None:
    """Importances of tokens."""
    world.vpd.causal_importances(world.model, world.tokens)


def adversarial(world: World) -> None:
    """Two steps of an adversary."""
    world.vpd.adversarial_masks(world.model, world.tokens, steps=2, seed=0)


ALONE = {
    "attach": attach,
    "attach and use": attach_and_use,
    "importances": importances,
    "adversarial_masks": adversarial,
}
ATTACHED = {
    "zero": modes("zero"),
    "ci": modes("ci"),
    "adversarial": modes("adversarial", steps=1, seed=0),
    "keep_only": keep_only,
    "ablated": ablated,
    "run_with_cache": cached,
    "run_with_hooks": hooked,
    "importances, attached": importances,
    "adversarial_masks, attached": adversarial,
}
ACTIONS: dict[str, Callable[[World], None]] = {**ALONE, **ATTACHED}


class AtInstruction:
    """Calls a function at the n-th instruction of this package (and of ``contextlib``) that is traced.

    Args:
        n: counted from 1 (0: never, to count them).
        happens: what is called.
    """

    def __init__(self, n: int, happens: Callable[[], None]) -> None:
        self.n, self.happens, self.count = n, happens, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """The trace function of frames."""
        name = frame.f_code.co_filename
        if not (name.startswith(PACKAGE) or name.endswith("contextlib.py")):
            return None
        frame.f_trace_opcodes = True
        return self._instruction

    def _instruction(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self.count += 1
            if self.count == self.n:
                sys.settrace(None)
                self.happens()
        return self._instruction


def interrupt() -> None:
    """Raises KeyboardInterrupt."""
    raise KeyboardInterrupt


def ctrl_c() -> None:
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


@contextmanager
def traced(injector: AtInstruction) -> Any:
    """Inside, instructions are traced."""
    sys.settrace(injector)
    try:
        yield
    finally:
        sys.settrace(None)


@contextmanager
def timed(seconds: float) -> Any:
    """Ctrl-C after some time."""
    before = signal.signal(signal.SIGALRM, lambda *_: ctrl_c())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def lengths(world: World) -> dict[str, tuple[int, float]]:
    """How many instructions and seconds each action takes."""
    result = {}
    for name, action in ACTIONS.items():
        with ExitStack() as stack:
            if name in ATTACHED:
                stack.enter_context(world.vpd.attach(world.model))
            start = time.perf_counter()
            action(world)
            seconds, counter = time.perf_counter() - start, AtInstruction(0, interrupt)
            with traced(counter):
                action(world)
        result[name] = (counter.count, seconds)
    return result


def run(budget: Budget, seed: int) -> Counts:
    """Interrupts actions one after the other; a world that is as it was before is used again."""
    counts, world = Counts(), World()
    sys.unraisablehook = lambda _: None  # an interrupt inside a __del__ is printed and dropped, as Python does
    size, before = lengths(world), world.state()
    for i in budget.tries_left():
        random_number = random.Random(f"{seed}:{i}")
        way, name = random_number.choice(WAYS), random_number.choice(list(ACTIONS))
        instructions, seconds = size[name]
        n, after = random_number.randint(1, instructions), random_number.uniform(0, 1.2) * seconds
        outcome, difference = one(world, name, way, n, after, before)
        counts.add(outcome, f"{name}, {way}, instruction {n} ({difference})")
        if outcome not in ("right", "too late"):
            world = World()
            before = world.state()
    return counts


def one(world: World, name: str, way: str, n: int, after: float, before: dict[str, Any]) -> tuple[str, str]:
    """One interrupt; what came out, and what differed.

    Args:
        world: as it was before.
        name: of the action.
        way: how the interrupt comes.
        n: the instruction at which it comes.
        after: the seconds after which it comes.
        before: the world's state.
    """
    interrupted = False
    attached = world.vpd.attach(world.model) if name in ATTACHED else None
    expected = before if attached is None else world.state()
    injector = AtInstruction(n, ctrl_c if way == "signal" else interrupt)
    try:
        with timed(after) if way == "timer" else traced(injector):
            ACTIONS[name](world)
    except KeyboardInterrupt:
        interrupted = True
    gc.collect()
    difference = compare(expected, world.state())
    if attached is not None:
        attached.detach()
    if not difference and attached is not None:
        difference = compare(before, world.state())
    if not difference:
        return ("right" if interrupted else "too late"), ""
    for _ in range(2):
        other = decomposition_of(world.model).to(torch.float64).attach(world.model)
        other.detach()
    left = compare(before, world.state())
    return ("healed", difference) if not left else ("left behind", left)


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What differs, in a few words; nothing if all is the same."""
    for key in before:
        if not same(before[key], after[key]):
            return key
    return ""


def same(a: Any, b: Any) -> bool:
    """Whether two states are the same, tensors to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b
