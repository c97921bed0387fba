"""The same edit where it should not work: at a random other subcomponent, and along a singular direction of the weight.

*random*: each edited subcomponent's change is made to another one of the same site that is important somewhere on the data: where
one is scaled (or removed), the other is scaled by the same factor; any other new write direction is put in the place of the
other's. *singular*: the singular direction ``σ u vᵀ`` of the weight with the norm nearest to ``‖V[:, c]‖ ‖U[c]‖`` is changed in
its place, and the change is scaled to the norm of the edit's. Added pieces are read along a random direction of equal norm in the
first, along ``u`` in the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.editing.edit import Edit
from tl_vpd.editing.piece import Piece
from tl_vpd.importance import DecomposedWeights


def random_control(
    edit: Edit, decomposition: DecomposedWeights, alive: Bool[Tensor, " C_total"], generator: torch.Generator
) -> Edit | None:
    """The edit at random other subcomponents that are alive (None: a site has too few).

    Args:
        edit: that is measured.
        decomposition: that it is of.
        alive: which subcomponents are important somewhere on the data.
        generator: of the choice.
    """
    free = {site: [int(i) for i in alive[decomposition.site_axis.slices[site]].nonzero()[:, 0]] for site in edit.sites}
    for c in edit.subcomponents:
        free[c.site] = [i for i in free[c.site] if i != c.index]
    pieces: list[Piece] = []
    for piece in edit.pieces:
        if piece.index is None:
            direction = torch.randn(len(piece.read), generator=generator).to(piece.read)
            pieces.append(replace(piece, read=direction / direction.norm() * piece.read.norm()))
            continue
        candidates = free[piece.site]
        if not candidates:
            return None
        index = candidates.pop(int(torch.randint(len(candidates), (1,), generator=generator)))
        V = decomposition.V[piece.site][:, index].detach().to(piece.read)
        U = decomposition.U[piece.site][index].detach().to(piece.write)
        pieces.append(replace(piece, index=index, read=V, write=U, change=_same_change(piece, U)))
    return replace(edit, pieces=tuple(pieces))


def singular_control(edit: Edit, weights: Mapping[str, Float[Tensor, "_ _"]]) -> Edit:
    """The edit at singular directions of the weights.

    Args:
        edit: that is measured.
        weights: of the model, by site.
    """
    pieces: list[Piece] = []
    for site in edit.sites:
        u, sigma, vh = torch.linalg.svd(weights[site].detach().double().cpu(), full_matrices=False)
        free = list(range(len(sigma)))
        for piece in (p for p in edit.pieces if p.site == site):
            if not free:
                break
            size = (
                piece.norm if piece.index is None else float(piece.read.double().norm() * piece.write.double().norm())
            )
            i = min(free, key=lambda k: abs(float(sigma[k]) - size))
            free.remove(i)
            write = sigma[i] * vh[i]
            change = piece.change.double().cpu() if piece.index is None else _same_change(piece, write)
            change = change * (piece.norm / max(float(change.norm()), 1e-300))
            read, write, change = (t.to(piece.read) for t in (u[:, i], write, change))
            pieces.append(replace(piece, index=None, read=read, write=0 * write, change=change))
    return replace(edit, pieces=tuple(pieces))


def _same_change(piece: Piece, write: Float[Tensor, " d_out"]) -> Float[Tensor, " d_out"]:
    """What the piece does, done to another write direction."""
    U, change = piece.write.double(), piece.change.double()
    factor = float((U @ change) / (U @ U).clamp(min=1e-300))
    if bool((change - factor * U).norm() <= 1e-4 * change.norm()):  # removed or scaled
        return factor * write
    return (piece.write + piece.change).to(write) - write
