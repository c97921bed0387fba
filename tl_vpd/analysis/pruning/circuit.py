"""A pruned circuit: its nodes, how likely it keeps the behaviour, and what ablating nodes does to it and to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.analysis.nodes import Node
from tl_vpd.analysis.pruning.attack import attack, draw
from tl_vpd.analysis.pruning.behaviours import Behaviour, behaviour_of
from tl_vpd.analysis.pruning.config import PruneConfig
from tl_vpd.analysis.pruning.masked import PromptModel
from tl_vpd.analysis.pruning.recorded import running
from tl_vpd.decomposition import Decomposition
from tl_vpd.site import ConcatenatedAxis, Subcomponent

FRESH_STEPS, FRESH_STARTS, DRAWS = 20, 8, 64


@dataclass(frozen=True)
class PrunedCircuit:
    """The nodes a behaviour needs on one prompt, up to the masks it was pruned under.

    Attributes:
        tokens, words: the prompt. behaviour, pos: what is kept, and where.
        importances: g of every subcomponent at every position; a node is where it is above 0. packing: their order.
        alive: how many nodes the prompt had before. coefficient: λ. settings: the rest of how it was pruned.
        probabilities: of the behaviour: ``target`` (the model), ``importances`` (as masks, Δ off), ``stochastic`` (mean of 64
            draws), and the mean over 8 starts under ``adversarial`` (the adversary of pruning), ``adversarial_fresh`` (20 steps
            of 0.1 on all that is important and left out, and on Δs; also the worst of the 8) and ``adversarial_everything`` (20
            steps on all there is, important or not).
    """

    tokens: Int[Tensor, " pos"]
    words: tuple[str, ...]
    behaviour: str
    pos: int
    importances: Float[Tensor, "pos C_total"]
    site_axis: ConcatenatedAxis
    alive: int
    coefficient: float
    probabilities: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int((self.importances > 0).sum())

    def __repr__(self) -> str:
        kept = ", ".join(f"{name} {p:.3f}" for name, p in self.probabilities.items())
        return f"PrunedCircuit({len(self)} of {self.alive} nodes for {self.behaviour} at {self.pos}; {kept})"

    @property
    def nodes(self) -> list[Node]:
        """The nodes by position and site, for graphs, audits and ablations."""
        at = [(pos, self.site_axis.at(i)) for pos, i in (self.importances > 0).nonzero().tolist()]
        return [Node(c.site, c.index, pos) for pos, c in at]

    def to_pandas(self) -> pd.DataFrame:
        """A row a node: ``node, site, index, pos, token, importance``."""
        nodes = self.nodes
        return pd.DataFrame(
            {
                "node": [str(node) for node in nodes],
                "site": [node.name for node in nodes],
                "index": [node.index for node in nodes],
                "pos": [node.pos for node in nodes],
                "token": [self.words[node.pos or 0] for node in nodes],
                "importance": self.importances[self.importances > 0].tolist(),
            }
        )

    def top(self, k: int = 20) -> pd.DataFrame:
        """The k nodes of largest importance."""
        return self.to_pandas().sort_values("importance", ascending=False, kind="stable").head(k)


@torch.no_grad()
def probabilities(
    masked: PromptModel,
    tokens: Tensor,
    g: Float[Tensor, "pos C_total"],
    alive: Bool[Tensor, "pos C_total"],
    behaviour: Behaviour,
    config: PruneConfig,
) -> dict[str, float]:
    """The behaviour's probability under importances, stochastic and adversarial masks; see ``PrunedCircuit``."""
    generator = torch.Generator(g.device).manual_seed(config.seed + 1)
    sites = len(masked.names)

    def score(rows: Tensor, r: Tensor, delta: Tensor) -> Tensor:
        logits, _ = masked.logits(tokens, rows + (1 - rows) * r, delta, behaviour.pos)
        return behaviour.probability(logits)

    one, many, some = g[None], g.expand(DRAWS, -1, -1), g.expand(FRESH_STARTS, -1, -1)
    gradients = running(masked, tokens, behaviour)
    plain = score(one, torch.zeros_like(one), one.new_zeros(1, len(g), sites))
    stochastic = score(many, *draw(many, sites, generator))
    attacks: list[tuple[str, int, float]] = [
        (config.reach, config.adversary_steps, config.adversary_step_size),
        ("alive_and_deltas", FRESH_STEPS, 2 / FRESH_STEPS),
        ("everything", FRESH_STEPS, 2 / FRESH_STEPS),
    ]
    found = [
        attack(gradients, some, draw(some, sites, generator), steps=n, step_size=size, reach=reach, alive=alive)
        for reach, n, size in attacks
    ]
    own, fresh, everything = (score(some, *sources) for sources in found)
    return {
        "importances": float(plain),
        "stochastic": float(stochastic.mean()),
        "adversarial": float(own.mean()),
        "adversarial_fresh": float(fresh.mean()),
        "adversarial_fresh_worst": float(fresh.min()),
        "adversarial_everything": float(everything.mean()),
    }


@torch.no_grad()
def ablate_nodes(
    decomposition: Decomposition,
    model: nn.Module,
    circuit: PrunedCircuit,
    groups: Mapping[str, Sequence[str | Node]],
    behaviour: Any,
) -> pd.DataFrame:
    """Groups of nodes taken out of the model, and out of the circuit.

    Args:
        groups: nodes by name of the group; a node without a position stands for all of them.
        behaviour: what the circuit was pruned to.

    Returns:
        A row a group, the first (``nothing``) without ablation: ``group``, ``nodes`` (how many were taken out), ``model`` (the
        behaviour's probability with these taken out of the whole model, Δ on) and ``circuit`` (importances as masks, without
        them).

    Raises:
        KeyError, IndexError, ValueError: a node is no subcomponent of this decomposition, or its position is outside the prompt.
    """
    site_axis = decomposition.site_axis
    wheres = {name: _where(decomposition, circuit, nodes) for name, nodes in groups.items()}
    rows = [torch.zeros_like(circuit.importances, dtype=torch.bool), *wheres.values()]
    with PromptModel(decomposition, model) as masked:
        tokens = masked.adapter.tokens(circuit.tokens)
        logits, _ = masked.clean(tokens)
        chosen = behaviour_of(masked.adapter, logits[0], behaviour, circuit.pos)
        out = torch.stack(rows)
        ones = torch.ones_like(circuit.importances).expand(len(rows), -1, -1)
        g = circuit.importances.expand(len(rows), -1, -1)
        deltas = [g.new_full((*g.shape[:2], len(site_axis.names)), value) for value in (1.0, 0.0)]
        found = [
            chosen.probability(masked.logits(tokens, own.masked_fill(out, 0), delta, chosen.pos)[0]).tolist()
            for own, delta in zip((ones, g), deltas, strict=True)
        ]
    names = ["nothing", *groups]
    counts = [int(own.sum()) for own in rows]
    return pd.DataFrame({"group": names, "nodes": counts, "model": found[0], "circuit": found[1]})


def _where(
    decomposition: Decomposition, circuit: PrunedCircuit, nodes: Sequence[str | Node]
) -> Bool[Tensor, "pos C_total"]:
    found = torch.zeros_like(circuit.importances, dtype=torch.bool)
    for own in nodes:
        node = Node.parse(own)
        part: Subcomponent = decomposition.subcomponent(node.subcomponent)
        if node.pos is not None and node.pos >= len(found):
            raise IndexError(f"{node} is outside the {len(found)} positions of the prompt.")
        rows = slice(None) if node.pos is None else node.pos
        found[rows, decomposition.site_axis.slices[part.site].start + part.index] = True
    return found
