"""Attributions between subcomponents over many prompts.

    A(c' → c) = Σ_{t, t'} (∂a_c(t) / ∂a_c'(t'))* a_c'(t') g_c'(t')  /  ( Σ_t' g_c'(t') · RMS(a_c) )

Sums run over all real tokens of all prompts, the root mean square too (VPD paper, section on attribution graphs; ``*``: gradients
stopped at every other subcomponent). The *absolute* version has ``|a_c|`` for ``a_c``, so that effects on activations of either
sign do not cancel. Gradients of a sum over tokens cost one backward a target, whatever the number of tokens.

    >>> found = dataset_graph(vpd, model, tokens[:64], progress=True)          # doctest: +SKIP
    >>> found.top_edges(10, target="blocks.1.attn.W_O:24")                     # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_vpd.analysis.graph.direct import DirectModel, DirectPass, shared_inputs
from tl_vpd.decomposition import Decomposition
from tl_vpd.importance import lower_leaky
from tl_vpd.site import Subcomponent, nearest

EMBEDDINGS = "embed"


@dataclass(frozen=True)
class DatasetGraph:
    """Attributions among chosen subcomponents; the first source is the embeddings.

    Attributes:
        nodes: the subcomponents, in concatenated order.
        signed, absolute: ``[target, source]``; sources are the embeddings and then ``nodes`` (absolute None: not asked for).
        mean_importance: of each node over tokens. rms: of its inner activation. tokens: how many were summed over.
    """

    nodes: tuple[Subcomponent, ...]
    signed: Float[Tensor, "nodes sources"]
    absolute: Float[Tensor, "nodes sources"] | None
    mean_importance: Float[Tensor, " nodes"]
    rms: Float[Tensor, " nodes"]
    tokens: int

    @property
    def labels(self) -> tuple[str, ...]:
        """The sources' labels; targets are those without the first."""
        return (EMBEDDINGS, *map(str, self.nodes))

    def _edges(self, weights: Tensor, k: int | None) -> pd.DataFrame:
        kept = weights.abs().flatten().argsort(descending=True, stable=True)[:k]
        kept = kept[weights.flatten()[kept] != 0]
        target, source = (kept // weights.shape[1]).tolist(), (kept % weights.shape[1]).tolist()
        columns: dict[str, Any] = {
            "source": [self.labels[i] for i in source],
            "target": [str(self.nodes[i]) for i in target],
            "signed": self.signed[target, source].tolist(),
        }
        if self.absolute is not None:
            columns["absolute"] = self.absolute[target, source].tolist()
        return pd.DataFrame(columns)

    def top_edges(
        self, k: int = 20, *, source: str | None = None, target: str | None = None, absolute: bool = False
    ) -> pd.DataFrame:
        """The k edges of largest size: ``source, target, signed`` and ``absolute``.

        Args:
            source, target: only edges from, or into, this node. absolute: rank by the absolute version.

        Raises:
            KeyError: there is no such node. ValueError: the absolute version was not asked for.
        """
        weights = self.absolute if absolute else self.signed
        if weights is None:
            raise ValueError("This graph holds no absolute version: make it with absolute=True.")
        weights = weights.clone()
        for label, axis, names in ((target, 0, self.labels[1:]), (source, 1, self.labels)):
            if label is not None:
                if label not in names:
                    raise KeyError(f"{label!r} is no node of this graph{nearest(label, names)}.")
                others = torch.arange(len(names), device=weights.device) != names.index(label)
                weights.index_fill_(axis, others.nonzero().flatten(), 0)
        return self._edges(weights, k)

    top = top_edges

    def to_pandas(self) -> pd.DataFrame:
        """All edges that are not 0, largest first."""
        return self._edges(self.signed, None)


def dataset_graph(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    subcomponents: Sequence[str | Subcomponent] | None = None,
    *,
    absolute: bool = True,
    batch_size: int = 8,
    attention_mask: Tensor | None = None,
    progress: bool = False,
) -> DatasetGraph:
    """Attributions summed over all tokens of prompts.

    Args:
        prompts: strings or tokens ``[batch, pos]``.
        subcomponents: the nodes (None: all whose mean importance on these prompts exceeds 1e-6).
        absolute: whether the absolute version is wanted too.
        batch_size: prompts run at once, which bounds memory.
        attention_mask: 0 at padding (None: found as TransformerLens finds it). progress: show a bar.

    Raises:
        ValueError: nothing is important on these prompts; attention runs head by head.
        KeyError, IndexError: a subcomponent does not exist.
    """
    with DirectModel(decomposition, model) as direct:
        tokens = direct.adapter.tokens(prompts)
        token_mask = direct.adapter.padding(tokens, attention_mask)
        own = _Sums(direct, tokens, token_mask, batch_size, progress)
        own.look(None if subcomponents is None else [decomposition.subcomponent(c) for c in subcomponents])
        return own.run(absolute)


class _Sums:
    """Sums over the batches of a data set."""

    def __init__(
        self, direct: DirectModel, tokens: Tensor, token_mask: Tensor | None, size: int, progress: bool
    ) -> None:
        self.direct, self.tokens, self.token_mask, self.size, self.progress = direct, tokens, token_mask, size, progress
        self.n = tokens.numel() if token_mask is None else int(token_mask.sum())
        self.columns: dict[str, Tensor] = {}
        self.families: list[tuple[str, ...]] = []

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None, dict[str, Tensor], Tensor]]:
        """Tokens, where they are real, every site's input, and importances (0 at padding)."""
        for start in range(0, len(self.tokens), self.size):
            rows = slice(start, start + self.size)
            token_mask = None if self.token_mask is None else self.token_mask[rows]
            token_mask = None if token_mask is None or bool(token_mask.all()) else token_mask
            _, inputs = self.direct.clean(self.tokens[rows], token_mask)
            g = lower_leaky(self.direct.weights.pre_sigmoid(inputs, token_mask)).detach()
            yield self.tokens[rows], token_mask, inputs, g if token_mask is None else g * token_mask[..., None]

    @torch.no_grad()
    def look(self, chosen: list[Subcomponent] | None) -> None:
        """Importances and squared activations over all tokens, and the nodes."""
        site_axis, parts = self.direct.weights.site_axis, self.direct.weights
        importance = squares = torch.zeros(site_axis.total, dtype=torch.float64, device=self.tokens.device)
        for _, token_mask, inputs, g in self.batches():
            acts = torch.cat([inputs[n] @ parts.V[n].detach() for n in site_axis.names], -1)
            acts = acts if token_mask is None else acts * token_mask[..., None]
            importance = importance + g.double().sum((0, 1))
            squares = squares + acts.double().square().sum((0, 1))
            if not self.families:
                self.families = shared_inputs(site_axis.names, inputs)
        self.importance, self.rms = importance, (squares / self.n).sqrt()
        taken = importance / self.n > 1e-6
        if chosen is not None:
            taken = torch.zeros_like(taken)
            taken[[site_axis.slices[c.site].start + c.index for c in chosen]] = True
        if not bool(taken.any()):
            raise ValueError("No subcomponent is important on these prompts: there is nothing to attribute.")
        self.taken = taken.nonzero().flatten()
        self.columns = {n: taken[site_axis.slices[n]].nonzero().flatten() for n in site_axis.names}

    def run(self, absolute: bool) -> DatasetGraph:
        """All batches' attributions, normalised."""
        site_axis, n = self.direct.weights.site_axis, len(self.taken)
        signed = torch.zeros(n, n + 1, dtype=torch.float64, device=self.tokens.device)
        by_size = torch.zeros_like(signed) if absolute else None
        total = -(-len(self.tokens) // self.size) * len(self.families)
        with tqdm(total=total, disable=not self.progress, desc="attributing") as bar:
            for tokens, token_mask, inputs, g in self.batches():
                self._batch(tokens, token_mask, inputs, g, signed, by_size, bar)
        importance = torch.cat([self.importance.new_full((1,), self.n), self.importance[self.taken]])
        scale = (importance[None] * self.rms[self.taken, None]).clamp_min(1e-300)
        dtype = self.direct.adapter.dtype
        return DatasetGraph(
            nodes=tuple(site_axis.at(i) for i in self.taken.tolist()),
            signed=(signed / scale).to(dtype),
            absolute=None if by_size is None else (by_size / scale).to(dtype),
            mean_importance=(self.importance[self.taken] / self.n).to(dtype),
            rms=self.rms[self.taken].to(dtype),
            tokens=self.n,
        )

    def _batch(
        self,
        tokens: Tensor,
        token_mask: Tensor | None,
        inputs: dict[str, Tensor],
        g: Tensor,
        signed: Tensor,
        by_size: Tensor | None,
        bar: tqdm,  # type: ignore[type-arg]
    ) -> None:
        direct, parts = self.direct, self.direct.weights
        # Every family's x is wanted, so the pass goes on to the last; its gradients are taken from there backwards.
        run = direct.direct(tokens, until={family[0] for family in self.families}, token_mask=token_mask)
        by_site = parts.site_axis.split_sites(g)
        strengths = {
            n: (inputs[n] @ parts.V[n].detach()[:, own] * by_site[n][..., own]).flatten(0, 1)
            for n, own in self.columns.items()
        }
        rows = {n: int((self.taken < parts.site_axis.slices[n].start).sum()) for n in self.columns}
        for family in self.families:
            reads = torch.cat([parts.V[n].detach().T[self.columns[n]] for n in family])
            if len(reads):
                ids = torch.cat([rows[n] + torch.arange(len(self.columns[n]), device=g.device) for n in family])
                acts = inputs[family[0]] @ reads.T
                real = 1.0 if token_mask is None else token_mask[..., None].to(acts)
                ones = torch.ones_like(acts[..., :1]) * real
                direct_rows = len(reads) <= reads.shape[1]
                basis = reads if direct_rows else torch.eye(reads.shape[1]).to(reads)
                found = torch.stack([self._row(run, family[0], ones * seed, strengths) for seed in basis])
                signed[ids] += found if direct_rows else reads.double() @ found
                if by_size is not None:
                    signs = acts.sign() * real
                    by_size[ids] += torch.stack(
                        [
                            self._row(run, family[0], signs[..., i : i + 1] * read, strengths)
                            for i, read in enumerate(reads)
                        ]
                    )
            bar.update()

    def _row(
        self,
        run: DirectPass,
        site: str,
        seed: Float[Tensor, "batch pos d_in"],
        strengths: dict[str, Tensor],
    ) -> Float[Tensor, " sources"]:
        """What all sources give to one sum over tokens."""
        names = self.direct.names
        upstream = [n for n in names[: names.index(site)] if n in run.outputs]
        x = run.inputs[site]
        of_outputs, of_embeddings, _ = run.gradients([(x, seed.reshape(x.shape))], upstream, again=True)
        assert run.embeddings is not None
        out = [seed.new_zeros(1, dtype=torch.float64)]
        if of_embeddings is not None:
            out[0] = (of_embeddings * run.embeddings.detach()).double().sum()[None]
        for n, own in self.columns.items():
            if n in of_outputs:
                effects = of_outputs[n].flatten(0, 1) @ self.direct.weights.U[n].detach()[own].T
                out.append((effects * strengths[n]).double().sum(0))
            else:
                out.append(seed.new_zeros(len(own), dtype=torch.float64))
        return torch.cat(out)
