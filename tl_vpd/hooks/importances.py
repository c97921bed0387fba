"""Causal importances of prompts, as a result to look at and to make masks from.

>>> ci = vpd.causal_importances(model, "def f(x):")     # doctest: +SKIP
>>> ci["blocks.1.mlp.W_in"].shape                       # doctest: +SKIP
torch.Size([1, 9, 384])
>>> ci.top(5)                                           # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from tl_vpd.checks import integer, number
from tl_vpd.forward import MaskedModel
from tl_vpd.importance import DecomposedWeights
from tl_vpd.masking import Masks
from tl_vpd.masking.modes import Delta, Mode, ModeOptions, masks_of_mode
from tl_vpd.printing import Printed
from tl_vpd.site import BySite, ConcatenatedAxis


@dataclass(frozen=True)
class CausalImportances(BySite, Printed):
    """Importances in [0, 1] by site, each ``[batch, pos, C]`` (``[batch, C]`` for models without positions); 0 at padding.

    Attributes:
        concatenated: all sites on one axis.
        site_axis: where each site lies on it.
        tokens: the model's input.
        token_mask: False at padding (None: no padding).
    """

    concatenated: Float[Tensor, "batch *pos C_total"]
    site_axis: ConcatenatedAxis
    tokens: Shaped[Tensor, "batch ..."]
    token_mask: Bool[Tensor, "batch pos"] | None = None

    @cached_property
    def by_site(self) -> dict[str, Float[Tensor, "batch *pos C"]]:  # type: ignore[override]
        """Views of each site."""
        return self.site_axis.split_sites(self.concatenated)

    def masks(
        self,
        mode: Mode | str,
        *,
        threshold: float | None = None,
        delta: Delta | str = None,
        seed: int | None = None,
    ) -> Masks:
        """Masks for this prompt in one of the modes of ``tl_vpd.masking.modes``; padding runs unmasked.

        Args:
            mode: any but ``adversarial``, which has to run the model.
            threshold: of ``rounded``: importances above it give mask 1 (None: 0).
            delta: factor of Δ: a number, ``"drawn"``, or None for the mode's default.
            seed: of the random numbers of ``stochastic`` and of ``delta="drawn"`` (None: torch's global generator).

        Raises:
            ValueError: the mode is unknown or ``adversarial``, or does not take an option.
        """
        if isinstance(mode, str) and mode == "adversarial":
            raise ValueError(
                "Adversarial masks need runs of the model: use vpd.adversarial_masks(model, prompts), or "
                "attached.masked('adversarial')."
            )
        options = ModeOptions.of(mode, {"threshold": threshold, "delta": delta, "seed": seed})
        generator = None
        if options.seed is not None:
            generator = torch.Generator(self.concatenated.device).manual_seed(options.seed)
        return masks_of_mode(
            cast(Mode, mode),
            self.concatenated,
            self.site_axis,
            threshold=options.threshold,
            delta=options.delta,
            generator=generator,
        ).at_tokens(self.token_mask)

    @property
    def l0(self) -> Int[Tensor, "batch *pos"]:
        """How many subcomponents have an importance above 0 at each token."""
        return (self.concatenated > 0).sum(-1)

    def to_pandas(self, *, above: float = 0.0) -> pd.DataFrame:
        """One row per importance above a threshold: batch, pos and token (of models that have them), subcomponent, ci.

        Args:
            above: the threshold, at most 1.

        Raises:
            TypeError: it is not a number.
            ValueError: no importance can be above it.
        """
        index = (self.concatenated > number("above", above, maximum=1)).nonzero(as_tuple=True)
        *rows, subcomponents = index
        columns: dict[str, Any] = dict(zip(("batch", "pos"), (axis.tolist() for axis in rows), strict=False))
        same_shape = self.tokens.shape == self.concatenated.shape[:-1]
        if same_shape and not self.tokens.is_floating_point() and len(rows) == 2:
            columns["token"] = self.tokens[rows[0], rows[1]].tolist()
        columns["subcomponent"] = [str(self.site_axis.at(i)) for i in subcomponents.tolist()]
        columns["ci"] = self.concatenated[index].tolist()
        return pd.DataFrame(columns)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The subcomponents of the largest mean importance over real tokens, with how often they are above 0.

        Args:
            k: how many, at most.

        Raises:
            TypeError: it is not an integer.
            ValueError: it is below 1.
        """
        k = integer("k", k, minimum=1)
        real = self.concatenated.flatten(0, -2) if self.token_mask is None else self.concatenated[self.token_mask]
        mean = real.mean(0)
        best = mean.topk(min(k, mean.numel())).indices
        return pd.DataFrame(
            {
                "subcomponent": [str(self.site_axis.at(i)) for i in best.tolist()],
                "mean_ci": mean[best].tolist(),
                "density": (real[:, best] > 0).float().mean(0).tolist(),
            }
        )


@torch.no_grad()
def causal_importances(
    decomposition: DecomposedWeights, model: nn.Module, prompts: Any, *, attention_mask: Tensor | None = None
) -> CausalImportances:
    """The importances of every subcomponent at every token of the prompts, on the model's device.

    Args:
        decomposition: of this model.
        model: the target; its parameters and hooks are left unchanged.
        prompts: a string (the empty one is BOS alone, where the model prepends it), strings, or tokens ``[batch, pos]``: a
            tensor, an array or lists of integers of any type.
        attention_mask: 1 at real tokens and 0 at padding (None: the tokens tell, see ``tl_vpd.adapters.prompts``).

    Raises:
        TypeError: the prompts are neither text nor tokens.
        ValueError: there are no tokens, too many, or not this model's; or the model is not the decomposed one.
    """
    with MaskedModel(decomposition, model) as masked_model:
        tokens, token_mask, inputs = masked_model.clean_prompts(prompts, attention_mask)
    g = decomposition.importances(inputs, token_mask)
    return CausalImportances(g, decomposition.site_axis, tokens, token_mask)
