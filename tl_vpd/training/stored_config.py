"""Configs as states and records of earlier runs have them: flat, with older names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tl_vpd.importance.config import stored_gamma
from tl_vpd.training.config import MinimalityConfig, OptimizerConfig

_MOVED = {
    "minimality": ("minimality", "kind"),
    "minimality_warm_up": ("minimality", "warm_up"),
    **{name: ("minimality", name) for name in MinimalityConfig.model_fields if name not in ("kind", "warm_up")},
    **{name: ("optimizer", name) for name in OptimizerConfig.model_fields},
    "faithfulness": ("faithfulness", "kind"),
    "warm_up_steps": ("faithfulness", "warm_up_steps"),
    "warm_up_lr": ("faithfulness", "warm_up_lr"),
}
"""Where the fields of a flat config, as older states and records have them, are now."""


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stored ``VPDConfig`` as they are named now, whether they were stored flat or nested.

    >>> upgraded({"steps": 5, "lr": 1e-3, "minimality": "power", "p_end": 0.5, "forward_slope": 0.0})
    {'steps': 5, 'optimizer': {'lr': 0.001}, 'minimality': {'kind': 'power', 'p_end': 0.5}}
    """
    nested: dict[str, Any] = {}
    smooth = config.get("minimality") == "smooth_l0"
    for name, value in config.items():
        if name == "forward_slope" and not value:
            continue  # of masks that could be negative: SPD's alone
        if name.startswith("p_" if smooth else "smooth_"):
            continue  # of the other kind of minimality, and therefore without effect
        if name in _MOVED and not isinstance(value, Mapping):
            section, field = _MOVED[name]
            nested.setdefault(section, {})[field] = value
        else:
            nested[name] = value
    if "gamma" in nested:
        nested["gamma"] = stored_gamma(nested["gamma"])
    return nested
