"""What is known of a model with known truth: how many subcomponents each site has, and on which inputs each is needed.

A *probe* is a batch of inputs for which it is known what must be important. Of a site it may be known which directions its
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

from tl_vpd.printing import Printed


@dataclass(frozen=True)
class SiteTruth(Printed):
    """One site's true subcomponents.

    Args:
        count: how many there are.
        pattern: which of them each input of the probe needs.
        axis: of a site with one subcomponent per feature, the axis of ``W [d_in, d_out]`` on which features lie (None: their
            directions are not known).
        basis: feature j's direction on that axis.
        visible: directions of the other axis that the model's output depends on (None: all). What lies across them does nothing,
            and pieces may have as much of it as they like.
        either: where 0 and 1 are both right: the subcomponent matters so little there that leaving it out may be cheaper.
        whole: whether they are one piece, to be important together.

    Raises:
        ValueError: only one of ``axis`` and ``basis`` is passed.
    """

    count: int
    pattern: Bool[Tensor, "probe count"]
    axis: Literal["in", "out"] | None = None
    basis: Float[Tensor, "count _"] | None = None
    visible: Float[Tensor, "_ k"] | None = None
    either: Bool[Tensor, "probe count"] | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if (self.axis is None) != (self.basis is None):
            raise ValueError(
                "A site with one subcomponent per feature needs both axis and basis; pass neither where directions are unknown."
            )

    def effects(self, matrices: Float[Tensor, "*n d_in d_out"]) -> Float[Tensor, "*n count k"]:
        """What matrices (the weight, or pieces of it) do with each feature, in visible directions.

        Raises:
            ValueError: the features' directions are not known.
        """
        if self.basis is None:
            raise ValueError("This site's truth has no directions of features.")
        axes = "f i, ... i o -> ... f o" if self.axis == "in" else "f o, ... i o -> ... f i"
        effects = torch.einsum(axes, self.basis, matrices)
        return effects if self.visible is None else effects @ self.visible


@dataclass(frozen=True)
class Truth(Printed):
    """What is known of a model.

    Args:
        probe: inputs.
        sites: by name.
        latents: by name, True where the token needs the fact.
        needed: by site, where in the probe anything of it is needed.
    """

    probe: Shaped[Tensor, "rows pos ..."]
    sites: Mapping[str, SiteTruth] = field(default_factory=dict)
    latents: Mapping[str, Bool[Tensor, "rows pos"]] = field(default_factory=dict)
    needed: Mapping[str, Bool[Tensor, "rows pos"]] = field(default_factory=dict)
