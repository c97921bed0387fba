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
leak              CE from the prefix alone less from the window    above 0.01 nats in some mode
union test        KL under the union of two inputs' sets           above 3 × the one alone, or 6% of z if more
off-distribution  worst share of z on other data                   above 4 × the share on these rows, or 8% if more
lookup            importance on subcomponents of a single row      above one half, of eight or more rows
controls          rounded KL of random, shuffled or untrained      below 2 × the learned one, or 2% of z if more
                  importances
nulls             rounded share of z of another model's null       below 2 × the learned one, or 2%, at an L0 not above 1.25
                                                                   × the learned one
================  ===============================================  =================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tl_vpd.evaluation import faults
from tl_vpd.evaluation.check import NOT_FINITE, Check, NotMeasured, Record

_CHECKS: dict[str, Callable[[Record], Check | None]] = {
    "collapsed": faults.collapsed,
    "explained": faults.explained,
    "dense": faults.dense,
    "delta": faults.delta,
    "cancelling": faults.cancelling,
    "adversary": faults.adversary,
    "leak": faults.leak,
    "union test": faults.union_test,
    "off-distribution": faults.off_distribution,
    "lookup": faults.lookup,
    "controls": faults.controls,
    "nulls": faults.nulls,
}


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
