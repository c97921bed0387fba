"""An edit of a model's weights in the basis of a decomposition, as data.

    W' = W + Σ_k read_k ⊗ change_k

A piece with ``read = V[:, c]`` and ``change = u_new − U[c]`` replaces the write direction of subcomponent c (VPD paper, section
on editing); any other piece is added to the weight beside the subcomponents. An edit has copies of all that it needs: it can be
stored, composed and inverted, and put on a model without its decomposition.

    >>> edit = remove(vpd, "blocks.1.mlp.W_out:12") + scale(vpd, "blocks.0.mlp.W_in:3", 0.5)     # doctest: +SKIP
    >>> print(edit)                                                                              # doctest: +SKIP
    >>> edit.save("edit.safetensors")                                                            # doctest: +SKIP
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.checks import integer, path_of
from tl_vpd.components import Fingerprint
from tl_vpd.components.fingerprint import TOLERANCE
from tl_vpd.editing.piece import Piece
from tl_vpd.editing.stored import read_edit, write_edit
from tl_vpd.forward import SiteEdit
from tl_vpd.importance import DecomposedWeights
from tl_vpd.site import Subcomponent


@dataclass(frozen=True, eq=False)
class Edit:
    """Rank-one changes of a model's weights.

    Attributes:
        pieces: the changes, at most one for each subcomponent.
        fingerprints: of all decomposed weights by site, as they are before the edit.
        processing: how the model's weights were processed when they were decomposed (``fold_ln`` and so on), as far as known.
    """

    pieces: tuple[Piece, ...]
    fingerprints: Mapping[str, Fingerprint] = field(repr=False)
    processing: Mapping[str, bool] = field(repr=False)

    @classmethod
    def of(cls, decomposition: DecomposedWeights, pieces: Iterable[Piece]) -> Edit:
        """An edit of a decomposition's target.

        Args:
            decomposition: that the pieces are from.
            pieces: in order.
        """
        return cls(
            tuple(pieces),
            dict(decomposition.fingerprints),
            dict(decomposition.record.get("target", {}).get("processing", {})),
        )

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def sites(self) -> list[str]:
        """The names of the weights that are changed."""
        return list(dict.fromkeys(piece.site for piece in self.pieces))

    @property
    def subcomponents(self) -> list[Subcomponent]:
        """Those whose write directions are changed."""
        return [Subcomponent(piece.site, piece.index) for piece in self.pieces if piece.index is not None]

    def __len__(self) -> int:
        return len(self.pieces)

    def delta(self, site: str) -> Float[Tensor, "d_in d_out"]:
        """``ΔW`` of one site, in float64 on the CPU.

        Raises:
            KeyError: the edit does not change that weight.
        """
        pieces = [piece for piece in self.pieces if piece.site == site]
        if not pieces:
            raise KeyError(f"{site!r:.80} is not changed by this edit: it changes {', '.join(self.sites)}.")
        reads = torch.stack([piece.read.double().cpu() for piece in pieces], dim=1)
        return reads @ torch.stack([piece.change.double().cpu() for piece in pieces])

    def to_pandas(self) -> pd.DataFrame:
        """One row per piece: ``subcomponent``, ``change`` (in words), ``norm`` (of ΔW), ``relative`` (to the norm of what the
        subcomponent writes, ``‖change‖ / ‖U[c]‖``; NaN for added pieces)."""
        rows = []
        for piece in self.pieces:
            before = float(piece.write.double().norm())
            relative = float(piece.change.double().norm()) / before if before else math.nan
            rows.append((piece.name, piece.about, piece.norm, relative))
        return pd.DataFrame(rows, columns=["subcomponent", "change", "norm", "relative"])

    def top(self, k: int = 10) -> pd.DataFrame:
        """The pieces of the largest norm.

        Args:
            k: how many, at most.

        Raises:
            TypeError: it is not an integer.
            ValueError: it is below 1.
        """
        return self.to_pandas().nlargest(integer("k", k, minimum=1), "norm")

    def __str__(self) -> str:
        head = f"Edit of {len(self.sites)} weight{'s' * (len(self.sites) != 1)}, rank-one changes: {len(self)}"
        width = max(len(piece.name) for piece in self.pieces)
        shown = [f"  {p.name:<{width}}  {p.about}, ‖ΔW‖ = {p.norm:.3g}" for p in self.pieces[:20]]
        more = [f"  … and {len(self) - 20} more"] if len(self) > 20 else []
        return "\n".join([head, *shown, *more])

    # -- composition -------------------------------------------------------------------------------------------------

    def __add__(self, other: Edit) -> Edit:
        """Both edits at once.

        Raises:
            ValueError: both change the write direction of one subcomponent, or they are of other weights.
        """
        if not isinstance(other, Edit):
            return NotImplemented
        both = set(self.subcomponents) & set(other.subcomponents)
        if both:
            raise ValueError(
                f"Both edits change the write direction of {min(both)}: make one edit of it, such as "
                "write_direction(vpd, subcomponent, vector)."
            )
        for site in self.fingerprints.keys() & other.fingerprints.keys():
            size = self.fingerprints[site].mismatch(other.fingerprints[site])
            if not size <= TOLERANCE:
                raise ValueError(
                    f"The edits are of different models: their weights of {site} differ by {size:.3g} (allowed {TOLERANCE})."
                )
        processing = {**self.processing, **other.processing}
        return Edit(self.pieces + other.pieces, {**self.fingerprints, **other.fingerprints}, processing)

    def inverse(self) -> Edit:
        """The edit that undoes this one on a model that has it in its weights (to rounding; ``Baked.undo`` is exact)."""
        pieces = tuple(replace(p, change=-p.change, about=f"inverse of: {p.about}") for p in self.pieces)
        return replace(self, pieces=pieces)

    def __neg__(self) -> Edit:
        return self.inverse()

    # -- on a model --------------------------------------------------------------------------------------------------

    def site_edits(self, decomposition: DecomposedWeights) -> dict[str, SiteEdit]:
        """The changes by site, for passes of an attached model.

        Args:
            decomposition: that is attached.

        Raises:
            ValueError: the edit is of another decomposition.
        """
        for piece in self.pieces:
            piece.check_decomposition(decomposition)
        by_site: dict[str, SiteEdit] = {}
        for site in self.sites:
            pieces = [piece for piece in self.pieces if piece.site == site]
            reads, writes = torch.stack([p.read for p in pieces], dim=1), torch.stack([p.change for p in pieces])
            by_site[site] = SiteEdit(reads, writes, tuple(p.index for p in pieces))
        return by_site

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one safetensors file: the tensors, what the edit is as JSON, and checksums of both.

        Args:
            path: of the file, such as ``edit.safetensors``; an edit that is there is replaced.

        Raises:
            OSError: it cannot be written; the message says what is safe.
            TypeError: ``path`` is not a path.
            ValueError: the edit has values that are NaN or infinite.
        """
        return write_edit(path_of("path", path), self.pieces, self.fingerprints, self.processing)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Edit:
        """Reads a file of ``save``.

        Args:
            path: of the file.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: ``path`` is not a path.
            ValueError: it is not an edit, or damaged; the message says what.
        """
        return cls(*read_edit(path_of("path", path)))
