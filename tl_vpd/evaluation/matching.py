"""Pieces and importances compared with the truth, site by site: directions, lengths, patterns, counts, overlaps.

For a site with one subcomponent per feature, ``W_j`` what the weight does with feature j and ``P_cj`` what piece c does with it
(for a rank-one piece ``V[j, c] U[c]``), SPD (arXiv 2506.20790, section 3.1) measures

    MMCS = mean_j max_c cos(P_cj, W_j)              mean max cosine similarity: directions
    ML2R = mean_j ‖P_cj‖ / ‖W_j‖   at that c        mean L2 ratio: lengths, 1 where nothing shrank or was split
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

TOLERANCE = 0.1
"""An importance further than this from the truth's 0 or 1 counts as an error, as in SPD."""


def mmcs_and_ml2r(
    pieces: Float[Tensor, "n feature d"], true: Float[Tensor, "feature d"]
) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
    """Each feature's largest cosine over pieces, and the ratio of lengths at that piece (0 and 0 where there are no pieces).

    Args:
        pieces: what each piece does with each feature.
        true: what the weight does.
    """
    if len(pieces) == 0:
        return torch.zeros(len(true)), torch.zeros(len(true))
    # Lengths however small have a direction: only an exact 0 has none.
    cosines = torch.einsum("n f d, f d -> n f", *(F.normalize(t, dim=-1, eps=1e-30) for t in (pieces, true)))
    best, at = cosines.max(0)
    return best, pieces.norm(dim=-1).gather(0, at[None])[0] / true.norm(dim=-1)


def pattern_errors(
    g: Float[Tensor, "probe n"],
    pattern: Bool[Tensor, "probe count"],
    either: Bool[Tensor, "probe count"] | None = None,
) -> tuple[int, int]:
    """Importances further than 0.1 from the truth's under the matching of least summed difference, and the number of entries.

    A true subcomponent for which there is no piece counts as one of importance 0, and a surplus piece as one that should
    be 0 everywhere.

    Args:
        g: importances.
        pattern: the truth.
        either: entries that do not count (None: all count).
    """
    size = max(g.shape[1], pattern.shape[1])
    padded = F.pad(g, (0, size - g.shape[1]))
    true = F.pad(pattern.to(g.dtype), (0, size - pattern.shape[1]))
    counts = torch.ones_like(true) if either is None else 1 - F.pad(either.to(g.dtype), (0, size - either.shape[1]))
    costs = torch.stack([(padded - true[:, j, None]).abs().mul(counts[:, j, None]).sum(0) for j in range(size)])
    _, matched = linear_sum_assignment(costs.double().numpy())
    wrong = ((padded[:, torch.from_numpy(matched)] - true).abs() > TOLERANCE) & (counts > 0)
    return int(wrong.sum()), pattern.numel() if either is None else int((~either).sum())


def count_errors(g: Float[Tensor, "probe n"], count: int) -> int:
    """How far a site is from having exactly ``count`` pieces, whatever directions they read (0: it has).

    Of the ``count`` pieces with the largest summed importance, those that no input of the probe needs (all below 0.9), and of
    the others every importance above 0.1. SPD's authors count like this (``goodfire-ai/spd``, target solutions of dense layers):
    a piece that an input's direction is orthogonal to is not important there, by the definition of importance, so that "always"
    cannot be required of single inputs.
    """
    order = g.sum(0).argsort(descending=True)
    needed = (g[:, order[:count]] >= 1 - TOLERANCE).any(0)
    return count - int(needed.sum()) + int((g[:, order[count:]] > TOLERANCE).sum())


def overlap(latents: Bool[Tensor, "token latent"], g: Float[Tensor, "token n"]) -> Float[Tensor, "latent n"]:
    """``Σ min(t, g) / Σ max(t, g)``: 1 where importance is 1 at exactly the latent's tokens (Jaccard's index, for weights)."""
    both = latents.to(g.dtype).T @ g.clamp(0, 1)
    return both / (latents.sum(0)[:, None] + g.clamp(0, 1).sum(0)[None] - both).clamp(min=1e-12)
