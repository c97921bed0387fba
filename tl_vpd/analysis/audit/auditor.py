"""The runs of an audit: everything else at a plain reference, at random, and where an adversary puts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.analysis.audit.ablate import AblatedModel, reference_tokens
from tl_vpd.analysis.audit.config import AttackConfig, Reference
from tl_vpd.analysis.audit.edge_ablation import EdgeAblatedModel
from tl_vpd.analysis.audit.edge_set import EdgeSet, edge_set_of
from tl_vpd.analysis.audit.latent_ablation import LatentAblatedModel, latent_set_of
from tl_vpd.analysis.audit.node_set import NodeSet, node_set_of
from tl_vpd.analysis.edges import Edge, is_edge
from tl_vpd.analysis.metric import Metric, check_metric, differentiable, finite_number_of
from tl_vpd.analysis.nodes import Node, several
from tl_vpd.baselines.transcoders import Transcoders
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.target_check import check_target
from tl_vpd.masking import restarted_pgd
from tl_vpd.site import Subcomponent

ABLATED = "with nodes ablated"


@dataclass(frozen=True)
class Auditor:
    """Metrics of circuits under ablations of everything else.

    Attributes:
        circuit: the nodes or edges that are audited.
        in_circuit: True for these, on the axis of the node set (one row where no node has a position).
        whole: the metric of the model itself.
        ablated_model: runs the prompts.
        metric: of the logits.
        values: ablated values by reference and hook.
        generator: of all random draws.
        config: of the adversary.
    """

    circuit: tuple[Node, ...] | tuple[Edge, ...]
    in_circuit: Bool[Tensor, "pos total"]
    whole: float
    ablated_model: AblatedModel
    metric: Metric
    values: dict[Reference, dict[str, Tensor]]
    generator: torch.Generator
    config: AttackConfig

    @property
    def node_set(self) -> NodeSet | EdgeSet:
        """All nodes or edges that are audited."""
        return self.ablated_model.node_set

    def plain(self, in_circuit: Bool[Tensor, "pos total"], reference: Reference) -> float:
        """The metric with everything else at the reference."""
        return self.at(in_circuit, torch.zeros_like(in_circuit, dtype=torch.float32), reference)

    @torch.no_grad()
    def at(self, in_circuit: Bool[Tensor, "pos total"], sources: Tensor, reference: Reference) -> float:
        """The metric with everything else at the sources."""
        m = factors(in_circuit, sources)
        return finite_number_of(self.metric(self.ablated_model.run(m, self.values[reference])), ABLATED)

    def stochastic(self, in_circuit: Bool[Tensor, "pos total"], reference: Reference, draws: int) -> float:
        """The mean metric over uniform sources per token and node."""
        shape = (*self.ablated_model.tokens.shape, self.node_set.total)
        return sum(self.at(in_circuit, self._uniform(*shape), reference) for _ in range(draws)) / draws

    def attack(
        self, in_circuit: Bool[Tensor, "pos total"], reference: Reference, steps: int
    ) -> tuple[float, Float[Tensor, "rows total"]]:
        """The worst metric on the way of an adversary of this many steps, and its sources (one row if positions share them)."""
        sign = self.config.sign
        worst: tuple[float, Tensor] | None = None

        def loss(sources: Tensor) -> Tensor:
            nonlocal worst
            m = factors(in_circuit, sources)
            value = differentiable(self.metric(self.ablated_model.run(m, self.values[reference])))
            signed = sign * finite_number_of(value, ABLATED)
            if worst is None or signed < worst[0]:
                worst = signed, sources.detach().clone()
            return -sign * value.squeeze()

        restarted_pgd(loss, self._starts(), steps=steps, step_size=self.config.step_size)
        assert worst is not None
        return sign * worst[0], worst[1]

    def _starts(self) -> Iterator[Float[Tensor, "rows total"]]:
        """Plain ablation, then random sources."""
        n_pos = self.ablated_model.tokens.shape[1] if self.config.per_position else 1
        for start in range(self.config.restarts):
            sources = self._uniform(n_pos, self.node_set.total)
            yield sources if start else torch.zeros_like(sources)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(self.ablated_model.tokens.device)


def factors(
    in_circuit: Bool[Tensor, "#pos total"], sources: Float[Tensor, "*#batch_pos total"]
) -> Float[Tensor, "batch pos total"]:
    """1 for the circuit, the source for the rest."""
    m = torch.where(in_circuit, 1.0, sources)
    return m if m.ndim == 3 else m[None]


def random_circuit(
    node_set: NodeSet | EdgeSet, in_circuit: Bool[Tensor, "pos total"], generator: torch.Generator
) -> Bool[Tensor, "pos total"]:
    """As many nodes (edges) of each kind at as many positions, chosen at random."""
    result = torch.zeros_like(in_circuit)
    for columns in node_set.kinds().values():
        of_kind = in_circuit[:, columns]
        order = torch.randperm(of_kind.numel(), generator=generator).to(in_circuit.device)
        result[:, columns] = of_kind.flatten()[order].view_as(of_kind)
    return result


@contextmanager
def auditor(
    decomposition: Decomposition | Transcoders | None,
    model: nn.Module,
    prompts: Any,
    nodes: Sequence[str | Node | Subcomponent | Edge],
    metric: Metric,
    config: AttackConfig,
    reference_prompts: Any,
    attention_mask: Tensor | None,
) -> Iterator[Auditor]:
    """Everything that an audit needs, on a model that is put back afterwards; arguments as in ``audit_circuit``."""
    check_metric(metric)
    with torch.inference_mode(False):
        adapter = adapt(model)
        if decomposition is not None and not isinstance(decomposition, Transcoders):
            check_target(decomposition, adapter)
        tokens = adapter.tokens(prompts)
        token_mask = adapter.padding(tokens, attention_mask)
        reference, reference_mask = reference_tokens(adapter, reference_prompts, tokens, token_mask)
        circuit, in_circuit, ablated = _circuit(adapter, nodes, decomposition, config, tokens, token_mask)
        generator = torch.Generator().manual_seed(config.seed)
        with ablated as ablated_model:
            yield Auditor(
                circuit=circuit,
                in_circuit=in_circuit.to(tokens.device),
                whole=finite_number_of(metric(ablated_model.clean()), "on the model itself"),
                ablated_model=ablated_model,
                metric=metric,
                values={
                    name: ablated_model.references(name, reference, reference_mask, generator)
                    for name in config.references
                },
                generator=generator,
                config=config,
            )


def _circuit(
    adapter: Adapter,
    nodes: Sequence[str | Node | Subcomponent | Edge],
    decomposition: Decomposition | Transcoders | None,
    config: AttackConfig,
    tokens: Tensor,
    token_mask: Tensor | None,
) -> tuple[tuple[Node, ...] | tuple[Edge, ...], Bool[Tensor, "pos total"], AblatedModel]:
    """The parsed circuit, of nodes, latents or edges; where it lies; and the model in which everything else can be ablated."""
    addresses: list[Any] = [nodes] if isinstance(nodes, Edge) else several("nodes", nodes)
    are_edges, n_pos = [is_edge(address) for address in addresses], tokens.shape[1]
    if all(are_edges):
        edges, edge_set = tuple(Edge.parse(address) for address in addresses), edge_set_of(adapter, config.among)
        return edges, edge_set.contains(edges, n_pos), EdgeAblatedModel(adapter.model, edge_set, tokens, token_mask)
    if any(are_edges):
        edge, node = addresses[are_edges.index(True)], addresses[are_edges.index(False)]
        raise ValueError(f"The circuit mixes edges ({edge}) with nodes ({node}): choose one kind.")
    circuit = tuple(Node.parse(address) for address in addresses)
    if isinstance(decomposition, Transcoders):
        latents = latent_set_of(decomposition, config.among)
        latent_model = LatentAblatedModel(adapter.model, latents, tokens, token_mask, decomposition)
        return circuit, latents.contains(circuit, n_pos), latent_model
    node_set = node_set_of(adapter, circuit, decomposition, config.among)
    attached = decomposition if decomposition is not None and circuit[0].name in decomposition.sites else None
    return (
        circuit,
        node_set.contains(circuit, n_pos),
        AblatedModel(adapter.model, node_set, tokens, token_mask, attached),
    )
