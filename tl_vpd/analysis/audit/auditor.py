"""The runs of an audit: everything else at a plain reference, at random, and where an adversary puts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.analysis.audit.ablate import AblatedModel, Reference
from tl_vpd.analysis.audit.node_set import NodeSet, node_set_of
from tl_vpd.analysis.nodes import Node
from tl_vpd.masking import fresh_pgd
from tl_vpd.site import Subcomponent

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition

Metric = Callable[[Tensor], Any]
"""Takes logits ``[batch, pos, vocab]``, gives one number, differentiable where an adversary is to use it."""


@dataclass
class Auditor:
    """Metrics of circuits under ablations of all else: the model, its prompts, and the circuit that is audited."""

    circuit: tuple[Node, ...]
    kept: Bool[Tensor, "pos total"]
    whole: float
    ablated: AblatedModel
    metric: Metric
    sign: float
    values: dict[Reference, dict[str, Tensor]]
    generator: torch.Generator
    per_position: bool
    step_size: float | None
    restarts: int
    draws: int

    @property
    def node_set(self) -> NodeSet:
        """All pieces."""
        return self.ablated.node_set

    def plain(self, kept: Bool[Tensor, "pos total"], against: Reference) -> float:
        """Everything else at the reference."""
        return self.at(kept, torch.zeros_like(kept, dtype=torch.float32), against)

    @torch.no_grad()
    def at(self, kept: Bool[Tensor, "pos total"], sources: Tensor, against: Reference) -> float:
        """Everything else at the sources."""
        return number(self.metric(self.ablated.run(factors(kept, sources), self.values[against])))

    def under(
        self, ablation: str, kept: Bool[Tensor, "pos total"], against: Reference, steps: int | None
    ) -> tuple[float, Tensor | None]:
        """The metric under one of the five ablations, and the adversary's sources."""
        if ablation == "stochastic":
            shape = (*self.ablated.tokens.shape, self.ablated.node_set.total)
            drawn = [self.at(kept, self._uniform(*shape), against) for _ in range(self.draws)]
            return sum(drawn) / len(drawn), None
        if ablation == "adversarial":
            assert steps is not None
            return self.attack(kept, against, steps)
        return self.plain(kept, against), None

    def attack(self, kept: Bool[Tensor, "pos total"], against: Reference, steps: int) -> tuple[float, Tensor]:
        """The worst metric that an adversary of this many steps meets, and its sources ``[pos or 1, total]``."""
        worst: list[tuple[float, Tensor]] = []

        def loss(sources: Tensor) -> Tensor:
            value = self.metric(self.ablated.run(factors(kept, sources), self.values[against]))
            if not isinstance(value, Tensor) or (torch.is_grad_enabled() and not value.requires_grad):
                raise ValueError(
                    "The metric gives nothing that can be differentiated: return a tensor computed from the logits."
                )
            worst.append((self.sign * number(value), sources.detach().clone()))
            return -self.sign * value.squeeze()

        n_pos = self.ablated.tokens.shape[1] if self.per_position else 1
        for start in range(self.restarts):
            first = self._uniform(n_pos, self.ablated.node_set.total)
            fresh_pgd(loss, torch.zeros_like(first) if start == 0 else first, steps=steps, step_size=self.step_size)
        value, sources = min(worst, key=lambda met: met[0])
        return self.sign * value, sources

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(self.ablated.tokens.device)


def factors(
    kept: Bool[Tensor, "#pos total"], sources: Float[Tensor, "*#batch_pos total"]
) -> Float[Tensor, "batch pos total"]:
    """1 for what is kept, the source for the rest."""
    m = torch.where(kept, 1.0, sources)
    return m if m.ndim == 3 else m[None]


def random_circuit(
    node_set: NodeSet, kept: Bool[Tensor, "pos total"], generator: torch.Generator
) -> Bool[Tensor, "pos total"]:
    """As many pieces of each kind of place (heads, MLPs, neurons, each kind of site) at as many positions, drawn at random."""
    out = torch.zeros_like(kept)
    groups: dict[str, list[int]] = {}
    for place, own in zip(node_set.places, node_set.slices(), strict=True):
        if place.kind != "delta":
            groups.setdefault(place.name.split(".", 2)[-1], []).extend(range(own.start, own.stop))
    for columns in groups.values():
        part = kept[:, columns]
        order = torch.randperm(part.numel(), generator=generator).to(kept.device)
        out[:, columns] = part.flatten()[order].view_as(part)
    return out


def number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"The metric gave a tensor of shape {tuple(value.shape)}; one number is needed.")
    return float(value.detach() if isinstance(value, Tensor) else value)


@contextmanager
def auditor(
    model: nn.Module,
    prompts: Any,
    nodes: Sequence[str | Node | Subcomponent],
    metric: Metric,
    decomposition: Decomposition | None,
    *,
    references: Sequence[Reference],
    reference_tokens: Any,
    among: str | Sequence[str] | None,
    attention_mask: Tensor | None,
    lower_is_better: bool,
    per_position: bool,
    step_size: float | None,
    restarts: int,
    draws: int,
    seed: int,
) -> Iterator[Auditor]:
    """Everything an audit needs, on a model that is put back afterwards; arguments as in ``audit_circuit``."""
    with torch.inference_mode(False):
        adapter = adapt(model)
        circuit = tuple(Node.parse(node) for node in nodes)
        node_set = node_set_of(adapter, circuit, decomposition, among)
        tokens = adapter.tokens(prompts)
        token_mask = adapter.padding(tokens, attention_mask)
        others, others_keep = tokens, token_mask
        if reference_tokens is not None:
            others = adapter.tokens(reference_tokens)
            others_keep = adapter.padding(others, None)
        kept = node_set.kept(circuit, tokens.shape[1]).to(tokens.device)
        generator = torch.Generator().manual_seed(seed)
        of_sites = decomposition is not None and circuit[0].name in decomposition.sites
        with AblatedModel(model, node_set, tokens, token_mask, decomposition if of_sites else None) as ablated:
            values = {
                name: ablated.references(name, others, others_keep, generator) for name in dict.fromkeys(references)
            }
            yield Auditor(
                circuit=circuit,
                kept=kept,
                whole=number(metric(ablated.clean())),
                ablated=ablated,
                metric=metric,
                sign=-1.0 if lower_is_better else 1.0,
                values=values,
                generator=generator,
                per_position=per_position,
                step_size=step_size,
                restarts=restarts,
                draws=draws,
            )
