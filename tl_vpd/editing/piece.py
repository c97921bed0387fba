"""One rank-one change of a weight."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from tl_vpd.importance import DecomposedWeights
from tl_vpd.printing import Printed

SAME_DIRECTION = 0.02
"""The largest relative distance of a subcomponent's direction from an edit's copy of it: a bfloat16 copy is within 0.004."""


@dataclass(frozen=True, eq=False)
class Piece(Printed):
    """A rank-one change of one weight, ``read ⊗ change``.

    Attributes:
        site: the name of the weight.
        index: the subcomponent whose write direction it changes (None: a piece beside the subcomponents).
        about: what it does, in a few words.
        read: the read direction; of a subcomponent ``V[:, c]``.
        write: the write direction before the edit; of a subcomponent ``U[c]``, of another piece 0.
        change: what is added to it.
    """

    site: str
    index: int | None
    about: str
    read: Float[Tensor, " d_in"] = field(repr=False)
    write: Float[Tensor, " d_out"] = field(repr=False)
    change: Float[Tensor, " d_out"] = field(repr=False)

    @property
    def name(self) -> str:
        """``site:index`` of a subcomponent, ``site:+`` of another piece."""
        return f"{self.site}:{'+' if self.index is None else self.index}"

    @property
    def norm(self) -> float:
        """The Frobenius norm of the change of the weight, ``‖read‖ ‖change‖``."""
        return float(self.read.double().norm() * self.change.double().norm())

    def check_decomposition(self, decomposition: DecomposedWeights) -> None:
        """Compares the copies of directions with a decomposition's.

        Raises:
            ValueError: it has no such weight or subcomponent, or other directions.
        """
        of_another = "This edit is of another decomposition:"
        site = decomposition.sites.get(self.site)
        if site is None:
            raise ValueError(f"{of_another} it changes {self.site}, which is not decomposed here.")
        if (len(self.read), len(self.change)) != (site.d_in, site.d_out):
            raise ValueError(
                f"{of_another} {self.site} is {len(self.read)}x{len(self.change)} in it and {site.d_in}x{site.d_out} here."
            )
        if self.index is None:
            return
        if self.index >= decomposition.counts[self.site]:
            raise ValueError(
                f"{of_another} it changes {self.name}, and {self.site} has {decomposition.counts[self.site]} subcomponents here."
            )
        V, U = decomposition.V[self.site][:, self.index], decomposition.U[self.site][self.index]
        for what, copy, direction in (("read", self.read, V), ("write", self.write, U)):
            a, b = copy.double().cpu(), direction.detach().double().cpu()
            distance = float((a - b).norm() / max(float(a.norm()), 1e-300))
            if not distance <= SAME_DIRECTION:
                raise ValueError(
                    f"{of_another} the {what} direction of {self.name} differs by {distance:.3g} of its norm (allowed "
                    f"{SAME_DIRECTION})."
                )
