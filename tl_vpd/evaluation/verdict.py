"""What is wrong with a decomposition, by its record: one sentence for every known fault.

Distances are judged on the model's own scale, the distance z when everything is ablated, so that the limits fit any model. A
limit is a convention, chosen so that faults built by hand are caught and decompositions that work are not; the figures stand
beside it. That nothing is found does not make a decomposition right.

================  ===============================================  =================================================
check             is measured                                      fault
================  ===============================================  =================================================
collapsed         tokens at which some importance is ≥ 0.99        below half of the tokens
dense             L0 / alive                                       above one half
delta             KL with all masks 1 and Δ 0                      above 5% of z
cancelling        KL with a random half of the unimportant kept    above 3 × the rounded one, or 6% of z if more
adversary         KL under the smallest budget of attack           above 5 × the stochastic one, or 10% of z if more
aggregation       KL under the union of two inputs' sets           above 3 × the one alone, or 6% of z if more
off-distribution  worst share of z on another slice                above 4 × the share on these rows, or 8% if more
lookup            importance on subcomponents of a single row      above one half, of eight or more rows
controls          rounded KL of random or shuffled importances     below 2 × the learned one, or 2% of z if more
================  ===============================================  =================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
FLOOR = 0.02
"""Share of z below which a distance counts as nothing."""
ROWS_FOR_LOOKUP = 8


@dataclass(frozen=True)
class Check:
    """One check: what was measured, above (``collapsed`` and ``controls``: below) which limit it is a fault, a sentence."""

    check: str
    value: float
    limit: float
    fault: bool
    sentence: str


def warnings_of(record: Record | Any) -> list[str]:
    """The sentences of all faults of a report (an ``Evaluation``, or its record); what it does not hold is not judged."""
    return [check.sentence for check in checks(record) if check.fault]


def checks(record: Record | Any) -> list[Check]:
    """All checks that a report allows."""
    own: Record = record if isinstance(record, Mapping) else record.record
    return [check for make in _CHECKS if (check := make(own)) is not None]


def _above(name: str, value: float, limit: float, bad: str, good: str) -> Check:
    fault = not value <= limit
    return Check(name, value, limit, fault, bad if fault else good)


def _floor(record: Record) -> float:
    return FLOOR * float(record["kl"]["zero"])


def _unit(record: Record) -> str:
    return "nats" if record.get("output", "kl") == "kl" else "squared error"


def collapsed(record: Record) -> Check | None:
    """Importances that are 0, or below 1, nearly everywhere protect nothing."""
    shape = record.get("importances")
    if shape is None:
        return None
    share, limit = shape["tokens_at_1"], 0.5
    if not shape["largest"]:
        bad = "Importances have collapsed: all of them are 0 on these tokens."
    else:
        bad = (
            f"Importances have collapsed: only at {share:.0%} of tokens does any reach 1 (the largest is "
            f"{shape['largest']:.2f}), so nothing is kept from being ablated in part."
        )
    return Check(
        "collapsed",
        share,
        limit,
        share < limit,
        bad if share < limit else f"At {share:.0%} of tokens some importance is 1.",
    )


def dense(record: Record) -> Check | None:
    """Nearly everything alive is important at every token."""
    if not record["alive"]:
        return None
    share = record["l0"] / record["alive"]
    what = f"{record['l0']:.4g} of {record['alive']} living subcomponents are important at a token ({share:.1%})"
    return _above("dense", share, 0.5, f"The decomposition is dense: {what}, so importances say little.", f"{what}.")


def delta(record: Record) -> Check | None:
    """The subcomponents do not add up to the weights."""
    share = record["kl"]["unmasked"] / max(record["kl"]["zero"], 1e-30)
    largest = max(record.get("delta_share", {"": 0.0}).items(), key=lambda item: item[1])
    where = f" (Δ holds {largest[1]:.1%} of the square of {largest[0]})" if largest[0] else ""
    return _above(
        "delta",
        share,
        0.05,
        f"Δ does the work: with every subcomponent on and Δ off the output is {share:.0%} as far off as with nothing on{where}.",
        f"Without Δ the output is {share:.2%} as far off as with nothing on.",
    )


def cancelling(record: Record) -> Check | None:
    """Subcomponents that may be left out together but not one by one."""
    if "partial" not in record["kl"]:
        return None
    partial, rounded = record["kl"]["partial"], record["kl"]["rounded"]
    pairs = record.get("tables", {}).get("cancelling") or []
    named = f"; {pairs[0]['one']} and {pairs[0]['other']} cancel, of {len(pairs)} such pairs" if pairs else ""
    return _above(
        "cancelling",
        partial,
        max(3 * rounded, 3 * _floor(record)),
        f"What is called unimportant can be left out together but not in part: {partial:.3g} {_unit(record)} with a "
        f"random half of it left out, {rounded:.3g} without all of it{named}.",
        f"Leaving out a random half of what is unimportant costs {partial:.3g} {_unit(record)}, all of it {rounded:.3g}.",
    )


def adversary(record: Record) -> Check | None:
    """Masks that are bad together exist, though random ones are fine."""
    if not record["pgd_kl"]:
        return None
    steps = min(record["pgd_kl"], key=int)
    found, stochastic = record["pgd_kl"][steps], record["kl"]["stochastic"]
    what = f"{found:.3g} {_unit(record)} under {steps} steps of attack, {stochastic:.3g} under random masks"
    return _above(
        "adversary",
        found,
        max(5 * stochastic, 5 * _floor(record)),
        f"It survives chance but not an adversary: {what}; what is called unimportant matters in combination.",
        f"It holds against an adversary of this budget: {what}.",
    )


def _is_number(value: float | None) -> bool:
    """Whether a figure of the record is one: what is not defined is NaN here and null in JSON."""
    return value is not None and not math.isnan(value)


def aggregation(record: Record) -> Check | None:
    """Explanations of two inputs are in each other's way."""
    rows = [
        row
        for row in record.get("tables", {}).get("aggregation", [])
        if row["pieces"] == "learned" and row["inputs"] == 2
    ]
    if not rows:
        return None
    union, alone = rows[0]["kl_union"], rows[0]["kl_alone"]
    if not _is_number(union) or not _is_number(alone):
        return None
    what = f"{union:.3g} {_unit(record)} with the union of two inputs' important sets, {alone:.3g} with each one's own"
    return _above(
        "aggregation",
        union,
        max(3 * alone, 3 * _floor(record)),
        f"Explanations do not add up: {what}.",
        f"Explanations add up: {what}.",
    )


