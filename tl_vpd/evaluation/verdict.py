"""What is wrong with a decomposition, by its record: one sentence for every known fault.

Distances are judged on the model's scale, the distance z when everything is ablated, so that the limits fit any model. A
limit is a convention, chosen so that faults built by hand are caught and decompositions that work are not; the report
shows the figures too. A decomposition without a known fault need not be right. A figure that is not defined (None) is not
judged: its check says "Not measured".

================  ===============================================  =================================================
check             figure                                           fault
================  ===============================================  =================================================
collapsed         tokens at which some importance is ≥ 0.99        below half of the tokens
explained         KL under rounded masks                           above one half of z
dense             L0 / alive                                       above one half
delta             KL with all masks 1 and Δ 0                      above 5% of z
cancelling        KL with a random half of the unimportant on      above 3 × the rounded one, or 6% of z if more
adversary         KL under the smallest budget of attack           above 5 × the stochastic one, or 10% of z if more
union test        KL under the union of two inputs' sets           above 3 × the one alone, or 6% of z if more
off-distribution  worst share of z on other data                   above 4 × the share on these rows, or 8% if more
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
NOT_FINITE = "it is not a finite number"
"""Why a figure was left out of a record that should have one."""
FLOOR = 0.02
"""Share of z below which a distance counts as nothing."""
ROWS_FOR_LOOKUP = 8


@dataclass(frozen=True)
class Check:
    """One check: a figure, above (``collapsed`` and ``controls``: below) which limit it is a fault, a sentence.

    ``value`` and ``limit`` are None where the figure is not defined.
    """

    check: str
    value: float | None
    limit: float | None
    fault: bool
    sentence: str


class NotMeasured(Exception):
    """A figure is not defined; the message is its name."""


def warnings_of(record: Record | Any) -> list[str]:
    """The sentences of all faults of a report (an ``Evaluation``, or its record), and one of figures that are not finite."""
    record = _record_of(record)
    sentences = [check.sentence for check in checks(record) if check.fault]
    undefined = [name for name, why in record.get("left_out", {}).items() if why == NOT_FINITE]
    if undefined:
        sentences.append(f"{len(undefined)} figures are NaN or infinite: {', '.join(undefined)}.")
    return sentences


def checks(record: Record | Any) -> list[Check]:
    """All checks that a report allows. Measures that were left out are not judged; what is not defined is named."""
    record = _record_of(record)
    results = []
    for name, check in _CHECKS.items():
        try:
            result = check(record)
        except NotMeasured as error:
            figure = str(error)
            why = record.get("left_out", {}).get(figure, "it is not defined on these rows")
            result = Check(name, None, None, False, f"Not measured: {figure} ({why}).")
        if result is not None:
            results.append(result)
    return results


def _record_of(record: Any) -> Record:
    """The record of a report, or the record itself."""
    result = record if isinstance(record, Mapping) else getattr(record, "record", None)
    if not isinstance(result, Mapping):
        raise TypeError(f"record is a {type(record).__name__}: give an Evaluation, or its record.")
    return result


def number(value: float | None) -> float:
    """A figure of a record as a float (NaN: not defined)."""
    return float("nan") if value is None else float(value)


def _figure(record: Record, *keys: str) -> float:
    """A figure of the record.

    Raises:
        NotMeasured: it is None or not finite.
        ValueError: the record has no such figure.
    """
    value: Any = record
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"The record has no {'.'.join(keys)}: give an Evaluation, or its record.")
        value = value[key]
    if value is None or not math.isfinite(value):
        raise NotMeasured(".".join(keys))
    return float(value)


def _above(name: str, value: float, limit: float, bad: str, good: str) -> Check:
    fault = value > limit
    return Check(name, value, limit, fault, bad if fault else good)


def _floor(record: Record) -> float:
    return FLOOR * _figure(record, "kl", "zero")


def _unit(record: Record) -> str:
    return "nats" if record.get("output", "kl") == "kl" else "squared error"


def _collapsed(record: Record) -> Check | None:
    """Importances that are 0, or below 1, nearly everywhere protect nothing."""
    if "importances" not in record:
        return None
    share, largest = (_figure(record, "importances", name) for name in ("tokens_at_1", "largest"))
    limit = 0.5
    bad = "Importances have collapsed: all of them are 0 on these tokens."
    if largest:
        bad = (
            f"Importances have collapsed: only at {share:.0%} of tokens does any reach 1 (the largest is "
            f"{largest:.2f}), so nothing is protected from being ablated in part."
        )
    good = f"At {share:.0%} of tokens some importance is 1."
    return Check("collapsed", share, limit, share < limit, bad if share < limit else good)


def _explained(record: Record) -> Check:
    """The important subcomponents alone are no better than nothing."""
    rounded, zero = _figure(record, "kl", "rounded"), _figure(record, "kl", "zero")
    what = f"{rounded:.3g} {_unit(record)} under rounded masks, {zero:.3g} with every site ablated"
    return _above(
        "explained",
        rounded / max(zero, 1e-30),
        0.5,
        f"What is called important explains little of the output: {what}.",
        f"What is called important explains the output: {what}.",
    )


def _dense(record: Record) -> Check | None:
    """Nearly everything alive is important at every token."""
    if not record["alive"]:
        return None
    l0 = _figure(record, "l0")
    share = l0 / record["alive"]
    what = f"{l0:.4g} of {record['alive']} alive subcomponents are important per token ({share:.1%})"
    return _above("dense", share, 0.5, f"The decomposition is dense: {what}, so importances say little.", f"{what}.")


def _delta(record: Record) -> Check | None:
    """The subcomponents do not add up to the weights."""
    share = _figure(record, "kl", "unmasked") / max(_figure(record, "kl", "zero"), 1e-30)
    shares = {name: share for name, share in record.get("delta_share", {}).items() if share is not None} or {"": 0.0}
    largest = max(shares.items(), key=lambda item: item[1])
    where = f" (Δ has {largest[1]:.1%} of the square of {largest[0]})" if largest[0] else ""
    return _above(
        "delta",
        share,
        0.05,
        f"Δ does the work: with every subcomponent on and Δ off the output is {share:.0%} as far off as with nothing on{where}.",
        f"Without Δ the output is {share:.2%} as far off as with nothing on.",
    )


def _cancelling(record: Record) -> Check | None:
    """Subcomponents that may be left out together but not one by one."""
    if "partial" not in record["kl"]:
        return None
    partial, rounded = _figure(record, "kl", "partial"), _figure(record, "kl", "rounded")
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


def _adversary(record: Record) -> Check | None:
    """Masks that are bad together exist, though random ones are fine."""
    if not record["pgd_kl"]:
        return None
    steps = min(record["pgd_kl"], key=int)
    attacked, stochastic = _figure(record, "pgd_kl", steps), _figure(record, "kl", "stochastic")
    what = f"{attacked:.3g} {_unit(record)} under {steps} steps of attack, {stochastic:.3g} under random masks"
    return _above(
        "adversary",
        attacked,
        max(5 * stochastic, 5 * _floor(record)),
        f"It survives chance but not an adversary: {what}; what is called unimportant matters in combination.",
        f"It withstands an adversary of this budget: {what}.",
    )


def _union_test(record: Record) -> Check | None:
    """Explanations of two inputs disturb each other."""
    pairs = [
        row
        for row in record.get("tables", {}).get("union_test", [])
        if row["pieces"] == "learned" and row["inputs"] == 2
    ]
    if not pairs:
        return None
    union, alone = (_figure({"union_test": pairs[0]}, "union_test", name) for name in ("kl_union", "kl_alone"))
    what = (
        f"{union:.3g} {_unit(record)} with the union of two inputs' important sets, {alone:.3g} with each input's set"
    )
    return _above(
        "union test",
        union,
        max(3 * alone, 3 * _floor(record)),
        f"Explanations do not add up: {what}.",
        f"Explanations add up: {what}.",
    )


def _off_distribution(record: Record) -> Check | None:
    """It holds on these rows only."""
    rows = record.get("tables", {}).get("off_distribution", [])
    if len(rows) < 2:
        return None
    others = [row for row in rows[1:] if math.isfinite(number(row["share_of_zero"]))]
    if not others:
        raise NotMeasured("off_distribution.share_of_zero")
    base = _figure({"off_distribution": rows[0]}, "off_distribution", "share_of_zero")
    worst = max(others, key=lambda row: row["share_of_zero"])
    share = worst["share_of_zero"]
    what = (
        f"on {worst['data']!r} rounded masks are {share:.1%} as far off as ablating everything, on {rows[0]['data']} "
        f"{base:.1%}"
    )
    return _above(
        "off-distribution",
        share,
        4 * max(base, FLOOR),
        f"It does not hold off distribution: {what}.",
        f"It holds off distribution: {what}.",
    )


def _lookup(record: Record) -> Check | None:
    """Most importance lies on subcomponents of a single input."""
    if "importances" not in record or record.get("rows", 0) < ROWS_FOR_LOOKUP or not record["alive"]:
        return None
    share = _figure(record, "importances", "one_row")
    what = f"of all importance is on subcomponents that a single row of {record['rows']} uses"
    return _above("lookup", share, 0.5, f"It looks like a lookup table: {share:.0%} {what}.", f"{share:.1%} {what}.")


def _controls(record: Record) -> Check | None:
    """Which subcomponents are used, or at which tokens, does not matter much."""
    controls = {
        name: _figure(control, "kl", "rounded")
        for name, control in record.get("controls", {}).items()
        if name in ("random", "shuffled")
    }
    if not controls:
        return None
    name = min(controls, key=lambda n: controls[n])
    learned, value = _figure(record, "kl", "rounded"), controls[name]
    limit = max(2 * learned, _floor(record))
    what = f"{learned:.3g} {_unit(record)} under rounded masks, {value:.3g} with {name} importances"
    sentence = f"It is hardly better than chance: {what}." if value < limit else f"It is better than chance: {what}."
    return Check("controls", value, limit, value < limit, sentence)


_CHECKS: dict[str, Callable[[Record], Check | None]] = {
    "collapsed": _collapsed,
    "explained": _explained,
    "dense": _dense,
    "delta": _delta,
    "cancelling": _cancelling,
    "adversary": _adversary,
    "union test": _union_test,
    "off-distribution": _off_distribution,
    "lookup": _lookup,
    "controls": _controls,
}
