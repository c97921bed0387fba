"""What is known of a model with known truth: how many subcomponents each site has, and on which inputs each is needed.

A *probe* is a batch of inputs on which it is known what must be important. Two kinds of site are known: one subcomponent a
feature (*features*, important where the feature is on), and one piece of a given rank (*dense*, all of it important
whenever anything is). Of a known circuit it is known at which tokens each site is *needed*; of language only *latents* are
known: at which tokens the model needs a certain fact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Bool, Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class SiteTruth:
    """One site's true subcomponents.

    Args:
        count: how many there are.
        pattern: which of them each input of the probe needs.
        axis: of a site with one subcomponent a feature, the axis of ``W [d_in, d_out]`` on which features lie (None: the site is
            one piece of rank ``count``).
        basis: feature j's direction on that axis.

    Raises:
        ValueError: only one of ``axis`` and ``basis`` is given.
    """

    count: int
    pattern: Bool[Tensor, "probe count"]
    axis: Literal["in", "out"] | None = None
    basis: Float[Tensor, "count _"] | None = None

    def __post_init__(self) -> None:
        if (self.axis is None) != (self.basis is None):
            raise ValueError(
                "A site with one subcomponent a feature needs both axis and basis; give neither for a dense one."
            )


@dataclass(frozen=True)
class Truth:
    """All that is known: ``probe`` inputs, sites by name, latents by name (True where the token needs the fact), and by site
    where in the probe anything of it is ``needed``."""

    probe: Shaped[Tensor, "rows pos ..."]
    sites: Mapping[str, SiteTruth] = field(default_factory=dict)
    latents: Mapping[str, Bool[Tensor, "rows pos"]] = field(default_factory=dict)
    needed: Mapping[str, Bool[Tensor, "rows pos"]] = field(default_factory=dict)
