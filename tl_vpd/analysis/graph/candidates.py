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
    """The nodes of a graph in order: embeddings, subcomponents by site and position where importance exceeds ``threshold`` (None:
    everywhere), logits.

    Attributes:
        pos: by site, each node's position.
        index: by site, each node's subcomponent.
        first: by site, the number of its first node.
        activation: of all nodes.
        importance: of all nodes.
        logits: the logits that are explained.
        n_embeddings: how many embeddings there are.
    """

    def __init__(
        self,
        direct: DirectModel,
        tokens: Int[Tensor, "1 pos"],
        inputs: dict[str, Tensor],
        g: Float[Tensor, "pos C_total"],
        logit_nodes: Sequence[LogitTarget],
        logits: Float[Tensor, "pos vocab"],
        threshold: float | None,
    ) -> None:
        self.direct, self.logits, self.n_embeddings = direct, list(logit_nodes), tokens.shape[1]
        self.pos: dict[str, Tensor] = {}
        self.index: dict[str, Tensor] = {}
        self.first: dict[str, int] = {}
        activations, importances = [], []
        total = self.n_embeddings
        for name, site_g in direct.weights.site_axis.split_sites(g).items():
            is_node = torch.ones_like(site_g, dtype=torch.bool) if threshold is None else site_g > threshold
            self.pos[name], self.index[name] = is_node.nonzero(as_tuple=True)
            acts = inputs[name][0] @ direct.weights.V[name].detach()
            activations.append(acts[is_node])
            importances.append(site_g[is_node])
            self.first[name] = total
            total += len(self.pos[name])
        values = [logits[t.pos] @ t.direction(logits) for t in self.logits]
        ones = logits.new_ones(self.n_embeddings)
        self.activation = torch.cat([ones, *activations, torch.stack(values).to(ones)])
        self.importance = torch.cat([ones, *importances, ones.new_ones(len(values))])

    def blocks(self, inputs: dict[str, Tensor]) -> list[Block]:
        """All targets that are subcomponents, by input and position."""
        blocks = []
        for family in shared_inputs(self.direct.names, inputs):
            for pos in range(self.n_embeddings):
                nodes, reads = [], []
                for name in family:
                    at_pos = (self.pos[name] == pos).nonzero().flatten()
                    nodes.append(at_pos + self.first[name])
                    reads.append(self.direct.weights.V[name].detach().T[self.index[name][at_pos]])
                ids = torch.cat(nodes)
                if len(ids):
                    blocks.append(Block.of(family[0], pos, ids, torch.cat(reads)))
        return blocks
