"""Subset routing: which sites are masked at a token.

*Uniform-k* (VPD paper, section on losses): for each token draw ``k`` uniform in ``1..L`` and mask ``k`` random sites; the others
run at ``x @ W``. So every subset of sites must be replaceable, and not only all of them at once.

>>> routing = Routing(["a", "b"], torch.tensor([[[True, False, True], [False, False, True]]]))
>>> routing.tokens["a"].tolist(), routing.counts.tolist(), routing.counts_of(["b"])
([0, 2], [[2, 1]], [1])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Routing(Mapping[str, Tensor]):
    """By site, at which tokens of some rows the masked path is computed, ``[rows, pos]``.

    How many these are, by row and site, is known on the CPU: with that, no pass waits for the device to count them. Without
    ``counts`` they are counted when they are first asked for.
    """

    def __init__(
        self, names: Sequence[str], routed: Bool[Tensor, "rows site pos"], counts: np.ndarray | None = None
    ) -> None:
        self.names, self.routed = tuple(names), routed
        self._sums = routed.sum(-1) if counts is None else None
        self._counts = counts

    def __getitem__(self, site: str) -> Bool[Tensor, "rows pos"]:
        return self.routed[:, self.names.index(site)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def counts(self) -> Int[np.ndarray, "rows site"]:
        """By row and site, how many tokens are routed; waits for the device, unless ``count`` has."""
        if self._counts is None:
            count([self])
        assert self._counts is not None
        return self._counts

    def counts_of(self, sites: Sequence[str], rows: slice = slice(None)) -> list[int]:
        """How many tokens of rows are routed at each of these sites."""
        counts: list[int] = self.counts[rows].sum(0).tolist()
        return [counts[self.names.index(site)] for site in sites]

    @cached_property
    def tokens(self) -> dict[str, Int[Tensor, " routed"]]:
        """By site, the numbers of the routed tokens, the rows one after the other."""
        flat = self.routed.transpose(0, 1).reshape(len(self.names), -1)
        counts = self.counts_of(self.names)
        total, where = sum(counts), flat.flatten()
        number = torch.arange(flat.shape[1], device=flat.device).expand_as(flat).flatten()
        slot = torch.where(where, where.cumsum(0) - 1, total)
        numbers = number.new_empty(total + 1).scatter_(0, slot, number)  # what is not routed goes to the last place
        return dict(zip(self.names, numbers[:total].split(counts), strict=True))

    def rows(self, rows: slice) -> Routing:
        """The same for some rows."""
        return Routing(self.names, self.routed[rows], self.counts[rows])


def count(routings: Sequence[Routing], others: Sequence[Tensor] = ()) -> list[list[float]]:
    """Waits for the device once: routed tokens are counted from then on. Gives the ``others``, one axis each, as numbers."""
    unread = [routing for routing in routings if routing._counts is None]
    sums = [routing._sums.flatten() for routing in unread if routing._sums is not None]
    if not sums and not others:
        return []
    everything = torch.cat([tensor.double() for tensor in (*sums, *others)]).cpu()
    pieces = everything.split([len(tensor) for tensor in (*sums, *others)])
    for routing, sums_of in zip(unread, pieces, strict=False):
        routing._counts = sums_of.long().numpy().reshape(routing.routed.shape[:2])
    return [piece.tolist() for piece in pieces[len(sums) :]]


def joined(attacked: Routing | None, stochastic: Routing | None, n_attacked: int, n_stochastic: int) -> Routing | None:
    """One routing for attacked rows followed by rows with stochastic masks (None: everywhere)."""
    either = stochastic if attacked is None else attacked
    if either is None:
        return None
    _, sites, pos = either.routed.shape
    both = []
    for routing, n in ((attacked, n_attacked), (stochastic, n_stochastic)):
        everywhere = either.routed.new_ones(n, sites, pos), np.full((n, sites), pos)
        both.append(everywhere if routing is None else (routing.routed, routing.counts))
    routed, counts = zip(*both, strict=True)
    return Routing(either.names, torch.cat(routed), np.concatenate(counts))


def uniform_k(n: int, shape: tuple[int, ...], *, generator: torch.Generator) -> Bool[Tensor, "n *batch"]:
    """A uniform-k routing of n sites for tokens of ``shape`` (batch, pos), on the generator's device."""
    device = generator.device
    k = torch.randint(1, n + 1, shape, generator=generator, device=device)
    ranks = torch.rand(n, *shape, generator=generator, device=device).argsort(dim=0).argsort(dim=0)
    return ranks < k


def uniform_k_share(n: int) -> float:
    """The share of tokens at which uniform-k is expected to mask one of n sites."""
    return (n + 1) / (2 * n)
