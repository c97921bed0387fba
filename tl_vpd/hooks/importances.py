"""Causal importances of prompts, as a result to look at and to make masks from.

>>> ci = vpd.causal_importances(model, "def f(x):")     # doctest: +SKIP
>>> ci["blocks.1.mlp.W_in"].shape                       # doctest: +SKIP
torch.Size([1, 9, 384])
>>> ci.top(5)                                           # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.importance import lower_leaky
from tl_vpd.masking import Masks
from tl_vpd.masking.modes import Delta, Mode, check_mode, masks_of_mode
from tl_vpd.site import ConcatenatedAxis, nearest


@dataclass(frozen=True)
class CausalImportances(Mapping[str, Tensor]):
    """Importances in [0, 1] by site, each ``[batch, pos, C]`` (``[batch, C]`` for models without positions); 0 at padding.

    ``concatenated`` holds all sites on one axis, ``token_mask`` is False at padding (None: no padding), ``tokens`` is the model's input.
    """

    concatenated: Float[Tensor, "batch *pos C_total"]
    site_axis: ConcatenatedAxis
    tokens: Shaped[Tensor, "batch ..."]
    token_mask: Bool[Tensor, "batch pos"] | None = None

    def __getitem__(self, site: str) -> Float[Tensor, "batch *pos C"]:
        if site not in self.site_axis.slices:
            raise KeyError(f"{site!r} is not a decomposed site{nearest(site, self.site_axis.names)}.")
        return self.concatenated[..., self.site_axis.slices[site]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.site_axis.names)

    def __len__(self) -> int:
        return len(self.site_axis.names)

    def masks(
        self, mode: Mode | str, *, threshold: float = 0.0, delta: Delta | str = None, seed: int | None = None
    ) -> Masks:
        """Masks for this prompt in one of the modes of ``tl_vpd.masking.modes`` (``seed``: None draws on torch's state).

        Raises:
            ValueError: the mode is unknown, or is ``adversarial``, which has to run the model.
        """
        check_mode(mode, delta)
        if mode == "adversarial":
            raise ValueError("Adversarial masks are found by running the model: use attached.masked('adversarial').")
        generator = None if seed is None else torch.Generator(self.concatenated.device).manual_seed(seed)
        chosen, of_delta = cast(Mode, mode), cast(Delta, delta)
        return masks_of_mode(
            chosen, self.concatenated, self.site_axis, threshold=threshold, delta=of_delta, generator=generator
        )

    @property
    def l0(self) -> Int[Tensor, "batch *pos"]:
        """How many subcomponents have an importance above 0 at each token."""
        return (self.concatenated > 0).sum(-1)

    def to_pandas(self, *, above: float = 0.0) -> pd.DataFrame:
        """One row for every importance above a threshold: batch, pos and token (of models that have them), subcomponent, ci."""
        *where, concatenated = (self.concatenated > above).nonzero(as_tuple=True)
        columns: dict[str, Any] = dict(zip(("batch", "pos"), (w.tolist() for w in where), strict=False))
        if (
            self.tokens.shape == self.concatenated.shape[:-1]
            and not self.tokens.is_floating_point()
            and len(where) == 2
        ):
            columns["token"] = self.tokens[where[0], where[1]].tolist()
        columns["subcomponent"] = [str(self.site_axis.at(i)) for i in concatenated.tolist()]
        index = (*where, concatenated)
        columns["ci"] = self.concatenated[index].tolist()
        return pd.DataFrame(columns)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` subcomponents of the largest mean importance over real tokens, with how often they are above 0."""
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
        prompts: a string, strings, or tokens ``[batch, pos]``.
        attention_mask: 0 at padding (None: found as TransformerLens finds it).

    Raises:
        ValueError: the prompts are empty, too long, or not this model's tokens.
    """
    with MaskedModel(decomposition, model) as masked_model:
        tokens, token_mask, inputs = masked_model.clean_prompts(prompts, attention_mask)
    g = lower_leaky(decomposition.pre_sigmoid(inputs, token_mask))
    return CausalImportances(zero_padding(g, token_mask), decomposition.site_axis, tokens, token_mask)


def zero_padding(
    g: Float[Tensor, "batch *pos C_total"], token_mask: Bool[Tensor, "batch pos"] | None
) -> Float[Tensor, "batch *pos C_total"]:
    """Importances with 0 at padding."""
    return g if token_mask is None else g * token_mask[..., None]
