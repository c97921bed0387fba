"""One artefact in the place of a model's MLPs: which of its pieces are active, what they cost, and the model's output.

Every kind of artefact is measured through the same four questions, so that no figure depends on the kind: ``batch`` (which
pieces are active at every token, from the target's own pass), ``output`` (everything replaced, in two ways), ``alone`` (one
layer) and ``attacked`` (what is inactive, switched on by sources in [0, 1]).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.baselines.comparison.config import WAYS
from tl_vpd.baselines.transcoders.replaced_model import ReplacedModel, clean_outputs, read_by
from tl_vpd.baselines.transcoders.transcoders import Transcoders
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.batch import Batch, Rows, ce_by_row
from tl_vpd.evaluation.mask_transfer import clean_input_output
from tl_vpd.evaluation.sample import Sample, sampled
from tl_vpd.losses import Reconstruction
from tl_vpd.masking import Masks, constant_masks, masks_from_sources
from tl_vpd.site import ConcatenatedAxis, Site

Artefact = Decomposition | Transcoders
TRAINED_IN = {"local": "local", "cascading": WAYS[0], "parallel": WAYS[1], "independent": WAYS[2]}
"""Losses of ``TranscoderConfig`` and the ways of replacing that they train."""


class Replacement(ABC):
    """An artefact on a model.

    Attributes:
        kind: of artefact, in words.
        axis: the pieces of all modules on one axis: a weight matrix's subcomponents, or a layer's latents.
        parameters: of one piece, by module.
        always_on: parameters that every token uses (skip connections).
        writers: by layer, the modules that take part in its MLP's output.
        n_sources: how many sources an attack has.
        trained_in: the way of replacing that it was trained in; ``"local"`` (each MLP's output) or ``"unknown"``.
    """

    kind: str
    axis: ConcatenatedAxis
    parameters: dict[str, int]
    always_on: int = 0
    writers: dict[int, list[str]]
    n_sources: int
    trained_in: str

    @property
    def method(self) -> str:
        """The artefact's method, where the user names none."""
        return self.kind

    @abstractmethod
    def batch(self, rows: Rows) -> Batch:
        """Rows after a pass of the target, with 1 for every active piece in the place of importances."""

    @abstractmethod
    def output(self, batch: Batch, *, clean_input: bool) -> Tensor:
        """The output with every MLP replaced; each reads the replaced residual stream, or the target's (``clean_input``)."""

    @abstractmethod
    def alone(self, batch: Batch, layer: int) -> Tensor:
        """The output with one layer's MLP replaced."""

    @abstractmethod
    def attacked(self, batch: Batch, sources: Float[Tensor, "1 1 n"]) -> Tensor:
        """The output with every MLP replaced, inactive pieces switched on by their sources; errors propagate."""


class OfDecomposition(Replacement):
    """Subcomponents of the MLPs' matrices above a threshold; Δ is 0, and in an attack it has a source as well.

    Args:
        sample: of the decomposition.
        threshold: above which an importance makes a subcomponent active.
    """

    kind = "parameter decomposition"
    trained_in = WAYS[0]

    def __init__(self, sample: Sample, threshold: float) -> None:
        self.sample, self.threshold = sample, threshold
        sites = mlp_sites(sample.masked_model.weights.sites.values())
        self.axis = ConcatenatedAxis({s.name: sample.site_axis.counts[s.name] for s in sites})
        self.parameters = {s.name: s.d_in + s.d_out for s in sites}
        self.writers = {}
        for site in sites:
            assert site.layer is not None
            self.writers.setdefault(site.layer, []).append(site.name)
        self.n_sources = self.axis.total + len(self.axis.names)

    def batch(self, rows: Rows) -> Batch:
        """The sample's batch, with rounded importances of the MLPs' matrices alone."""
        whole = self.sample.batch(rows)
        by_site = self.sample.site_axis.split_sites(whole.g)
        g = torch.cat([by_site[name] for name in self.axis.names], dim=-1)
        return replace(whole, g=(g > self.threshold).to(g.dtype))

    def output(self, batch: Batch, *, clean_input: bool) -> Tensor:
        """The masked model's output."""
        masks = self._masks(batch)
        if not clean_input:
            return self.sample.output(batch, masks)
        with self.sample.masked_model:
            return clean_input_output(self.sample, batch, masks)

    def alone(self, batch: Batch, layer: int) -> Tensor:
        """The output with one layer's matrices masked."""
        return self.sample.output(batch, self._masks(batch).only(self.writers[layer]))

    def attacked(self, batch: Batch, sources: Float[Tensor, "1 1 n"]) -> Tensor:
        """The masked model's output, with gradients to the sources."""
        masks = masks_from_sources(batch.g, sources.to(batch.g), self.axis)
        with self.sample.masked_model as model:
            return model.masked(batch.rows.tokens, masks, batch.rows.token_mask, constant_weights=True)

    def _masks(self, batch: Batch) -> Masks:
        return constant_masks(batch.g, 0.0, self.axis)


class OfTranscoders(Replacement):
    """Latents above their thresholds. In an attack an inactive latent passes its source's share of ReLU(z).

    Args:
        transcoders: of the model.
        replaced: the model.
    """

    def __init__(self, transcoders: Transcoders, replaced: ReplacedModel) -> None:
        self.transcoders, self.replaced = transcoders, replaced
        kind = "cross-layer transcoders" if transcoders.cross_layer else "per-layer transcoders"
        self.kind = "SAEs of MLP outputs" if transcoders.reads == "mlp_out" else kind
        loss = transcoders.record.get("config", {}).get("loss")
        self.trained_in = TRAINED_IN.get(loss, "unknown")
        names = {layer: f"blocks.{layer}.mlp" for layer in transcoders.layers}
        self.axis = ConcatenatedAxis({names[layer]: n for layer, n in transcoders.n_latents.items()})
        self.parameters, self.writers = {}, {}
        for layer, name in names.items():
            d_in, _, d_out = transcoders[layer].sizes
            self.parameters[name] = d_in + d_out * len(transcoders.targets(layer))
            self.always_on += 0 if transcoders[layer].W_skip is None else d_in * d_out
            self.writers[layer] = [names[source] for source in transcoders.sources(layer)]
        self.n_sources = self.axis.total

    @property
    def method(self) -> str:
        """The kind, and what they were trained in, where it is known."""
        return self.kind if self.trained_in == "unknown" else f"{self.kind}, {self.trained_in}"

    def batch(self, rows: Rows) -> Batch:
        """The target's output, and which latents are active in its own pass."""
        clean = self.replaced.clean(rows.tokens, rows.token_mask)
        latents = [self.transcoders.encode(layer, x) for layer, x in read_by(self.transcoders, clean).items()]
        g = (torch.cat(latents, dim=-1) > 0).to(clean.output.dtype)
        if rows.token_mask is not None:
            g = g * rows.token_mask.unsqueeze(-1)
        distance = Reconstruction(clean.output, token_mask=rows.token_mask)
        return Batch(rows, g, distance, ce_by_row(clean.output, rows.tokens, rows.token_mask))

    def output(self, batch: Batch, *, clean_input: bool) -> Tensor:
        """The output with every MLP replaced."""
        rows = batch.rows
        if not clean_input:
            return self.replaced.error_propagating(self.transcoders, rows.tokens, rows.token_mask)
        outputs = clean_outputs(self.transcoders, self.replaced.clean(rows.tokens, rows.token_mask))
        return self.replaced.with_outputs(rows.tokens, outputs, rows.token_mask)

    def alone(self, batch: Batch, layer: int) -> Tensor:
        """The output with one MLP replaced, from the target's own stream."""
        rows = batch.rows
        outputs = clean_outputs(self.transcoders, self.replaced.clean(rows.tokens, rows.token_mask))
        return self.replaced.with_outputs(rows.tokens, {layer: outputs[layer]}, rows.token_mask)

    def attacked(self, batch: Batch, sources: Float[Tensor, "1 1 n"]) -> Tensor:
        """The output when ``a = ReLU(z) · (H + (1 − H) r)``, H whether the latent is active."""
        by_layer = dict(
            zip(self.transcoders.layers, sources.split(list(self.transcoders.n_latents.values()), -1), strict=True)
        )

        def encode(layer: int, x: Tensor) -> Tensor:
            one = self.transcoders[layer]
            z = one.pre_acts(x)
            on = (z > one.threshold).to(z.dtype)
            return z.relu() * (on + (1 - on) * by_layer[layer].to(z))

        rows = batch.rows
        return self.replaced.error_propagating(self.transcoders, rows.tokens, rows.token_mask, encode=encode)


def mlp_sites(sites: Any) -> list[Site]:
    """The weight matrices of MLPs among sites, in their order."""
    return [site for site in sites if site.layer is not None and site.short in ("in", "gate", "out")]


def layers_of(artefact: Artefact) -> list[int]:
    """The layers whose MLPs an artefact replaces."""
    if isinstance(artefact, Transcoders):
        return list(artefact.layers)
    return sorted({site.layer for site in mlp_sites(artefact.sites.values()) if site.layer is not None})


def directions(artefact: Artefact, module: str) -> tuple[Float[Tensor, "d_in n"], Float[Tensor, "n d_out"]]:
    """What the pieces of a module read and write; of a cross-layer latent, its decoders as one vector."""
    if isinstance(artefact, Decomposition):
        return artefact.V[module].detach(), artefact.U[module].detach()
    one = artefact[int(module.split(".")[1])]
    return one.W_enc.detach(), one.W_dec.detach().transpose(0, 1).flatten(1)


@contextmanager
def replacement_of(
    artefact: Artefact, model: nn.Module, rows: Rows, threshold: float, *, batch_size: int, seed: int
) -> Iterator[Replacement]:
    """An artefact on a model, while its measures run.

    Args:
        artefact: a decomposition or transcoders.
        model: the target.
        rows: of tokens.
        threshold: of a decomposition's importances.
        batch_size: how many rows run together.
        seed: of the sample.
    """
    if isinstance(artefact, Decomposition):
        with sampled(artefact, model, rows.tokens, batch_size=batch_size, seed=seed, keep_bytes=0) as sample:
            yield OfDecomposition(sample, threshold)
    else:
        with ReplacedModel(model, artefact.layers) as replaced:
            replaced.check(artefact)
            yield OfTranscoders(artefact, replaced)
