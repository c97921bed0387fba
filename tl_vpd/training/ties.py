"""Tied sites: one matrix that a model uses twice, once transposed, has one set of subcomponents.

    W₂ = W₁ᵀ:      V₂ = U₁ᵀ,   U₂ = V₁ᵀ      so that V₂ U₂ = (V₁ U₁)ᵀ

The first site's V and U are trained, with the sum of both sites' gradients; the second's follow. Importances are not tied. The
authors of SPD (arXiv 2506.20790) decompose toy models of superposition in this way, in their code.

>>> from tl_vpd.site import Site
>>> components = Components([Site("embed", 5, 2), Site("unembed", 2, 5)], {"embed": 7, "unembed": 7})
>>> ties = Ties(components, [("embed", "unembed")])
>>> ties.follow(); bool((components.V["unembed"] == components.U["embed"].T).all())
True
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.components import Components


class Ties:
    """The V and U that follow others.

    Args:
        components: V and U of all sites.
        pairs: of sites; the first leads, the second follows.

    Raises:
        ValueError: the sites of a pair have different numbers of subcomponents.
    """

    def __init__(self, components: Components, pairs: Sequence[tuple[str, str]]) -> None:
        self.followers = {f"{kind}/{second}" for _, second in pairs for kind in ("V", "U")}
        """Names of the tensors that follow."""
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for first, second in pairs:
            C = [components.site_axis.counts[name] for name in (first, second)]
            if C[0] != C[1]:
                raise ValueError(f"{first} and {second} are tied and need the same C; it is {C[0]} and {C[1]}.")
            self._pairs.append((components.U[first], components.V[second]))
            self._pairs.append((components.V[first], components.U[second]))

    def free(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that do not follow others."""
        followers = {id(follower) for _, follower in self._pairs}
        return [p for p in parameters if id(p) not in followers]

    def collect(self) -> None:
        """Adds followers' gradients to those of their leaders, and removes them from followers."""
        for leader, follower in self._pairs:
            if follower.grad is not None:
                gradient = follower.grad.T
                leader.grad = gradient.contiguous() if leader.grad is None else leader.grad.add_(gradient)
                follower.grad = None

    @torch.no_grad()
    def follow(self) -> None:
        """Sets followers to their leaders, transposed."""
        for leader, follower in self._pairs:
            follower.copy_(leader.T)


def check_ties(pairs: Sequence[tuple[str, str]], weights: Mapping[str, Float[Tensor, "_ _"]]) -> None:
    """Refuses pairs of sites that are not one matrix.

    Args:
        pairs: of sites.
        weights: of the sites that are decomposed.

    Raises:
        KeyError: a site is not among those that are decomposed.
        ValueError: a site is in two pairs, or one weight is not the other's transpose.
    """
    names = [name for pair in pairs for name in pair]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"tied names {name} twice: a site is tied to one other at most.")
    for first, second in pairs:
        for name in (first, second):
            if name not in weights:
                raise KeyError(f"tied names {name}, which is not decomposed; decomposed sites: {', '.join(weights)}.")
        if weights[first].T.shape != weights[second].shape or not torch.equal(weights[first].T, weights[second]):
            raise ValueError(
                f"{first} and {second} cannot be tied: one's weight is not exactly the transpose of the other's."
            )