def off_distribution(record: Record) -> Check | None:
    """It holds on these rows only."""
    rows = record.get("tables", {}).get("slices", [])
    others = [row for row in rows[1:] if _is_number(row["share_of_zero"])]
    if not others or not _is_number(rows[0]["share_of_zero"]):
        return None
    here = rows[0]["share_of_zero"]
    worst = max(others, key=lambda row: row["share_of_zero"])
    share = worst["share_of_zero"]
    what = (
        f"on {worst['slice']!r} rounded masks are {share:.1%} as far off as ablating everything, on {rows[0]['slice']} "
        f"{here:.1%}"
    )
    return _above(
        "off-distribution",
        share,
        4 * max(here, FLOOR),
        f"It does not hold off distribution: {what}.",
        f"It holds off distribution: {what}.",
    )


def lookup(record: Record) -> Check | None:
    """Most importance lies on subcomponents of a single input."""
    shape = record.get("importances")
    if shape is None or record.get("rows", 0) < ROWS_FOR_LOOKUP or not record["alive"]:
        return None
    share = shape["one_row"]
    what = f"of all importance is on subcomponents that a single row of {record['rows']} uses"
    return _above(
        "lookup",
        share,
        0.5,
        f"It looks like a lookup table: {share:.0%} {what}.",
        f"{share:.1%} {what}.",
    )


def controls(record: Record) -> Check | None:
    """Which subcomponents are kept, or at which tokens, does not matter much."""
    found = {n: c["kl"]["rounded"] for n, c in record.get("controls", {}).items() if n in ("random", "shuffled")}
    if not found:
        return None
    name = min(found, key=lambda n: found[n])
    own, limit = record["kl"]["rounded"], max(2 * record["kl"]["rounded"], _floor(record))
    what = f"{own:.3g} {_unit(record)} under rounded masks, {found[name]:.3g} with {name} importances"
    fault = not found[name] >= limit
    sentence = f"It is hardly better than chance: {what}." if fault else f"It is better than chance: {what}."
    return Check("controls", found[name], limit, fault, sentence)


_CHECKS: tuple[Callable[[Record], Check | None], ...] = (
    collapsed,
    dense,
    delta,
    cancelling,
    adversary,
    aggregation,
    off_distribution,
    lookup,
    controls,
)
