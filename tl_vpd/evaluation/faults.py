"""Every check of a report: a function of its record, which gives None where its measure was left out (``verdict`` lists them)."""

from __future__ import annotations

import math

from tl_vpd.evaluation.check import FLOOR, Check, NotMeasured, Record, above, figure, floor, number, unit

ROWS_FOR_LOOKUP = 8
LEAK = 0.01
"""Nats of cross-entropy that may come from later tokens."""
ROUNDING = 1e-3
"""Change of an importance that counts as none."""


def collapsed(record: Record) -> Check | None:
    """Importances that are 0, or below 1, nearly everywhere protect nothing."""
    if "importances" not in record:
        return None
    share, largest = (figure(record, "importances", name) for name in ("tokens_at_1", "largest"))
    limit = 0.5
    bad = "Importances have collapsed: all of them are 0 on these tokens."
    if largest:
        bad = (
            f"Importances have collapsed: only at {share:.0%} of tokens does any reach 1 (the largest is "
            f"{largest:.2f}), so nothing is protected from being ablated in part."
        )
    good = f"At {share:.0%} of tokens some importance is 1."
    return Check("collapsed", share, limit, share < limit, bad if share < limit else good)


def explained(record: Record) -> Check:
    """The important subcomponents alone are no better than nothing."""
    rounded, zero = figure(record, "kl", "rounded"), figure(record, "kl", "zero")
    what = f"{rounded:.3g} {unit(record)} under rounded masks, {zero:.3g} with every site ablated"
    return above(
        "explained",
        rounded / max(zero, 1e-30),
        0.5,
        f"What is called important explains little of the output: {what}.",
        f"What is called important explains the output: {what}.",
    )


def dense(record: Record) -> Check | None:
    """Nearly everything alive is important at every token."""
    if not record["alive"]:
        return None
    l0 = figure(record, "l0")
    share = l0 / record["alive"]
    what = f"{l0:.4g} of {record['alive']} alive subcomponents are important per token ({share:.1%})"
    return above("dense", share, 0.5, f"The decomposition is dense: {what}, so importances say little.", f"{what}.")


