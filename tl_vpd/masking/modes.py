"""Mask modes: from causal importances to the masks of a forward pass.

===========  ==========================================================  ================  =============================
mode         mask of a subcomponent of importance g                      Δ by default      options
===========  ==========================================================  ================  =============================
unmasked     1                                                           0                 delta
stochastic   ``g + (1 − g) r``, r uniform in [0, 1] for every token      uniform as well   delta, seed
rounded      1 where ``g > threshold``, else 0                           0                 delta, threshold
ci           g                                                           0                 delta
adversarial  ``g + (1 − g) r``, r by gradient ascent (shared sources)    attacked as well  seed, steps, step_size
zero         0                                                           0                 delta
===========  ==========================================================  ================  =============================

``delta`` overrides the third column: a number, or ``"drawn"``, which makes ``seed`` an option of every mode. (VPD paper, section
on masked forwards; *stochastic* and *rounded* are also the SPD paper's.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.checks import check_threshold, integer, number, seed_of, shown
from tl_vpd.masking.factors import factor_of
from tl_vpd.masking.masks import Masks, constant_masks, masks_from_sources
from tl_vpd.site import ConcatenatedAxis, nearest

Mode = Literal["unmasked", "stochastic", "rounded", "ci", "adversarial", "zero"]
MODES: tuple[Mode, ...] = ("unmasked", "stochastic", "rounded", "ci", "adversarial", "zero")
NEED_IMPORTANCES = ("stochastic", "rounded", "ci", "adversarial")
Delta = float | Literal["drawn"] | None

MODES_OF_OPTION: dict[str, tuple[Mode, ...]] = {
    "threshold": ("rounded",),
    "delta": tuple(mode for mode in MODES if mode != "adversarial"),
    "seed": ("stochastic", "adversarial"),
    "steps": ("adversarial",),
    "step_size": ("adversarial",),
}
"""Which modes take an option. Elsewhere it would do nothing, and raises."""


class ModeKeywords(TypedDict, total=False):
    """The options of a mode as keywords; see ``ModeOptions``."""

    threshold: float | None
    delta: Delta | str
    seed: int | None
    steps: int | None
    step_size: float | None


@dataclass(frozen=True)
class ModeOptions:
    """The options of a mode, checked.

    Attributes:
        threshold: of ``rounded``: importances above it give mask 1.
        delta: factor of Δ: a number, ``"drawn"``, or None for the mode's default.
        seed: of every random number (None: torch's global generator).
        steps: of the adversary's ascent, 1 or more.
        step_size: length of each step (None: ``2 / steps``).
    """

    threshold: float = 0.0
    delta: Delta = None
    seed: int | None = None
    steps: int = 20
    step_size: float | None = None

    @classmethod
    def of(cls, mode: str, options: Mapping[str, Any], *, label: str | None = None) -> ModeOptions:
        """The options of a mode (``label``: what the caller calls it) from keywords; None stands for the default. Raises
        ValueError where the mode does not exist or does not take an option, or a value is impossible, TypeError for an unknown
        option.
        """
        if not isinstance(mode, str) or mode not in MODES:
            raise ValueError(f"mode={shown(mode)} is not a mask mode{nearest(mode, MODES)}. Modes: {', '.join(MODES)}.")
        label = label or f"the mode {mode!r}"
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(f"{name!r} is not an option of a mask mode{nearest(name, names)}: {', '.join(names)}.")
        options = {name: value for name, value in options.items() if value is not None}
        delta = options.get("delta")
        if isinstance(delta, str) and delta != "drawn":
            raise ValueError(f"delta={shown(delta)}: give a number, 'drawn', or None for the mode's default.")
        for name, value in options.items():
            if mode in MODES_OF_OPTION[name] or (name == "seed" and isinstance(delta, str)):
                continue
            if name == "delta":
                raise ValueError(
                    f"delta={shown(value)} does nothing in {label}, which attacks Δ as well: leave delta out."
                )
            modes = " and ".join(repr(m) for m in MODES_OF_OPTION[name])
            raise ValueError(f"{name}={shown(value)} does nothing in {label}: {name} belongs to {modes}; leave it out.")
        return cls(**{name: _checked(name, value) for name, value in options.items()})


def _checked(name: str, value: Any) -> Any:
    """A mode's option in its type; raises TypeError or ValueError if it is not a number of its range."""
    if name == "threshold":
        return check_threshold(value)
    if name == "seed":
        return seed_of(value)
    if name == "steps":
        return integer("steps", value, minimum=1)
    if name == "step_size":
        return number("step_size", value, above=0)
    return value if isinstance(value, str) else factor_of("delta", value)


def masks_of_mode(
    mode: Mode,
    g: Float[Tensor, "*batch C_total"],
    site_axis: ConcatenatedAxis,
    *,
    threshold: float = 0.0,
    delta: Delta = None,
    generator: torch.Generator | None = None,
) -> Masks:
    """The masks of every mode but ``adversarial``, which needs a model to attack. ``delta`` None: the mode's default;
    ``generator`` None: torch's global one.
    """
    if delta is None:
        delta = "drawn" if mode == "stochastic" else 0.0
    shape = g.shape[:-1]

    def uniform(*size: int) -> Tensor:
        device = g.device if generator is None else generator.device
        return torch.rand(*size, generator=generator, device=device, dtype=torch.float32).to(g)

    n = len(site_axis.names)
    if mode == "stochastic":
        deltas = uniform(*shape, n) if delta == "drawn" else torch.full((*shape, n), float(delta)).to(g)
        return masks_from_sources(g, torch.cat([uniform(*g.shape), deltas], dim=-1), site_axis)
    mask = {
        "unmasked": lambda: torch.ones_like(g),
        "zero": lambda: torch.zeros_like(g),
        "ci": lambda: g,
        "rounded": lambda: (g > threshold).to(g.dtype),
    }[mode]()
    if delta == "drawn":
        return masks_from_sources(mask, torch.cat([torch.zeros_like(g), uniform(*shape, n)], dim=-1), site_axis)
    return constant_masks(mask, delta, site_axis)
