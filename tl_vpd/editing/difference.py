"""What a fine-tuning changed, in the subcomponents of the model before it.

Every site's ``ΔW = W' − W`` is explained as changes of a few subcomponents and a rest (``tl_vpd.editing.tangent``). A change of
write direction ``D_c`` is one of strength, ``t_c U[c]`` with ``t_c = D_c · U[c] / ‖U[c]‖²``, and one of direction, orthogonal to
it. With data, "explained" means of the site's output on it, ``E ‖x ΔW‖²``; without, of the norm.

    >>> difference = explain_difference(vpd, model, finetuned, prompts=tokens)     # doctest: +SKIP
    >>> difference.top(5)                                                          # doctest: +SKIP
    >>> bake(difference.undo(difference.named(5)), finetuned, check_weights=False) # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch

from tl_vpd.checks import check_fields, integer
from tl_vpd.components import Fingerprint
from tl_vpd.decomposition import Decomposition
from tl_vpd.editing.edit import Edit
from tl_vpd.editing.make import chosen_subcomponents
from tl_vpd.editing.piece import Piece
from tl_vpd.editing.tangent import Explained
from tl_vpd.hooks.ablations import Subcomponents
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent


@dataclass(frozen=True)
class DifferenceConfig:
    """How a difference is explained.

    Attributes:
        pieces: subcomponents of a site, at most.
        smallest: a subcomponent must explain this part of its site's change.
        batch_size: rows of the prompts that run at once (all, where there is a loss).
        steps: points on the path along which contributions to the output are summed.

    Raises:
        TypeError: a value is of another type.
        ValueError: a number is out of its range.
    """

    pieces: int = 16
    smallest: float = 1e-3
    batch_size: int = 16
    steps: int = 4

    def __post_init__(self) -> None:
        check_fields(self, pieces=1, smallest=(1e-12, 1.0), batch_size=1, steps=1)


@dataclass(frozen=True, eq=False)
class Difference(Printed):
    """A fine-tuning in the subcomponents of the model before it.

    Attributes:
        table: one row per changed subcomponent, the largest changes first: ``subcomponent``; ``strength``, the change t of
            its strength (−1: removed); ``write`` and ``read``, the norms of the changes of its write and read direction, as
            weights; ``norm`` of all three together; ``fraction`` of the site's change that is gone without them, negative where
            they cancel others (of ``E ‖x ΔW‖²`` with data, of ``‖ΔW‖²`` without); ``effect``: its root mean square contribution
            to the site's output on the data (NaN without); ``output``: its contribution to what the fine-tuning did to the loss
            (``tl_vpd.editing.path``; NaN without data), by whose size rows are in order then, and else by ``norm``.
        sites: one row per site: ``site``, ``norm`` of ΔW, ``relative`` to that of W, ``explained`` and ``explained_norm``: the
            fractions of the change (as ``fraction``, and of the norm) that the subcomponents explain.
    """

    table: pd.DataFrame
    sites: pd.DataFrame
    _decomposition: Decomposition = field(repr=False)
    _explained: Mapping[str, Explained] = field(repr=False)
    _finetuned: Mapping[str, Fingerprint] = field(repr=False)

    def to_pandas(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` largest changes."""
        return self.table.head(integer("k", k, minimum=1))

    def named(self, k: int) -> list[Subcomponent]:
        """The ``k`` subcomponents of the largest changes."""
        return [Subcomponent.parse(name) for name in self.top(k)["subcomponent"]]

    def keep(self, subcomponents: Subcomponents) -> Edit:
        """What these subcomponents explain of the fine-tuning without the others, as an edit of the model before it.

        Args:
            subcomponents: of the table.

        Raises:
            KeyError: one is not in the table.
        """
        return Edit.of(self._decomposition, self._pieces(subcomponents, 1.0, "change of a fine-tuning"))

    def undo(self, subcomponents: Subcomponents) -> Edit:
        """The inverse of ``keep``, as an edit of the fine-tuned model.

        It can be baked into the fine-tuned model, and acts on it where it is attached with ``check_weights=False``.

        Args:
            subcomponents: of the table.

        Raises:
            KeyError: one is not in the table.
        """
        pieces = self._pieces(subcomponents, -1.0, "change of a fine-tuning undone")
        return Edit(tuple(pieces), dict(self._finetuned), {})

    def _pieces(self, subcomponents: Subcomponents, sign: float, about: str) -> list[Piece]:
        by_site: dict[str, list[int]] = {}
        for c in chosen_subcomponents(self._decomposition, subcomponents):
            if c.site not in self._explained or c.index not in self._explained[c.site].indices:
                names = ", ".join(self.table["subcomponent"][:10])
                raise KeyError(f"{c} is not among the changed subcomponents, the first of which are {names}.")
            by_site.setdefault(c.site, []).append(c.index)
        pieces = []
        for site, indices in by_site.items():
            for index, write, read in zip(indices, *self._explained[site].changes(indices), strict=True):
                V = self._decomposition.V[site][:, index].detach().clone()
                U = self._decomposition.U[site][index].detach().clone()
                pieces.append(Piece(site, index, about, V, U, sign * write.to(U)))
                if bool(read.any()):
                    of_read = f"{about}: read of {site}:{index}"
                    pieces.append(Piece(site, None, of_read, read.to(V), torch.zeros_like(U), sign * U))
        return pieces
