"""A plan in plain words: what a run costs, how long it takes, whether it fits, and what fits if it does not."""

from __future__ import annotations

import yaml

from tl_vpd.checks import instance, number, text_of
from tl_vpd.planning.first_try import first_try
from tl_vpd.planning.footprint import Footprint, footprint
from tl_vpd.planning.machine import Machine
from tl_vpd.training.outlook import duration

FITS = 0.8
"""The fraction of the memory that a run may be planned to take; the allocator and the system need the rest."""
LONG = 24 * 3600
"""Seconds above which a run counts as long."""
FASTER = 1.3
"""How many times as fast products in bfloat16 must be to be recommended."""
CONTEXT = 64
"""Tokens in a row of a first try."""


def plan_lines(cost: Footprint, machine: Machine, seconds: float | None = None, *, why: str = "") -> list[str]:
    """A run's table, its time, and what to change where the machine is too small or too slow for it.

    Args:
        cost: of the run.
        machine: that it is planned for.
        seconds: of a step, timed (None: those of its matrix products are told).
        why: no step was timed, for the line that says so.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of its range.
    """
    cost, machine, why = instance("cost", cost, Footprint), instance("machine", machine, Machine), text_of("why", why)
    seconds = None if seconds is None else number("seconds", seconds, above=0)
    table = cost.table().round(3).astype(object)
    lines = [table.where(table.notna(), "").to_string(index=False)]
    lines.append(", ".join(f"{name}: {n:,}" for name, n in cost.counts.items()))
    steps, products = cost.config.steps, _products(cost, machine)
    if seconds is not None:
        lines.append(
            f"A step takes {seconds:.3g} s, as timed here ({products:.3g} s of it are matrix products at this machine's rate, "
            f"{machine.tflops:.3g} TFLOP per second): {duration(seconds * steps)} for {steps:,} steps."
        )
    else:
        rate = "as timed here" if machine.timed else "as given"
        lines.append(
            f"The matrix products of a step take {products:.3g} s at {machine.tflops:.3g} TFLOP per second, {rate}: "
            f"{duration(products * steps)} or more for {steps:,} steps{f' (no step was timed: {why})' if why else ''}."
        )
    return lines + (advice(cost, machine, seconds) if machine.memory else [])


def advice(cost: Footprint, machine: Machine, seconds: float | None = None) -> list[str]:
    """Whether a run fits on a machine of known memory, and what to change; ``seconds`` of a step, if one was timed."""
    lines, slow = [], (seconds or _products(cost, machine)) * cost.config.steps
    too_large = cost.total > FITS * machine.memory
    if too_large:
        largest = sorted(cost.bytes, key=lambda part: -cost.bytes[part])[:2]
        lines.append(
            f"The run needs {cost.total / 2**30:.1f} GiB (most of it: {', '.join(largest)}) and this machine has "
            f"{machine.memory / 2**30:.1f}."
        )
    if slow > LONG:
        lines.append(f"The run takes {duration(slow)}{'' if seconds else ' or more'}.")
    if too_large or slow > LONG:
        lines += _less_memory(cost, machine) if slow <= LONG else []
        lines += _first_tries(cost, machine)
        lines.append("For one behaviour of the model alone, tl_vpd.decompose_targeted decomposes what that needs.")
    else:
        lines.append("The run fits.")
    if (machine.bfloat16 or 0) >= FASTER and cost.execution.precision == "float32":
        lines.append(
            f"Matrix products in bfloat16 are {machine.bfloat16:.1f} times as fast here: try execution.precision='bfloat16'."
        )
    return lines


def _products(cost: Footprint, machine: Machine) -> float:
    """Seconds of a step's matrix products."""
    return cost.step_flops / (machine.tflops * 1e12)


def _less_memory(cost: Footprint, machine: Machine) -> list[str]:
    """How the same run fits, if it does."""
    for pool, rows in ((None, 4), (None, 1), (8, 4), (8, 1)):
        config, changes = cost.config, [f"execution.micro_batch={rows}"]
        if pool:
            adversary = config.adversary.model_copy(update={"pool": pool})
            config, changes = (
                config.model_copy(update={"adversary": adversary}),
                [*changes, f"vpd.adversary.pool={pool}"],
            )
        execution = cost.execution.model_copy(update={"micro_batch": rows})
        smaller = footprint(cost.target, config, context=cost.context, execution=execution, processes=cost.processes)
        if smaller.total <= FITS * machine.memory:
            return [f"It fits with {' and '.join(changes)}: {smaller.total / 2**30:.1f} GiB."]
    return []


def _first_tries(cost: Footprint, machine: Machine) -> list[str]:
    """First tries that fit: on as many blocks as possible, and on the last."""
    layers = sorted({site.layer for site in cost.target.sites if site.layer is not None})
    fitting = {}
    for n in sorted({max(1, len(layers) // part) for part in (1, 2, 4, 8, len(layers))}):
        sites = [f"blocks.{layer}.*" for layer in layers[len(layers) - n :]]
        config = first_try(cost.target, sites=None if n == len(layers) else sites)
        tried = footprint(cost.target, config, context=min(CONTEXT, cost.context))
        if tried.total <= FITS * machine.memory and _products(tried, machine) * config.steps <= LONG:
            fitting[n] = tried
    if not fitting:
        return [
            "Not even a first try on the last block fits: decompose single sites (such as vpd.sites='blocks.0.attn.W_O'), "
            "lower C, or take a larger machine."
        ]
    lines = []
    for n in sorted({1, max(fitting)} & fitting.keys(), reverse=True):
        what = "all blocks" if n == len(layers) else "the last block" if n == 1 else f"the last {n} blocks"
        tried = fitting[n]
        time = duration(_products(tried, machine) * tried.config.steps)
        lines.append(
            f"A first try on {what} fits: {tried.total / 2**30:.1f} GiB, {time} or more for {tried.config.steps} steps of "
            f"{tried.config.batch_size} × {tried.context} tokens."
        )
    fields = tried.config.model_dump(mode="json", exclude_defaults=True)
    lines.append("In a recipe, the last of these is")
    lines.append(f"    data: {{context: {tried.context}}}")
    lines.append(f"    vpd: {yaml.safe_dump(fields, default_flow_style=True, width=10_000, sort_keys=False).strip()}")
    return lines
