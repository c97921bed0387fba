"""Checks of factors: of masks, of Δ and of ablations.

>>> factor_of("amount", 0.5)
0.5
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_vpd.checks import number

LARGEST_FACTOR = 65504.0
"""The largest factor of a mask, of Δ or of an ablation: half precision has no larger number."""


def factor_of(name: str, value: Any) -> float:
    """A factor that every dtype of a model has; raises TypeError or ValueError for anything else."""
    return number(name, value, minimum=-LARGEST_FACTOR, maximum=LARGEST_FACTOR)


def check_axes(what: str, tensor: Tensor, shape: Sequence[int], *, shared: int) -> None:
    """Raises ValueError unless a mask or values have the last ``shared`` axes of this pass's ``shape``, or all of them with 1
    where they are shared.
    """
    shape = tuple(shape)
    if tensor.ndim not in (shared, len(shape)):
        full = ", ".join(["batch", "pos"][: len(shape) - shared] + ["C"] * shared)
        alone = "[C]" if shared else "a number"
        raise ValueError(
            f"{what} is {tuple(tensor.shape)}, which leaves open what its axes are: give {alone} for all tokens, or [{full}] "
            f"with 1 where it is shared, in this pass {shape}: unsqueeze(1) makes it one per row, unsqueeze(0) one per position."
        )
    if any(n not in (1, m) for n, m in zip(reversed(tensor.shape), reversed(shape), strict=False)):
        raise ValueError(
            f"{what} is {tuple(tensor.shape)}, this forward pass needs {shape}: masks and values belong to the prompt they were "
            "made for (generation with a KV cache sees one position at a time). Give a function (site, acts) -> mask where the "
            "length changes."
        )


def check_all(factors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for factors that are NaN, infinite or too large for half precision, TypeError for those that
    ``torch.func.vmap`` runs over; keys are what they are, for messages. Waits for the device once.
    """
    if not factors:
        return
    for what, factor in factors.items():
        if torch._C._functorch.is_batchedtensor(factor):
            raise TypeError(
                f"{what} is a tensor inside torch.func.vmap: leave vmap out, and give a factor per row as [batch, pos, C]."
            )
    device = next(iter(factors.values())).device
    fits = [(factor.detach().abs() <= LARGEST_FACTOR).all().to(device) for factor in factors.values()]  # NaN does not
    if bool(torch.stack(fits).all()):
        return
    what, factor = next((what, f) for (what, f), fit in zip(factors.items(), fits, strict=True) if not bool(fit))
    wrong = int((~(factor.detach().abs() <= LARGEST_FACTOR)).sum())
    raise ValueError(
        f"{what} has {wrong} of {factor.numel()} factors that are NaN, infinite or beyond {LARGEST_FACTOR:g}: give finite "
        "factors."
    )
