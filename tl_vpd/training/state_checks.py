"""Whether a stored state is of the run that resumes from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_vpd.components.fingerprint import TOLERANCE, Fingerprint, compare
from tl_vpd.training.config import Precision, VPDConfig
from tl_vpd.training.stored_config import upgraded


class RefusedState(ValueError):
    """An intact state of another run."""


def check_config(config: VPDConfig, path: Path, saved: Mapping[str, Any]) -> None:
    """Refuses a state of another config."""
    # Settings that are newer than the file have their defaults there.
    then, now = (_flat(c.model_dump(mode="json")) for c in (type(config)(**upgraded(saved)), config))
    changed = [f"{name}: {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]
    if changed:
        raise RefusedState(
            f"{path} was written with another config ({', '.join(changed)}). Resume with the config the run was started with, "
            "or choose another folder."
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; C by pattern and the coefficients' schedule are one of them each."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping) and name not in ("C", "schedule")
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def check_precision(precision: Precision, path: Path, saved: str) -> None:
    """Refuses a state of a run in another precision."""
    if saved != precision:
        raise RefusedState(
            f"{path} was written with products in {saved}, this run's are in {precision}: pass "
            f"ExecutionConfig(precision={saved!r})."
        )


def check_target(weights: Mapping[str, Tensor], path: Path, stored: Mapping[str, Fingerprint]) -> None:
    """Refuses a state of other target weights."""
    wrong = compare(stored, {name: weights[name] for name in stored if name in weights})
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name])
        raise RefusedState(
            f"{path} is of other weights than this model's: {len(wrong)} sites differ, {worst} by {wrong[worst]:.3g} "
            f"(allowed {TOLERANCE}). Resume with the model the run was started with, or choose another folder."
        )
