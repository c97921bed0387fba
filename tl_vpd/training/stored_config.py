"""Configs as states and records of earlier runs have them: flat, with older names, with two ends in place of knots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tl_vpd.importance.config import stored_gamma
from tl_vpd.training.config_sections import MinimalityConfig, OptimizerConfig

_MOVED = {
    "minimality": ("minimality", "kind"),
    "minimality_warm_up": ("minimality", "warm_up"),
    **{name: ("minimality", name) for name in MinimalityConfig.model_fields if name.startswith("frequency_")},
    **{name: ("minimality", name) for name in ("p_start", "p_end", "smooth_start", "smooth_end", "smooth_share")},
    **{name: ("optimizer", name) for name in OptimizerConfig.model_fields if name != "kind"},
    "faithfulness": ("faithfulness", "kind"),
    "warm_up_steps": ("faithfulness", "warm_up_steps"),
    "warm_up_lr": ("faithfulness", "warm_up_lr"),
}
"""Where the fields of a flat config, as older states and records have them, were later."""


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stored ``VPDConfig`` as they are named now, whether they were stored flat or nested.

    >>> upgraded({"steps": 5, "lr": 1e-3, "minimality": "power", "p_end": 0.5, "forward_slope": 0.0})
    {'steps': 5, 'optimizer': {'lr': 0.001}, 'minimality': {'kind': 'power', 'p': ((0.0, 2.0), (1.0, 0.5))}}
    """
    nested: dict[str, Any] = {}
    for name, value in config.items():
        if name == "forward_slope" and not value:
            continue  # of masks that could be negative: SPD's alone
        if name in _MOVED and not isinstance(value, Mapping):
            section, field = _MOVED[name]
            nested.setdefault(section, {})[field] = value
        else:
            nested[name] = dict(value) if isinstance(value, Mapping) else value
    if isinstance(nested.get("merged"), bool):
        nested["merged"] = 0.5 if nested["merged"] else 0.0
    if "minimality" in nested:
        _as_knots(nested)
    if "gamma" in nested:
        nested["gamma"] = stored_gamma(nested["gamma"])
    return nested


def _as_knots(nested: dict[str, Any]) -> None:
    """Puts knots in the place of the two ends of p and γ, and of the warm-up of the minimality coefficients."""
    minimality = nested["minimality"]
    for name, start, end in (("p", 2.0, 0.4), ("smooth", 1.0, 0.01)):
        ends = {
            key: minimality.pop(f"{name}_{key}") for key in ("start", "end", "share") if f"{name}_{key}" in minimality
        }
        other = minimality.get("kind", "power") != {"p": "power", "smooth": "smooth_l0"}[name]
        if ends and not other:  # those of the other kind had no effect
            share = ends.get("share", 1.0 if name == "p" else 0.9)
            minimality[name] = ((0.0, ends.get("start", start)), (share, ends.get("end", end)))
    if warm_up := minimality.pop("warm_up", 0.0):
        knots = ((0.0, 0.0), (warm_up, 1.0))
        schedule = {"importance": knots, "frequency": knots}
        nested["coefficients"] = {**nested.get("coefficients", {}), "schedule": schedule}
