"""The edges of a prompt's graph: gradients of groups of targets, weighted by the sources' activations and importances."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_vpd.analysis.graph.candidates import Candidates
from tl_vpd.analysis.graph.config import GraphConfig
from tl_vpd.analysis.graph.direct import DirectModel, DirectPass
from tl_vpd.analysis.graph.result import EMBEDDINGS, LOGITS, AttributionGraph
from tl_vpd.analysis.graph.rows import Batch, Group


class Edges:
    """Takes the gradients of groups of targets and gathers their edges."""

    def __init__(
        self, direct: DirectModel, nodes: Candidates, tokens: Int[Tensor, "1 pos"], config: GraphConfig
    ) -> None:
        self.direct, self.nodes, self.tokens, self.config = direct, nodes, tokens, config
        self.strength = nodes.activation * nodes.importance if config.importances else nodes.activation
        self.writes = {n: direct.weights.U[n].detach()[nodes.index[n]] for n in direct.names}
        positions = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        self.starts = {n: torch.searchsorted(nodes.pos[n], positions).tolist() for n in direct.names}
        self.edges: list[tuple[Tensor, Tensor, Tensor]] = []
        self.deltas = torch.zeros_like(nodes.activation)
        self.biases = torch.zeros_like(nodes.activation)
        self.exact = {"norms", "deltas"} <= direct.fixed

    def add_group(self, group: Group, bar: tqdm) -> None:  # type: ignore[type-arg]
        """The edges into a group's targets."""
        until = {block.site for block in group.blocks}
        run = self.direct.direct(self.tokens[:, : group.length].expand(group.copies, -1), until=until)
        sums: dict[int, Tensor] = {}
        left = {id(block): len(block.seeds) for block in group.blocks}
        remaining = sum(left.values())
        for batch in group.batches():
            remaining -= sum(seeds.stop - seeds.start for _, seeds, _ in batch)
            rows = self._rows(run, self._seeds(run, group, batch), batch[-1][0].site, again=remaining > 0)
            for block, seeds, batch_rows in batch:
                result = rows[batch_rows] if block.combine is None else block.combine[:, seeds] @ rows[batch_rows]
                if block.combine is None:
                    self._add(block.nodes[seeds], result, group.length)
                else:
                    sums[id(block)] = sums[id(block)].add_(result) if id(block) in sums else result
                left[id(block)] -= seeds.stop - seeds.start
                if not left[id(block)] and block.combine is not None:
                    self._add(block.nodes, sums.pop(id(block)), group.length)
            bar.update(sum(seeds.stop - seeds.start for _, seeds, _ in batch))

    def _seeds(self, run: DirectPass, group: Group, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Every input tensor that targets of the batch read, and the gradients that start there."""
        by_site: dict[str, Tensor] = {}
        for block, seeds, batch_rows in batch:
            if block.site not in by_site:
                by_site[block.site] = self.tokens.new_zeros(
                    (group.copies, group.length, block.seeds.shape[1]), dtype=block.seeds.dtype
                )
            by_site[block.site][batch_rows, block.pos] = block.seeds[seeds]
        return [(run.inputs[site], seed.view(run.inputs[site].shape)) for site, seed in by_site.items()]

    def add_logits(self, copies: int) -> None:
        """The edges into the logits, ``copies`` at once."""
        logits = self.nodes.logits
        first = len(self.nodes.activation) - len(logits)
        for start in range(0, len(logits), copies):
            targets = logits[start : start + copies]
            # Later positions do nothing to a causal model's logits, but cost time.
            length = max(t.pos for t in targets) + 1 if self.direct.adapter.causal else self.tokens.shape[1]
            run = self.direct.direct(self.tokens[:, :length].expand(len(targets), -1))
            assert run.logits is not None
            seed = torch.zeros_like(run.logits)
            for row, target in enumerate(targets):
                seed[row, target.pos] = target.direction(run.logits)
            ids = torch.arange(first + start, first + start + len(targets), device=self.tokens.device)
            rows = self._rows(run, [(run.logits, seed)], None, again=False)
            if self.exact and (bias := self.direct.adapter.unembed_bias()) is not None:
                rows[:, -1] += torch.stack([bias.to(rows) @ t.direction(bias.to(rows)) for t in targets])
            self._add(ids, rows, length)

    def _rows(
        self, run: DirectPass, seeds: list[tuple[Tensor, Tensor]], site: str | None, *, again: bool
    ) -> Float[Tensor, "rows sources"]:
        """What every node up to the pass's length gives to each row; where all is linear two more columns, Δs and biases."""
        names = self.direct.names
        upstream = [n for n in names if n in run.outputs]
        upstream = upstream if site is None else upstream[: upstream.index(site) if site in upstream else len(upstream)]
        gradients = run.gradients(seeds, upstream, again=again)
        assert run.embeddings is not None
        copies, length = run.embeddings.shape[:2]
        width = length + sum(self.starts[n][length] for n in names)
        rows = run.embeddings.new_zeros(copies, width + (2 if self.exact else 0))
        if gradients.embeddings is not None:
            rows[:, :length] = torch.einsum("rpd,rpd->rp", gradients.embeddings, run.embeddings.detach())
        column = length
        for name in names:
            grad = gradients.outputs.get(name)
            if grad is not None:
                self._site_columns(rows[:, column:], grad, name)
                if self.exact:
                    self._linear_terms(rows, grad, name, run)
            column += self.starts[name][length]
        if self.exact:
            biases = [bias for y, bias in run.norms if bias is not None and y.requires_grad]
            for grad, bias in zip(gradients.norms, biases, strict=True):
                if grad is not None:
                    rows[:, -1] += (grad @ bias.detach()).reshape(copies, -1).sum(1)
        return rows.detach()

    def _site_columns(self, columns: Tensor, grad: Float[Tensor, "rows pos d_out"], name: str) -> None:
        """Fills in the columns of one site's nodes, position by position."""
        starts = self.starts[name]
        for pos in range(grad.shape[1]):
            if starts[pos + 1] > starts[pos]:
                nodes = slice(starts[pos], starts[pos + 1])
                columns[:, nodes] = grad[:, pos] @ self.writes[name][nodes].T

    def _linear_terms(self, rows: Tensor, grad: Float[Tensor, "rows pos d_out"], name: str, run: DirectPass) -> None:
        """Adds what one site's Δ and bias give to the last two columns."""
        x = run.inputs[name].detach().reshape(*grad.shape[:2], -1)
        rows[:, -2] += (grad * self.direct.delta_output(name, x)).sum((1, 2))
        if (bias := self.direct.adapter.bias(name)) is not None:
            rows[:, -1] += (grad @ bias.detach()).sum(1)

    def _add(self, targets: Int[Tensor, " targets"], rows: Float[Tensor, "targets sources"], length: int) -> None:
        if self.exact:
            self.deltas[targets], self.biases[targets] = rows[:, -2], rows[:, -1]
            rows = rows[:, :-2]
        ids = self._sources(length)
        weights = rows * self.strength[ids]
        if not bool(weights.isfinite().all()):
            raise FloatingPointError(
                f"Edges are not finite in {weights.dtype}: load the model in float32 for a graph of this prompt."
            )
        target, source = (weights.abs() > self.config.min_weight).nonzero(as_tuple=True)
        self.edges.append((ids[source].int(), targets[target].int(), weights[target, source]))

    def _sources(self, length: int) -> Int[Tensor, " sources"]:
        """The nodes at the first ``length`` positions, in the order of the columns."""
        first = self.nodes.first
        ranges = [range(length), *(range(first[n], first[n] + self.starts[n][length]) for n in self.direct.names)]
        return torch.cat([torch.arange(r.start, r.stop, device=self.tokens.device) for r in ranges])

    def graph(self) -> AttributionGraph:
        """The graph of all edges."""
        nodes, direct, config = self.nodes, self.direct, self.config
        source, target, weight = (torch.cat(column) for column in zip(*self.edges, strict=True))
        order = (target.long() * len(nodes.activation) + source).argsort()
        source, target, weight = source[order], target[order], weight[order]
        if "patterns" in direct.fixed:
            self._check_patterns(source)
        tokens = self.tokens[0]
        counts = [nodes.n_embeddings, *(len(nodes.pos[n]) for n in direct.names), len(nodes.logits)]
        embeddings = torch.arange(nodes.n_embeddings, device=tokens.device)
        logit_pos, logit_tokens = (
            torch.tensor(column, device=tokens.device)
            for column in ([t.pos for t in nodes.logits], [t.token for t in nodes.logits])
        )
        return AttributionGraph(
            tokens=tokens.cpu(),
            words=tuple(direct.adapter.words(tokens)),
            names=(EMBEDDINGS, *direct.names, LOGITS),
            logits=tuple(nodes.logits),
            kind=torch.repeat_interleave(torch.tensor(counts)).to(tokens.device),
            index=torch.cat([tokens, *nodes.index.values(), logit_tokens]),
            pos=torch.cat([embeddings, *nodes.pos.values(), logit_pos]),
            activation=nodes.activation,
            importance=nodes.importance,
            source=source,
            target=target,
            weight=weight,
            settings={
                "fixed": sorted(direct.fixed),
                "importances": config.importances,
                "min_weight": config.min_weight,
            },
            deltas=self.deltas if self.exact else None,
            biases=self.biases if self.exact else None,
        )

    def _check_patterns(self, source: Tensor) -> None:
        """Q and K act through patterns alone: with those fixed they have no edges, or the model does not show its patterns."""
        nodes = self.nodes
        for name in self.direct.names:
            if name.endswith((".W_Q", ".W_K")):
                first = nodes.first[name]
                if bool(((source >= first) & (source < first + len(nodes.pos[name]))).any()):
                    raise RuntimeError(
                        f"With attention patterns fixed {name} still reaches the output: this model computes attention past "
                        "its hook_pattern. Fix norms and deltas alone."
                    )
