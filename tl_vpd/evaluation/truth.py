"""What is known of a model with known truth: how many subcomponents each site has, and on which inputs each is needed.

A *probe* is a batch of inputs on which it is known what must be important. Of a site it may be known which directions its
subcomponents read or write (*features*: a subcomponent for each), or only how many there are. Of a known circuit it is known
at which tokens each site is *needed*; of language only *latents* are known: at which tokens the model needs a certain fact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class SiteTruth:
    """One site's true subcomponents.

    Args:
        count: how many there are.
        pattern: which of them each input of the probe needs.
        axis: of a site with one subcomponent a feature, the axis of ``W [d_in, d_out]`` on which features lie (None: their
            directions are not known).
        basis: feature j's direction on that axis.
        seen: directions of the other axis that the model's output depends on (None: all). What lies across them does nothing,
            and pieces may have as much of it as they like.
        either: where 0 and 1 are both right: what is needed there so little that leaving it out may be cheaper than keeping it.
        whole: whether they are one piece, to be important together.

    Raises:
        ValueError: only one of ``axis`` and ``basis`` is given.
    """

    count: int
    pattern: Bool[Tensor, "probe count"]
    axis: Literal["in", "out"] | None = None
    basis: Float[Tensor, "count _"] | None = None
    seen: Float[Tensor, "_ k"] | None = None
    either: Bool[Tensor, "probe count"] | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if (self.axis is None) != (self.basis is None):
            raise ValueError(
                "A site with one subcomponent a feature needs both axis and basis; give neither where no directions are known."
            )

    def effects(self, matrices: Float[Tensor, "*n d_in d_out"]) -> Float[Tensor, "*n count k"]:
        """What matrices (the weight, or pieces of it) do with each feature, as far as it is seen.

        Raises:
            ValueError: the features' directions are not known.
        """
        if self.basis is None:
            raise ValueError("This site's truth has no directions of features.")
        lying = "f i, ... i o -> ... f o" if self.axis == "in" else "f o, ... i o -> ... f i"
        found = torch.einsum(lying, self.basis, matrices)
        return found if self.seen is None else found @ self.seen


@dataclass(frozen=True)
class Truth:
    """All that is known: ``probe`` inputs, sites by name, latents by name (True where the token needs the fact), and by site
    where in the probe anything of it is ``needed``."""

    probe: Shaped[Tensor, "rows pos ..."]
    sites: Mapping[str, SiteTruth] = field(default_factory=dict)
    latents: Mapping[str, Bool[Tensor, "rows pos"]] = field(default_factory=dict)
    needed: Mapping[str, Bool[Tensor, "rows pos"]] = field(default_factory=dict)
