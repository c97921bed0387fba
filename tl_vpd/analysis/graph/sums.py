"""Sums over the batches of a data set, from which ``dataset_graph`` makes its attributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_vpd.analysis.graph.config import DatasetGraphConfig
from tl_vpd.analysis.graph.direct import DirectModel, DirectPass, shared_inputs
from tl_vpd.site import Subcomponent


@dataclass(frozen=True)
class _Batch:
    """Some prompts, where they are real, every site's input, and importances (0 at padding)."""

    tokens: Int[Tensor, "batch pos"]
    token_mask: Bool[Tensor, "batch pos"] | None
    inputs: dict[str, Tensor]
    g: Float[Tensor, "batch pos C_total"]

    def real(self, like: Tensor) -> Float[Tensor, "#batch #pos 1"]:
        """1 at real tokens, 0 at padding."""
        return like.new_ones(1, 1, 1) if self.token_mask is None else self.token_mask[..., None].to(like)


class DatasetSums:
    """Importances, squared activations and attributions of the chosen nodes (None: all that are important), summed over all real
    tokens of prompts. Raises ValueError where nothing is important.

    Attributes:
        nodes: concatenated positions of the nodes.
        importance: summed, of all subcomponents.
        rms: of all subcomponents' inner activations.
        n_tokens: how many tokens are real.
    """

    def __init__(
        self,
        direct: DirectModel,
        tokens: Int[Tensor, "batch pos"],
        token_mask: Bool[Tensor, "batch pos"] | None,
        config: DatasetGraphConfig,
        chosen: Sequence[Subcomponent] | None,
    ) -> None:
        self.direct, self.tokens, self.token_mask, self.config = direct, tokens, token_mask, config
        self.n_tokens = tokens.numel() if token_mask is None else int(token_mask.sum())
        self.families: list[tuple[str, ...]] = []
        self.importance, self.rms = self._statistics()
        site_axis = direct.weights.site_axis
        is_node = self.importance / self.n_tokens > 1e-6
        if chosen is not None:
            is_node = torch.zeros_like(is_node)
            is_node[[site_axis.slices[c.site].start + c.index for c in chosen]] = True
        if not bool(is_node.any()):
            raise ValueError("No subcomponent is important on these prompts: there is nothing to attribute.")
        self.nodes = is_node.nonzero().flatten()
        self.columns = {n: flags.nonzero().flatten() for n, flags in site_axis.split_sites(is_node).items()}

    def _batches(self) -> Iterator[_Batch]:
        for start in range(0, len(self.tokens), self.config.batch_size):
            rows = slice(start, start + self.config.batch_size)
            token_mask = None if self.token_mask is None else self.token_mask[rows]
            token_mask = None if token_mask is None or bool(token_mask.all()) else token_mask
            _, inputs = self.direct.clean(self.tokens[rows], token_mask)
            g = self.direct.weights.importances(inputs, token_mask).detach()
            yield _Batch(self.tokens[rows], token_mask, inputs, g)

    @torch.no_grad()
    def _statistics(self) -> tuple[Float[Tensor, " C_total"], Float[Tensor, " C_total"]]:
        """Summed importances and root mean squares of activations; notes which sites share their inputs."""
        weights = self.direct.weights
        importance = squares = torch.zeros(weights.site_axis.total, dtype=torch.float64, device=self.tokens.device)
        for batch in self._batches():
            acts = torch.cat([batch.inputs[n] @ weights.V[n].detach() for n in weights.site_axis.names], -1)
            importance = importance + batch.g.double().sum((0, 1))
            squares = squares + (acts * batch.real(acts)).double().square().sum((0, 1))
            self.families = self.families or shared_inputs(weights.site_axis.names, batch.inputs)
        return importance, (squares / self.n_tokens).sqrt()

    def attributions(self) -> tuple[Float[Tensor, "nodes sources"], Float[Tensor, "nodes sources"] | None]:
        """The signed and absolute attributions, normalised."""
        n = len(self.nodes)
        signed = torch.zeros(n, n + 1, dtype=torch.float64, device=self.tokens.device)
        absolute = torch.zeros_like(signed) if self.config.absolute else None
        total = -(-len(self.tokens) // self.config.batch_size) * len(self.families)
        with tqdm(total=total, disable=not self.config.progress, desc="attributing") as bar:
            for batch in self._batches():
                self._add(batch, signed, absolute, bar)
        importance = torch.cat([self.importance.new_full((1,), self.n_tokens), self.importance[self.nodes]])
        scale = (importance[None] * self.rms[self.nodes, None]).clamp_min(1e-300)
        results = signed / scale, None if absolute is None else absolute / scale
        for result in results:
            if result is not None and not bool(result.isfinite().all()):
                first = self.direct.weights.site_axis.at(int(self.nodes[(~result.isfinite()).any(1)][0]))
                raise FloatingPointError(
                    f"Attributions to {first} are NaN or infinite: load the model in float32, and look at its activations."
                )
        return results

    def _add(self, batch: _Batch, signed: Tensor, absolute: Tensor | None, bar: tqdm) -> None:  # type: ignore[type-arg]
        """Adds a batch's attributions, family by family of sites that share an input."""
        weights, site_axis = self.direct.weights, self.direct.weights.site_axis
        # All families' inputs are needed, so the pass runs to the last; gradients start from there backwards.
        until = {family[0] for family in self.families}
        run = self.direct.direct(batch.tokens, until=until, token_mask=batch.token_mask)
        by_site = site_axis.split_sites(batch.g)
        strengths = {
            n: (batch.inputs[n] @ weights.V[n].detach()[:, c] * by_site[n][..., c]).flatten(0, 1)
            for n, c in self.columns.items()
        }
        first = {n: int((self.nodes < site_axis.slices[n].start).sum()) for n in self.columns}
        for family in self.families:
            reads = torch.cat([weights.V[n].detach().T[self.columns[n]] for n in family])
            if len(reads):
                columns = [first[n] + torch.arange(len(self.columns[n]), device=batch.g.device) for n in family]
                targets = torch.cat(columns)
                x = batch.inputs[family[0]]
                # With more targets than dimensions of x, gradients are taken in x and combined.
                each = len(reads) <= reads.shape[1]
                basis = reads if each else torch.eye(reads.shape[1]).to(reads)
                everywhere = torch.ones_like(x[..., :1]) * batch.real(x)
                rows = torch.stack([self._row(run, family[0], everywhere * seed, strengths) for seed in basis])
                signed[targets] += rows if each else reads.double() @ rows
                if absolute is not None:
                    signs = (x @ reads.T).sign() * batch.real(x)
                    seeds = (signs[..., i : i + 1] * read for i, read in enumerate(reads))
                    absolute[targets] += torch.stack([self._row(run, family[0], s, strengths) for s in seeds])
            bar.update()

    def _row(
        self, run: DirectPass, site: str, seed: Float[Tensor, "batch pos d_in"], strengths: dict[str, Tensor]
    ) -> Float[Tensor, " sources"]:
        """What all sources give to one sum over tokens."""
        names = self.direct.names
        upstream = [n for n in names[: names.index(site)] if n in run.outputs]
        x = run.inputs[site]
        gradients = run.gradients([(x, seed.reshape(x.shape))], upstream, again=True)
        assert run.embeddings is not None
        row = [seed.new_zeros(1, dtype=torch.float64)]
        if gradients.embeddings is not None:
            row[0] = (gradients.embeddings * run.embeddings.detach()).double().sum()[None]
        for n, columns in self.columns.items():
            if n in gradients.outputs:
                effects = gradients.outputs[n].flatten(0, 1) @ self.direct.weights.U[n].detach()[columns].T
                row.append((effects * strengths[n]).double().sum(0))
            else:
                row.append(seed.new_zeros(len(columns), dtype=torch.float64))
        return torch.cat(row)