def delta(record: Record) -> Check | None:
    """The subcomponents do not add up to the weights."""
    share = figure(record, "kl", "unmasked") / max(figure(record, "kl", "zero"), 1e-30)
    shares = {name: share for name, share in record.get("delta_share", {}).items() if share is not None} or {"": 0.0}
    largest = max(shares.items(), key=lambda item: item[1])
    where = f" (Δ has {largest[1]:.1%} of the square of {largest[0]})" if largest[0] else ""
    return above(
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
    partial, rounded = figure(record, "kl", "partial"), figure(record, "kl", "rounded")
    pairs = record.get("tables", {}).get("cancelling") or []
    named = f"; {pairs[0]['one']} and {pairs[0]['other']} cancel, of {len(pairs)} such pairs" if pairs else ""
    return above(
        "cancelling",
        partial,
        max(3 * rounded, 3 * floor(record)),
        f"What is called unimportant can be left out together but not in part: {partial:.3g} {unit(record)} with a "
        f"random half of it left out, {rounded:.3g} without all of it{named}.",
        f"Leaving out a random half of what is unimportant costs {partial:.3g} {unit(record)}, all of it {rounded:.3g}.",
    )


def adversary(record: Record) -> Check | None:
    """Masks that are bad together exist, though random ones are fine."""
    if not record["pgd_kl"]:
        return None
    steps = min(record["pgd_kl"], key=int)
    attacked, stochastic = figure(record, "pgd_kl", steps), figure(record, "kl", "stochastic")
    what = f"{attacked:.3g} {unit(record)} under {steps} steps of attack, {stochastic:.3g} under random masks"
    return above(
        "adversary",
        attacked,
        max(5 * stochastic, 5 * floor(record)),
        f"It survives chance but not an adversary: {what}; what is called unimportant matters in combination.",
        f"It withstands an adversary of this budget: {what}.",
    )


def leak(record: Record) -> Check | None:
    """Masks carry the next token into the cross-entropy."""
    leaks = {mode: leak for mode, leak in record.get("leak", {}).items() if leak is not None}
    if "leak" not in record or not record["leak"]:
        return None
    if not leaks:
        raise NotMeasured("leak")
    mode = max(leaks, key=lambda m: leaks[m])
    bounds = record.get("intervals", {}).get("leak", {}).get(mode)
    interval = "" if bounds is None else f" ({bounds[0]:.3f} to {bounds[1]:.3f})"
    change = figure(record, "importance_change")
    what = (
        f"importances from the prefix alone cost {leaks[mode]:.3f} nats{interval} more cross-entropy under {mode} masks"
    )
    good = f"Importances depend on the prefix alone (they change by {change:.0e} without the later tokens)."
    if change > ROUNDING:
        good = f"Γ reads later tokens, which changes the masked cross-entropy little: {what}."
    bad = f"Masked cross-entropies see the next token: {what}; judge by the KL, or train a causal Γ."
    return above("leak", leaks[mode], LEAK, bad, good)


def union_test(record: Record) -> Check | None:
    """Explanations of two inputs disturb each other."""
    pairs = [
        row
        for row in record.get("tables", {}).get("union_test", [])
        if row["pieces"] == "learned" and row["inputs"] == 2
    ]
    if not pairs:
        return None
    union, alone = (figure({"union_test": pairs[0]}, "union_test", name) for name in ("kl_union", "kl_alone"))
    what = f"{union:.3g} {unit(record)} with the union of two inputs' important sets, {alone:.3g} with each input's set"
    return above(
        "union test",
        union,
        max(3 * alone, 3 * floor(record)),
        f"Explanations do not add up: {what}.",
        f"Explanations add up: {what}.",
    )


def off_distribution(record: Record) -> Check | None:
    """It holds on these rows only."""
    rows = record.get("tables", {}).get("off_distribution", [])
    if len(rows) < 2:
        return None
    others = [row for row in rows[1:] if math.isfinite(number(row["share_of_zero"]))]
    if not others:
        raise NotMeasured("off_distribution.share_of_zero")
    base = figure({"off_distribution": rows[0]}, "off_distribution", "share_of_zero")
    worst = max(others, key=lambda row: row["share_of_zero"])
    share = worst["share_of_zero"]
    what = (
        f"on {worst['data']!r} rounded masks are {share:.1%} as far off as ablating everything, on {rows[0]['data']} "
        f"{base:.1%}"
    )
    return above(
        "off-distribution",
        share,
        4 * max(base, FLOOR),
        f"It does not hold off distribution: {what}.",
        f"It holds off distribution: {what}.",
    )


def lookup(record: Record) -> Check | None:
    """Most importance lies on subcomponents of a single input."""
    if "importances" not in record or record.get("rows", 0) < ROWS_FOR_LOOKUP or not record["alive"]:
        return None
    share = figure(record, "importances", "one_row")
    what = f"of all importance is on subcomponents that a single row of {record['rows']} uses"
    return above("lookup", share, 0.5, f"It looks like a lookup table: {share:.0%} {what}.", f"{share:.1%} {what}.")


def controls(record: Record) -> Check | None:
    """Which subcomponents are used, or at which tokens, does not matter much."""
    controls = {
        name: figure(control, "kl", "rounded")
        for name, control in record.get("controls", {}).items()
        if name in ("random", "shuffled", "untrained")
    }
    if not controls:
        return None
    name = min(controls, key=lambda n: controls[n])
    learned, value = figure(record, "kl", "rounded"), controls[name]
    limit = max(2 * learned, floor(record))
    what = f"{learned:.3g} {unit(record)} under rounded masks, {value:.3g} with {name} importances"
    sentence = f"It is hardly better than chance: {what}." if value < limit else f"It is better than chance: {what}."
    return Check("controls", value, limit, value < limit, sentence)


def nulls(record: Record) -> Check | None:
    """A model whose weights were not learned looks as good."""
    this, *others = record.get("tables", {}).get("nulls", []) or [None]
    if this is None:
        return None
    share, l0 = (figure({"nulls": this}, "nulls", name) for name in ("share_of_zero", "l0"))
    measured = [row for row in others if math.isfinite(number(row["share_of_zero"]))]
    if not measured:
        raise NotMeasured("nulls.share_of_zero")
    sparse = [row for row in measured if row["l0"] <= 1.25 * l0]
    best = min(sparse or measured, key=lambda row: row["share_of_zero"])
    limit = max(2 * share, FLOOR)
    fault = bool(sparse) and best["share_of_zero"] < limit
    what = (
        f"under rounded masks it is {share:.1%} as far off as with nothing on, at L0 {l0:.4g}, and {best['decomposition']!r} "
        f"{best['share_of_zero']:.1%}, at {best['l0']:.4g}"
    )
    sentence = f"A null looks as good: {what}." if fault else f"It looks better than every null: {what}."
    return Check("nulls", best["share_of_zero"], limit, fault, sentence)
