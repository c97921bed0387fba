"""A first config for a model: settings that reach a sparse decomposition in few steps.

Everything starts important and subcomponents start as the weights' channels, so that reconstruction is exact at first; then the
minimality losses rise over three tenths of the run and what is least needed goes first. One masked forward per step, a
small Γ and few rows keep a step cheap. ``docs/your_own_model.md`` has measured runs.

Reconstruction losses are at most the *yardstick*, what ablating the sites costs. Where that is small,
as for a block in the middle of a model, so must the coefficients be: ``yardstick`` measures it.

    >>> from tl_vpd.planning.target import TransformerShape
    >>> config = first_try(Target.of(TransformerShape(layers=2, d_model=64, heads=4, d_mlp=256, vocabulary=99)))
    >>> config.C["*.W_Q"], config.C["*.W_out"], config.gamma.d_ci
    (64, 256, 128)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from tl_vpd.adapters import adapt
from tl_vpd.checks import number
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.planning.target import Target
from tl_vpd.site import Site, select
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.new_decomposition import new_decomposition
from tl_vpd.training.outlook import Outlook, rows_measured

SMALLEST_GAMMA = 128
PER_NAT, ENOUGH = 2e-4, 3.0
"""The importance coefficient for each nat of the yardstick, and the yardstick above which it stays the same."""


def first_try(
    model: nn.Module | Target,
    *,
    sites: str | Sequence[str] | None = None,
    steps: int = 250,
    batch_size: int = 4,
    yardstick: float | None = None,
) -> VPDConfig:
    """A first config for a model, to be changed from there.

    Args:
        model: the target, or its shapes.
        sites: patterns of the sites to decompose (None: all).
        steps: updates.
        batch_size: rows per step.
        yardstick: what ablating these sites costs, in nats (None: 3 or more, as for a whole small model, or for the first or last
            block of a language model).

    Raises:
        TypeError: the model is not a transformer of TransformerLens, or an argument is of another type.
        KeyError: a pattern matches no site.
        ValueError: a number is out of its range.
    """
    target = model if isinstance(model, Target) else Target.of(model)
    names = set(select(sites, [s.name for s in target.sites]))
    cost = ENOUGH if yardstick is None else min(ENOUGH, number("yardstick", yardstick, above=0))
    rising = ((0.0, 0.0), (0.3, 1.0))
    return VPDConfig(
        steps=steps,
        batch_size=batch_size,
        sites=sites,  # type: ignore[arg-type]
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
            "importance": float(f"{PER_NAT * cost:.3g}"),
            "frequency": float(f"{PER_NAT * cost / 2:.3g}"),
            "schedule": {"importance": rising, "frequency": rising},
        },
        optimizer={"lr": 1e-3},  # type: ignore[arg-type]
        adversary={"inner_steps": 1, "lr": 0.02},  # type: ignore[arg-type]
        faithfulness={"warm_up_steps": 0},  # type: ignore[arg-type]
    )


def yardstick(model: nn.Module, tokens: Any, *, sites: str | Sequence[str] | None = None) -> float:
    """What ablating sites costs: the KL divergence in nats per token from the model to the model whose sites give their bias
    alone, on a few rows.

    Args:
        model: the target.
        tokens: rows, or strings.
        sites: patterns of the sites (None: all).

    Raises:
        TypeError: the model is not one that an adapter knows, or an argument is of another type.
        KeyError: a pattern matches no site.
    """
    config = VPDConfig(sites=sites, C=1, gamma={"kind": "per_site_mlps", "hidden": 1})  # type: ignore[arg-type]
    adapter = adapt(model)
    rows = adapter.tokens(tokens)
    rows = rows[: rows_measured(rows)]
    with MaskedModel(new_decomposition(model, config), model, fused_attention=True) as masked_model:
        return Outlook(masked_model, config, rows, adapter.padding(rows, None)).yardstick


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
