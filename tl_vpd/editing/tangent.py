"""A change of a weight as changes of a few of its subcomponents, by least squares.

    ΔW = Σ_{c ∈ S} (V[:, c] ⊗ D_c + E_c ⊗ U[c]) + rest

D_c is a change of c's write direction, E_c one of its read direction. Over both, ``‖R (ΔW − …)‖²`` is least; R is the identity,
or the square root of the second moment of the site's inputs, which makes it the mean squared error of the site's output. With
P_V and P_U the projections on the span of ``R V_S`` and of the rows of ``U_S``:

    D = (R V_S)⁺ R ΔW,      E = R⁻¹ (1 − P_V) R ΔW U_S⁺,      R · rest = (1 − P_V) R ΔW (1 − P_U)

so what both kinds could explain counts as a change of write directions. S grows one subcomponent at a time, by the one that
lowers ‖R · rest‖² most. For a part T of S alone, D and E are fitted anew: from products of ΔW with the directions of S, which
are all that is stored of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SPANNED = 1e-6
"""A direction counts as spanned by others where less than this part of its length is outside their span."""


@dataclass(frozen=True, eq=False)
class Explained:
    """One site's change.

    Attributes:
        indices: S, in the order in which it grew.
        V: read directions of S.
        U: write directions of S.
        gram: ``(R V)ᵀ R V``.
        reading: ``(R V)ᵀ R ΔW``.
        writing: ``ΔW Uᵀ``.
    """

    indices: list[int]
    V: Float[Tensor, "d_in k"]
    U: Float[Tensor, "k d_out"]
    gram: Float[Tensor, "k k"]
    reading: Float[Tensor, "k d_out"]
    writing: Float[Tensor, "d_in k"]

    def changes(self, indices: Sequence[int]) -> tuple[Float[Tensor, "n d_out"], Float[Tensor, "n d_in"]]:
        """D and E, as rows, of these subcomponents without the others of S.

        Args:
            indices: a part of S, or all.
        """
        at = [self.indices.index(c) for c in indices]
        V, U = self.V[:, at], self.U[at]
        writes = torch.linalg.pinv(self.gram[at][:, at], hermitian=True) @ self.reading[at]
        unread = self.writing[:, at] - V @ (writes @ U.T)
        return writes, torch.linalg.pinv(U @ U.T, hermitian=True) @ unread.T


def explain(
    delta: Float[Tensor, "d_in d_out"],
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
    root: Float[Tensor, "d_in d_in"] | None,
    *,
    pieces: int,
    smallest: float,
) -> Explained:
    """Explains a change by a few of the subcomponents, in float64.

    Args:
        delta: ΔW.
        V: read directions.
        U: write directions.
        root: R (None: the identity).
        pieces: how many subcomponents, at most.
        smallest: S stops growing where the next one lowers ``‖R · rest‖²`` by less than this part of ``‖R ΔW‖²``.
    """
    RV, target = (V, delta) if root is None else (root @ V, root @ delta)
    total, rest, indices = float(target.square().sum()), target, list[int]()
    left, right = RV / _norms(RV, 0), U.T / _norms(U.T, 0)  # unit columns, outside the span of those in S
    while len(indices) < min(pieces, V.shape[1]):
        w, r = left.T @ rest, rest @ right  # [C, d_out], [d_in, C]
        gain = w.square().sum(1) + r.square().sum(0) - (w * right.T).sum(1).square()
        gain[indices] = -1.0
        best = int(gain.argmax())
        if float(gain[best]) < smallest * total or total == 0:
            break
        indices.append(best)
        v, u = left[:, best].clone(), right[:, best].clone()
        rest = rest - torch.outer(v, v @ rest)
        rest = rest - torch.outer(rest @ u, u)
        left, right = _outside(left, v), _outside(right, u)
    RV, V, U = RV[:, indices], V[:, indices], U[indices]
    return Explained(indices, V, U, RV.T @ RV, RV.T @ target, delta @ U.T)


def _norms(columns: Tensor, dim: int) -> Tensor:
    return columns.norm(dim=dim, keepdim=True).clamp(min=1e-300)


def _outside(columns: Tensor, unit: Tensor) -> Tensor:
    """Unit columns made orthogonal to another vector and of unit length again; 0 where they are spanned.

    Args:
        columns: of unit length, or 0.
        unit: the vector, of unit length or 0.
    """
    remaining = columns - torch.outer(unit, unit @ columns)
    norms = remaining.norm(dim=0, keepdim=True)
    return torch.where(norms > SPANNED, remaining / norms.clamp(min=1e-300), 0.0)
