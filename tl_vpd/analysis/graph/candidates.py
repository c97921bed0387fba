"""Which nodes a prompt's graph has, and the blocks of targets that they make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_vpd.analysis.graph.direct import DirectModel, shared_inputs
from tl_vpd.analysis.graph.rows import Block
from tl_vpd.analysis.graph.targets import LogitTarget


class Candidates:
    """The nodes of a graph in order: embeddings, subcomponents by site and position, logits.

    Attributes:
        pos, index: by site, each node's position and subcomponent. first: by site, the number of its first node.
        activation, importance: of all nodes.
        chosen: the logits. n_embeddings: how many embeddings there are.
    """

    def __init__(
        self,
        direct: DirectModel,
        tokens: Int[Tensor, "1 pos"],
        inputs: dict[str, Tensor],
        g: Float[Tensor, "pos C_total"],
        chosen: Sequence[LogitTarget],
        logits: Float[Tensor, "pos vocab"],
        threshold: float | None,
    ) -> None:
        self.direct, self.chosen, self.n_embeddings = direct, list(chosen), tokens.shape[1]
        site_axis = direct.weights.site_axis
        self.pos: dict[str, Tensor] = {}
        self.index: dict[str, Tensor] = {}
        self.first: dict[str, int] = {}
        activations, own_g = [], []
        total = self.n_embeddings
        for name in direct.names:
            of_site = g[:, site_axis.slices[name]]
            taken = torch.ones_like(of_site, dtype=torch.bool) if threshold is None else of_site > threshold
            self.pos[name], self.index[name] = taken.nonzero(as_tuple=True)
            acts = inputs[name][0] @ direct.weights.V[name].detach()
            activations.append(acts[taken])
            own_g.append(of_site[taken])
            self.first[name] = total
            total += len(self.pos[name])
        values = [logits[t.pos] @ t.direction(logits) for t in self.chosen]
        ones = logits.new_ones(self.n_embeddings)
        self.activation = torch.cat([ones, *activations, torch.stack(values).to(ones)])
        self.importance = torch.cat([ones, *own_g, ones.new_ones(len(values))])

    def blocks(self, inputs: dict[str, Tensor]) -> list[Block]:
        """All targets that are subcomponents, by input and position."""
        found = []
        for family in shared_inputs(self.direct.names, inputs):
            for pos in range(self.n_embeddings):
                nodes, reads = [], []
                for name in family:
                    here = (self.pos[name] == pos).nonzero().flatten()
                    nodes.append(here + self.first[name])
                    reads.append(self.direct.weights.V[name].detach().T[self.index[name][here]])
                ids = torch.cat(nodes)
                if len(ids):
                    found.append(Block.of(family[0], pos, ids, torch.cat(reads)))
        return found
