"""Telling one model's weights from another's: a norm and 16 seeded projections per site.

    p_k = r_kᵀ W s_k / ‖W‖,     r_k, s_k ~ N(0, 1)

For a matrix of another model ``p`` is a fresh draw from about N(0, 1), so agreement of all 16 within 2e-2 cannot happen by
chance, while a bfloat16 copy moves each by about 2e-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

TOLERANCE = 2e-2
PROJECTIONS = 16


class Fingerprint(BaseModel):
    """What identifies a site's weight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    norm: float
    """Frobenius norm of W."""
    projections: tuple[float, ...]
    """``r_kᵀ W s_k / ‖W‖``."""

    @classmethod
    def of(cls, W: Float[Tensor, "d_in d_out"]) -> Fingerprint:
        """The fingerprint of a weight, computed in float64 where the weight is."""
        left, right = _directions(*W.shape)
        device = torch.device("cpu") if W.device.type == "mps" else W.device  # which has no float64
        exact = W.detach().to(device=device, dtype=torch.float64)
        norm = exact.norm()
        projections = torch.einsum("ki,io,ko->k", left.to(device), exact, right.to(device)) / norm.clamp(min=1e-300)
        numbers = torch.cat([norm.reshape(1), projections]).tolist()
        return cls(norm=numbers[0], projections=tuple(numbers[1:]))

    def mismatch(self, other: Fingerprint) -> float:
        """The largest difference of a projection, or the relative difference of the norms if that is larger."""
        largest = max(abs(a - b) for a, b in zip(self.projections, other.projections, strict=True))
        return max(largest, abs(self.norm - other.norm) / max(self.norm, other.norm, 1e-300))

    def shows_change(self, W: Float[Tensor, "d_in d_out"], change: Float[Tensor, "d_in d_out"]) -> bool:
        """Whether ``W`` is this weight with a change added to it: projections, times the norm, are linear in the weight."""
        before, after, changed = (
            np.array(f.projections) * f.norm for f in (self, Fingerprint.of(W), Fingerprint.of(change))
        )
        return bool(np.linalg.norm(after - before - changed) < 0.1 * np.linalg.norm(changed))


@lru_cache(maxsize=16)
def _directions(d_in: int, d_out: int) -> tuple[Float[Tensor, "k d_in"], Float[Tensor, "k d_out"]]:
    """``r_k`` and ``s_k``: the same for all weights of a shape, of which a model has few."""
    # NumPy guarantees RandomState's stream, so that every later version recognises the files of this one.
    draw = np.random.RandomState(0)
    left, right = (torch.from_numpy(draw.standard_normal((PROJECTIONS, d))) for d in (d_in, d_out))
    return left, right


def compare(stored: Mapping[str, Fingerprint], weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> dict[str, float]:
    """Mismatch by site, for sites that differ by more than the tolerance."""
    sizes = {name: stored[name].mismatch(Fingerprint.of(W)) for name, W in weights.items()}
    return {name: size for name, size in sizes.items() if not size <= TOLERANCE}
