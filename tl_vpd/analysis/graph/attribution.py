"""The attribution graph of a prompt.

A node is a subcomponent at a position with importance g above a threshold, the embedding at a position, or a logit. Edge

    c' → c  =  (∂a_c / ∂a_c')* · a_c' · g_c'

where * means that gradients are stopped at every other subcomponent's inner activation (VPD paper, section on attribution
graphs; ``direct`` says how). An embedding's edge sums gradient × embedding over dimensions. Δ and biases are no nodes.

    >>> graph = attribution_graph(vpd, model, "def f(x", targets=[")"])        # doctest: +SKIP
    >>> graph.top_edges(10)                                                    # doctest: +SKIP

With ``held=("norms", "deltas")`` and ``importances=False`` every edge into a logit, or into Q, K, V, gate or in, is a term of a
sum: edges, Δs' outputs and biases add up to the target's value (with ``"patterns"`` also into O).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_vpd.analysis.graph.candidates import Candidates
from tl_vpd.analysis.graph.direct import DirectModel, DirectPass
from tl_vpd.analysis.graph.result import EMBEDDINGS, LOGITS, AttributionGraph
from tl_vpd.analysis.graph.rows import Block, Group, groups
from tl_vpd.analysis.graph.targets import logit_targets
from tl_vpd.decomposition import Decomposition
from tl_vpd.importance import lower_leaky


def attribution_graph(
    decomposition: Decomposition,
    model: nn.Module,
    prompt: Any,
    targets: Any = None,
    *,
    pos: int = -1,
    threshold: float = 0.0,
    min_weight: float = 0.0,
    importances: bool = True,
    held: Collection[str] = (),
    tokens_at_once: int = 1024,
    progress: bool = False,
) -> AttributionGraph:
    """The graph of one prompt, on the model's device and in its dtype.

    Args:
        prompt: a string or tokens ``[pos]`` or ``[1, pos]``.
        targets: which logits to explain (``targets`` has the table): ``[">"]``, ``(">", ")")``, ``0.05``; None: every token of
            probability 0.05 or more.
        pos: the logits' position.
        threshold: a subcomponent is a node where its importance exceeds this.
        min_weight: edges of at most this size are left out (0: those that are exactly 0).
        importances: False leaves g out of the edges and makes every subcomponent a node, important or not.
        held: what gradients do not pass: ``"norms"`` (their scales), ``"deltas"``, ``"patterns"`` (of attention).
        tokens_at_once: rows × positions of a batch of gradients, which bounds memory.
        progress: show a bar.

    Raises:
        ValueError: there are several prompts, padding, or nothing to explain; attention runs head by head.
        KeyError, IndexError, TypeError: as in ``logit_targets``. Unsupported: what is to be held fixed cannot be on this model.
    """
    if tokens_at_once < 1:
        raise ValueError(f"tokens_at_once={tokens_at_once}: at least one token has to be run at once.")
    with DirectModel(decomposition, model, held=held) as direct:
        tokens = one_prompt(direct, prompt)
        logits, inputs = direct.clean(tokens)
        g = lower_leaky(direct.weights.pre_sigmoid(inputs, None))[0].detach()
        chosen = logit_targets(direct.adapter, logits[0], targets, pos)
        nodes = Candidates(direct, tokens, inputs, g.to(logits), chosen, logits[0], threshold if importances else None)
        found = _Edges(direct, nodes, tokens, min_weight, importances)
        plan = groups(nodes.blocks(inputs), direct.names, tokens.shape[1], tokens_at_once, causal=direct.adapter.causal)
        rows = sum(len(block.seeds) for group in plan for block in group.blocks)
        with tqdm(total=rows, disable=not progress, desc="gradients") as bar:
            for group in plan:
                found.run(group, bar)
        found.logits(max(1, tokens_at_once // tokens.shape[1]))
        return found.graph()


def one_prompt(direct: DirectModel, prompt: Any) -> Int[Tensor, "1 pos"]:
    """The prompt as tokens; raises ValueError unless it is one, without padding."""
    tokens = direct.adapter.tokens(prompt)
    if tokens.is_floating_point() or tokens.ndim != 2:
        raise ValueError(f"A graph is drawn of tokens; this model takes {tokens.dtype} of shape {tuple(tokens.shape)}.")
    if len(tokens) != 1:
        raise ValueError(f"A graph is of one prompt, and there are {len(tokens)}: use dataset_graph for many.")
    if direct.adapter.padding(tokens, None) is not None:
        raise ValueError("The prompt is padded: give it without its padding.")
    return tokens


class _Edges:
    """Takes the gradients of groups of targets and keeps what they give."""

    def __init__(
        self, direct: DirectModel, nodes: Candidates, tokens: Int[Tensor, "1 pos"], min_weight: float, importances: bool
    ) -> None:
        self.direct, self.nodes, self.tokens, self.min_weight = direct, nodes, tokens, min_weight
        self.importances = importances
        self.strength = nodes.activation * nodes.importance if importances else nodes.activation
        self.writes = {n: direct.weights.U[n].detach()[nodes.index[n]] for n in direct.names}
        self.starts = {
            n: torch.searchsorted(nodes.pos[n], torch.arange(tokens.shape[1] + 1, device=tokens.device)).tolist()
            for n in direct.names
        }
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []
        self.of_deltas = torch.zeros_like(nodes.activation)
        self.of_biases = torch.zeros_like(nodes.activation)
        self.exact = {"norms", "deltas"} <= direct.held

    def run(self, group: Group, bar: tqdm) -> None:  # type: ignore[type-arg]
        """The edges into a group's targets."""
        until = {block.site for block in group.blocks}
        run = self.direct.direct(self.tokens[:, : group.length].expand(group.copies, -1), until=until)
        sums: dict[int, Tensor] = {}
        left = {id(block): len(block.seeds) for block in group.blocks}
        remaining = sum(left.values())
        for batch in group.batches():
            remaining -= sum(own.stop - own.start for _, own, _ in batch)
            rows = self._rows(run, self._seeds(run, group, batch), batch[-1][0].site, again=remaining > 0)
            for block, own, where in batch:
                part = rows[where] if block.combine is None else block.combine[:, own] @ rows[where]
                if block.combine is None:
                    self._keep(block.nodes[own], part, group.length)
                else:
                    sums[id(block)] = sums[id(block)].add_(part) if id(block) in sums else part
                left[id(block)] -= own.stop - own.start
                if not left[id(block)] and block.combine is not None:
                    self._keep(block.nodes, sums.pop(id(block)), group.length)
            bar.update(sum(own.stop - own.start for _, own, _ in batch))

    def _seeds(
        self, run: DirectPass, group: Group, batch: list[tuple[Block, slice, slice]]
    ) -> list[tuple[Tensor, Tensor]]:
        found: dict[str, Tensor] = {}
        for block, own, where in batch:
            if block.site not in found:
                found[block.site] = self.tokens.new_zeros(
                    (group.copies, group.length, block.seeds.shape[1]), dtype=block.seeds.dtype
                )
            found[block.site][where, block.pos] = block.seeds[own]
        return [(run.inputs[site], seed.view(run.inputs[site].shape)) for site, seed in found.items()]

    def logits(self, copies: int) -> None:
        """The edges into the logits."""
        chosen = self.nodes.chosen
        first = len(self.nodes.activation) - len(chosen)
        for start in range(0, len(chosen), copies):
            some = chosen[start : start + copies]
            # Later positions do nothing to a causal model's logits, but cost time.
            length = max(t.pos for t in some) + 1 if self.direct.adapter.causal else self.tokens.shape[1]
            run = self.direct.direct(self.tokens[:, :length].expand(len(some), -1))
            assert run.logits is not None
            seed = torch.zeros_like(run.logits)
            for row, target in enumerate(some):
                seed[row, target.pos] = target.direction(run.logits)
            ids = torch.arange(first + start, first + start + len(some), device=self.tokens.device)
            rows = self._rows(run, [(run.logits, seed)], None, again=False)
            if self.exact and (bias := self.direct.adapter.unembed_bias()) is not None:
                rows[:, -1] += torch.stack([bias.to(rows) @ t.direction(bias.to(rows)) for t in some])
            self._keep(ids, rows, length)

    def _rows(
        self, run: DirectPass, of: list[tuple[Tensor, Tensor]], site: str | None, *, again: bool
    ) -> Float[Tensor, "rows sources"]:
        """What every node up to the pass's length gives to each row; where all is linear two more columns, Δs and biases."""
        names = self.direct.names
        upstream = [n for n in names if n in run.outputs]
        upstream = upstream if site is None else upstream[: upstream.index(site) if site in upstream else len(upstream)]
        of_outputs, of_embeddings, of_norms = run.gradients(of, upstream, again=again)
        assert run.embeddings is not None
        copies, length = run.embeddings.shape[:2]
        extra = 2 if self.exact else 0
        width = length + sum(self.starts[n][length] for n in names)
        rows = run.embeddings.new_zeros(copies, width + extra)
        if of_embeddings is not None:
            rows[:, :length] = torch.einsum("rpd,rpd->rp", of_embeddings, run.embeddings.detach())
        column = length
        for name in names:
            starts = self.starts[name]
            grad = of_outputs.get(name)
            if grad is not None:
                for pos in range(length):
                    if starts[pos + 1] > starts[pos]:
                        own = slice(starts[pos], starts[pos + 1])
                        rows[:, column + own.start : column + own.stop] = grad[:, pos] @ self.writes[name][own].T
                if self.exact:
                    x = run.inputs[name].detach().reshape(copies, length, -1)
                    rows[:, -2] += (grad * self.direct.delta_output(name, x)).sum((1, 2))
                    if (bias := self.direct.adapter.bias(name)) is not None:
                        rows[:, -1] += (grad @ bias.detach()).sum(1)
            column += starts[length]
        if self.exact:
            biases = [bias for y, bias in run.norms if bias is not None and y.requires_grad]
            for grad, bias in zip(of_norms, biases, strict=True):
                if grad is not None:
                    rows[:, -1] += (grad @ bias.detach()).reshape(copies, -1).sum(1)
        return rows.detach()

    def _keep(self, targets: Int[Tensor, " targets"], rows: Float[Tensor, "targets sources"], length: int) -> None:
        if self.exact:
            self.of_deltas[targets], self.of_biases[targets] = rows[:, -2], rows[:, -1]
            rows = rows[:, :-2]
        ids = self._sources(length)
        weights = rows * self.strength[ids]
        if not bool(weights.isfinite().all()):
            raise FloatingPointError(
                f"Edges are not finite in {weights.dtype}: load the model in float32 for a graph of this prompt."
            )
        at, source = (weights.abs() > self.min_weight).nonzero(as_tuple=True)
        self.found.append((ids[source].int(), targets[at].int(), weights[at, source]))

    def _sources(self, length: int) -> Int[Tensor, " sources"]:
        """The nodes that lie in the first positions, in the order of the columns."""
        first = self.nodes.first
        parts = [range(length), *(range(first[n], first[n] + self.starts[n][length]) for n in self.direct.names)]
        return torch.cat([torch.arange(p.start, p.stop, device=self.tokens.device) for p in parts])

    def graph(self) -> AttributionGraph:
        """What has been found."""
        nodes, direct = self.nodes, self.direct
        sources, targets, weights = (torch.cat(parts) for parts in zip(*self.found, strict=True))
        order = (targets.long() * len(nodes.activation) + sources).argsort()
        sources, targets, weights = sources[order], targets[order], weights[order]
        if "patterns" in direct.held:
            self._check_patterns(sources)
        tokens = self.tokens[0]
        names = (EMBEDDINGS, *direct.names, LOGITS)
        counts = [nodes.n_embeddings, *(len(nodes.pos[n]) for n in direct.names), len(nodes.chosen)]
        kind = torch.repeat_interleave(torch.tensor(counts)).to(tokens.device)
        every = torch.arange(nodes.n_embeddings, device=tokens.device)
        of_logits = ([t.pos for t in nodes.chosen], [t.token for t in nodes.chosen])
        pos, index = (torch.tensor(own, device=tokens.device) for own in of_logits)
        return AttributionGraph(
            tokens=tokens.cpu(),
            words=tuple(direct.adapter.words(tokens)),
            names=names,
            logits=tuple(nodes.chosen),
            kind=kind,
            index=torch.cat([tokens, *nodes.index.values(), index]),
            pos=torch.cat([every, *nodes.pos.values(), pos]),
            activation=nodes.activation,
            importance=nodes.importance,
            source=sources,
            target=targets,
            weight=weights,
            settings={"held": sorted(direct.held), "importances": self.importances, "min_weight": self.min_weight},
            deltas=self.of_deltas if self.exact else None,
            biases=self.of_biases if self.exact else None,
        )

    def _check_patterns(self, sources: Tensor) -> None:
        """Q and K act through patterns alone: with those fixed they have no edges, or the model does not show its patterns."""
        nodes = self.nodes
        for name in self.direct.names:
            if name.endswith((".W_Q", ".W_K")):
                first = nodes.first[name]
                if bool(((sources >= first) & (sources < first + len(nodes.pos[name]))).any()):
                    raise RuntimeError(
                        f"With attention patterns held fixed {name} still reaches the output: this model computes attention past "
                        "its hook_pattern. Hold norms and deltas alone."
                    )
