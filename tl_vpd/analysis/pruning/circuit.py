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
from tl_vpd.analysis.pruning.attack import attack, uniform_sources, within_reach
from tl_vpd.analysis.pruning.behaviours import behaviour_of
from tl_vpd.analysis.pruning.config import PruneConfig
from tl_vpd.analysis.pruning.gradients import PromptLoss
from tl_vpd.checks import instance, integer, sequence, shown
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel
from tl_vpd.site import ConcatenatedAxis

FRESH_STEPS, FRESH_STARTS, STOCHASTIC_DRAWS = 20, 8, 64


@dataclass(frozen=True)
class PrunedCircuit:
    """The nodes that a behaviour needs on one prompt, under the masks it was pruned with.

    Attributes:
        tokens: the prompt.
        words: the text of every token.
        behaviour: what the circuit keeps.
        pos: at which position.
        importances: g of every subcomponent at every position; a node is where it is above 0.
        site_axis: where each site lies on the last axis of ``importances``.
        alive: how many nodes the prompt had before pruning.
        coefficient: λ.
        probabilities: of the behaviour: ``target`` (the model), ``importances`` (as masks, Δ off), ``stochastic`` (mean of 64
            draws), and the mean over 8 starts under ``adversarial`` (the adversary of pruning, if any), ``adversarial_fresh`` (20
            steps of 0.1 on all alive subcomponents that are left out, and on Δs; also the worst of the 8) and
            ``adversarial_everything`` (20 steps on every subcomponent at every position, alive or not, and on Δs).
        settings: how it was pruned.
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
        probabilities = ", ".join(f"{name} {p:.3f}" for name, p in self.probabilities.items())
        return f"PrunedCircuit({len(self)} of {self.alive} nodes for {self.behaviour} at {self.pos}; {probabilities})"

    @property
    def nodes(self) -> list[Node]:
        """The nodes by position and site, for graphs, audits and ablations."""
        entries = [(pos, self.site_axis.at(i)) for pos, i in (self.importances > 0).nonzero().tolist()]
        return [Node(subcomponent.site, subcomponent.index, pos) for pos, subcomponent in entries]

    def to_pandas(self) -> pd.DataFrame:
        """One row per node: ``node, site, index, pos, token, importance``."""
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
        k = integer("k", k, minimum=0)
        return self.to_pandas().sort_values("importance", ascending=False, kind="stable").head(k)


def probabilities(
    loss: PromptLoss, g: Float[Tensor, "pos C_total"], alive: Bool[Tensor, "pos C_total"], config: PruneConfig
) -> dict[str, float]:
    """The behaviour's probability under a circuit's importances, stochastic and adversarial masks; see ``PrunedCircuit``."""
    generator = torch.Generator(g.device).manual_seed(config.seed + 1)
    sites = len(loss.masked_model.names)
    many, starts = g.expand(STOCHASTIC_DRAWS, -1, -1), g.expand(FRESH_STARTS, -1, -1)
    plain = loss.probability(g[None], g.new_zeros(1, len(g), g.shape[1] + sites))
    stochastic = loss.probability(many, uniform_sources(many, sites, generator))
    attacks: list[tuple[str, int, float]] = [
        (config.reach, config.adversary_steps, config.adversary_step_size),
        ("alive_and_deltas", FRESH_STEPS, 2 / FRESH_STEPS),
        ("everything", FRESH_STEPS, 2 / FRESH_STEPS),
    ]
    worst = []
    for reach, steps, step_size in attacks:
        start = uniform_sources(starts, sites, generator)
        reachable = within_reach(reach, alive, sites)
        worst.append(attack(loss.gradient, starts, start, reachable, steps=steps, step_size=step_size))
    trained, fresh, everything = (loss.probability(starts, sources) for sources in worst)
    return {
        "importances": float(plain),
        "stochastic": float(stochastic.mean()),
        **({"adversarial": float(trained.mean())} if config.adversary_steps else {}),
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
    """Groups of nodes ablated in the model, and in the circuit.

    Args:
        decomposition: of the model's weights.
        model: the target.
        circuit: from ``prune``; its prompt is run.
        groups: nodes by name of the group; a node without a position stands for all positions.
        behaviour: what the circuit was pruned to.

    Returns:
        One row per group, the first (``nothing``) without ablation: ``group``, ``nodes`` (how many are ablated), ``model`` (the
        behaviour's probability with these ablated in the whole model, Δ on) and ``circuit`` (importances as masks, without
        them).

    Raises:
        KeyError: a node's site is not decomposed.
        IndexError: a node's subcomponent or position does not exist.
        ValueError: a node is not a subcomponent, or the model has other weights.
        TypeError: an argument is of another type.
    """
    instance("decomposition", decomposition, Decomposition)
    instance("circuit", circuit, PrunedCircuit)
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups is a {type(groups).__name__}: give nodes by name of the group.")
    ablated = {
        name: _ablated(decomposition, circuit, f"groups[{shown(name)}]", nodes) for name, nodes in groups.items()
    }
    rows = torch.stack([torch.zeros_like(circuit.importances, dtype=torch.bool), *ablated.values()])
    with torch.inference_mode(False), MaskedModel(decomposition, model) as masked_model:
        tokens = masked_model.adapter.tokens(circuit.tokens)
        logits, _ = masked_model.clean(tokens)
        loss = PromptLoss(masked_model, tokens, behaviour_of(masked_model.adapter, logits[0], behaviour, circuit.pos))
        columns = {}
        for name, g, delta in (
            ("model", torch.ones_like(circuit.importances), 1.0),
            ("circuit", circuit.importances, 0.0),
        ):
            sources = torch.zeros(*rows.shape[:2], g.shape[1] + len(masked_model.names)).to(g)
            sources[..., g.shape[1] :] = delta
            columns[name] = loss.probability(g.masked_fill(rows, 0), sources).tolist()
    counts = [int(row.sum()) for row in rows]
    return pd.DataFrame({"group": ["nothing", *groups], "nodes": counts, **columns})


def _ablated(
    decomposition: Decomposition, circuit: PrunedCircuit, group: str, nodes: Sequence[str | Node]
) -> Bool[Tensor, "pos C_total"]:
    """True for the subcomponents and positions of the nodes."""
    result = torch.zeros_like(circuit.importances, dtype=torch.bool)
    for address in [nodes] if isinstance(nodes, str | Node) else sequence(group, nodes):
        node = Node.parse(address)
        subcomponent = decomposition.subcomponent(node.subcomponent)
        if node.pos is not None and node.pos >= len(result):
            raise IndexError(f"{node} is outside the {len(result)} positions of the prompt.")
        positions = slice(None) if node.pos is None else node.pos
        result[positions, decomposition.site_axis.slices[subcomponent.site].start + subcomponent.index] = True
    return result
