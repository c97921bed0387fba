"""A first config for a model: settings that reach a sparse decomposition in few steps.

Everything starts important and subcomponents start as the weights' channels, so that reconstruction is exact at first; then the
minimality losses rise over three tenths of the run and what is least needed is given up first. One masked forward per step, a
small Γ and few rows keep a step cheap. ``docs/your_own_model.md`` has measured runs.

    >>> from tl_vpd.planning.target import TransformerShape
    >>> config = first_try(Target.of(TransformerShape(layers=2, d_model=64, heads=4, d_mlp=256, vocabulary=99)))
    >>> config.C["*.W_Q"], config.C["*.W_out"], config.gamma.d_ci
    (64, 256, 128)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from tl_vpd.planning.target import Target
from tl_vpd.site import Site, select
from tl_vpd.training.config import VPDConfig

SMALLEST_GAMMA = 128


def first_try(
    model: nn.Module | Target, *, sites: str | Sequence[str] | None = None, steps: int = 250, batch_size: int = 4
) -> VPDConfig:
    """A first config for a model, to be changed from there.

    Args:
        model: the target, or its shapes.
        sites: patterns of the sites to decompose (None: all).
        steps: updates.
        batch_size: rows per step.

    Raises:
        TypeError: the model is not a transformer of TransformerLens, or an argument is of another type.
        KeyError: a pattern matches no site.
        ValueError: a number is out of its range.
    """
    target = model if isinstance(model, Target) else Target.of(model)
    names = set(select(sites, [s.name for s in target.sites]))
    rising = ((0.0, 0.0), (0.3, 1.0))
    return VPDConfig(
        steps=steps,
        batch_size=batch_size,
        sites=None if sites is None else sites,  # type: ignore[arg-type]
        C=_channel_counts([s for s in target.sites if s.name in names]),
        init="channels",
        merged=0.5,
        gamma={  # type: ignore[arg-type]
            "d_ci": max(SMALLEST_GAMMA, 2 ** int(math.log2(max(target.d_model, 2) / 2))),
            "n_blocks": 1,
            "output_bias": 0.8,
        },
        coefficients={  # type: ignore[arg-type]
            "delta": 1e5,
            "importance": 6e-4,
            "frequency": 3e-4,
            "schedule": {"importance": rising, "frequency": rising},
        },
        optimizer={"lr": 1e-3},  # type: ignore[arg-type]
        adversary={"inner_steps": 1, "lr": 0.02},  # type: ignore[arg-type]
        faithfulness={"warm_up_steps": 0},  # type: ignore[arg-type]
    )


def _channel_counts(sites: Sequence[Site]) -> dict[str, int]:
    """Neurons or head channels by pattern of sites, or by site where the same weight differs between blocks."""
    by_weight: dict[str, dict[str, int]] = {}
    for site in sites:
        channels = site.d_in if site.short in ("o", "out") else site.d_out
        by_weight.setdefault("*." + site.name.rsplit(".", 1)[1], {})[site.name] = channels
    return {
        pattern: count
        for weight, counts in by_weight.items()
        for pattern, count in ({weight: max(counts.values())} if len(set(counts.values())) == 1 else counts).items()
    }
