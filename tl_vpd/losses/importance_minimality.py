"""Importance minimality: few subcomponents should be important at each token.

    L_importance = (1/N) Σ_tokens Σ_c φ(g_c) = Σ_c s_c / N                  s_c = Σ_tokens φ(g_c),  φ: ``penalty``

Source: VPD paper, section "Optimizing for minimality". N counts the real tokens of the whole batch, over all processes.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def importance_minimality(s: Float[Tensor, " C_total"], n: int) -> Float[Tensor, ""]:
    """Mean over the batch's n real tokens of the summed penalty s of all subcomponents; 0 without real tokens."""
    return s.sum() / max(n, 1)
