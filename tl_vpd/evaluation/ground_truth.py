"""How much of a known truth a method's pieces match: lengths and directions, counts, patterns of importance, reconstruction.

Directions (MMCS) and lengths (ML2R; both in ``matching``) are measured over alive pieces (mean importance above 1e-6): a dead
piece that is nearly 0 may point anywhere. Both are also reported over all.

    >>> result = ground_truth(RankOne(vpd, model), model, inputs, toy.truth(model))    # doctest: +SKIP
    >>> result.sites                                                                   # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.checks import choice, seed_of
from tl_vpd.evaluation.importance_statistics import ALIVE
from tl_vpd.evaluation.matching import count_errors, mmcs_and_ml2r, overlap, pattern_errors
from tl_vpd.evaluation.truth import SiteTruth, Truth
from tl_vpd.losses import Reconstruction
from tl_vpd.masking import fresh_pgd
from tl_vpd.printing import Printed

DIRECTIONS = ("mmcs", "ml2r", "mmcs_all", "ml2r_all")
SITE_COLUMNS = ["site", "true", "alive", *DIRECTIONS, "pattern_errors", "pattern_entries", "count_errors", "together"]


@runtime_checkable
class MethodResult(Protocol):
    """What any method gives: pieces that sum to each weight, and how important each is on an input."""

    def pieces(self, site: str) -> Float[Tensor, "n d_in d_out"]:
        """Every piece of a site as a matrix."""

    def importances(self, inputs: Shaped[Tensor, "rows pos ..."]) -> dict[str, Float[Tensor, "rows pos _"]]:
        """Importance of every piece by site."""

    def output(
        self, inputs: Shaped[Tensor, "rows pos ..."], masks: Mapping[str, Float[Tensor, "#rows #pos _"]]
    ) -> Float[Tensor, "rows pos d"]:
        """The model's output with ``Σ_c m_c P_c`` in the place of each weight (without what the pieces do not sum to)."""


@dataclass(frozen=True)
class GroundTruth(Printed):
    """A method's result compared with the truth.

    ``sites``: a row for each site, with ``true`` and ``alive`` counts; ``mmcs``, ``ml2r`` (NaN where directions are not known),
    the same over all pieces; ``pattern_errors``, the importances of the probe that are further than 0.1 from the truth's under
    the best matching, of ``pattern_entries``; ``count_errors`` (the function of that name); ``together``, of sites that are one
    piece, the share of inputs on which all alive pieces of all such sites are above 0.5, or none is.

    ``latents``: a row for each latent, with the subcomponent matched to it, the ``overlap`` of its importance with it (1: the
    same tokens) and the overlap by ``chance``, with the latent's tokens shuffled.

    ``needed``: a row for each site with known needs, with the share of ``tokens`` that need it, the ``overlap``
    of its largest importance with them, the same by ``chance``, and how many pieces are important (above 0.5) ``here``, where
    it is needed, and ``elsewhere``.

    ``reconstruction``: the distance of outputs (squared error, or nats) by masks.
    """

    sites: pd.DataFrame
    latents: pd.DataFrame
    needed: pd.DataFrame
    reconstruction: dict[str, float]


@torch.no_grad()
def ground_truth(
    result: MethodResult,
    model: nn.Module,
    inputs: Shaped[Tensor, "rows pos ..."],
    truth: Truth,
    *,
    output: Literal["kl", "mse"] = "mse",
    seed: int = 0,
) -> GroundTruth:
    """Compares a method's result with what is true of the model.

    Args:
        result: of the method.
        model: the target.
        inputs: a sample of the model's data, for counts, togetherness and reconstruction.
        truth: about the model.
        output: KL for logits, squared error for others.
        seed: of random masks and of chance.

    Raises:
        KeyError: the truth names a site that the model does not have.
        AttributeError: the same, of a custom model.
        ValueError: there is no such ``output``, or the seed is too large.
    """
    choice("output", output, ("kl", "mse"))
    seed = seed_of(seed)
    weights = {site: adapt(model).weight(site) for site in truth.sites}
    g = result.importances(inputs)
    alive = {site: values.mean((0, 1)) > ALIVE for site, values in g.items()}
    on_probe = result.importances(truth.probe)
    whole = [site for site, known in truth.sites.items() if known.whole]
    rows = []
    for site, known in truth.sites.items():
        errors, entries = pattern_errors(on_probe[site].flatten(0, 1), known.pattern, known.either)
        row = {"site": site, "true": known.count, "alive": int(alive[site].sum())}
        row |= _directions(result.pieces(site), weights[site], known, alive[site])
        row |= {"pattern_errors": errors, "pattern_entries": entries}
        row |= {"count_errors": count_errors(on_probe[site].flatten(0, 1), known.count)}
        row |= {"together": _together({name: g[name][..., alive[name]] for name in whole}) if site in whole else np.nan}
        rows.append(row)
    return GroundTruth(
        pd.DataFrame(rows, columns=SITE_COLUMNS),
        _latents(on_probe, truth.latents, seed),
        _needed(on_probe, truth.needed, seed),
        _reconstruction(result, model, inputs, g, output, seed),
    )


def _directions(
    pieces: Float[Tensor, "n d_in d_out"],
    W: Float[Tensor, "d_in d_out"],
    known: SiteTruth,
    alive: Bool[Tensor, " n"],
) -> dict[str, float]:
    if known.basis is None:
        return dict.fromkeys(DIRECTIONS, np.nan)
    effects, true = known.effects(pieces), known.effects(W)
    cosines, ratios = mmcs_and_ml2r(effects[alive], true)
    cosines_all, ratios_all = mmcs_and_ml2r(effects, true)
    means = (float(values.mean()) for values in (cosines, ratios, cosines_all, ratios_all))
    return dict(zip(DIRECTIONS, means, strict=True))


def _together(whole: Mapping[str, Float[Tensor, "rows pos _"]]) -> float:
    """The share of inputs on which all of these pieces are important or none is."""
    on = torch.cat(list(whole.values()), dim=-1) > 0.5
    if on.shape[-1] == 0:
        return float("nan")
    return float((on.all(-1) | ~on.any(-1)).float().mean())


def _latents(
    g: Mapping[str, Float[Tensor, "rows pos _"]], latents: Mapping[str, Bool[Tensor, "rows pos"]], seed: int
) -> pd.DataFrame:
    columns = ["latent", "tokens", "subcomponent", "overlap", "chance"]
    if not latents:
        return pd.DataFrame(columns=columns)
    every = torch.cat([values.flatten(0, 1) for values in g.values()], dim=-1)
    names = [f"{site}:{c}" for site, values in g.items() for c in range(values.shape[-1])]
    true = torch.stack([where.flatten() for where in latents.values()], dim=-1)
    measured, chance = overlap(true, every), overlap(_shuffled(true, seed), every)
    matched, by_chance = (linear_sum_assignment(t.double().numpy(), maximize=True)[1] for t in (measured, chance))
    rows = [
        (name, int(true[:, i].sum()), names[c], float(measured[i, c]), float(chance[i, d]))
        for i, (name, c, d) in enumerate(zip(latents, matched.tolist(), by_chance.tolist(), strict=True))
    ]
    return pd.DataFrame(rows, columns=columns)


def _needed(
    g: Mapping[str, Float[Tensor, "rows pos _"]], needed: Mapping[str, Bool[Tensor, "rows pos"]], seed: int
) -> pd.DataFrame:
    rows = []
    for site, where in needed.items():
        true, on = where.flatten()[:, None], (g[site] > 0.5).flatten(0, 1).sum(-1).float()
        largest = g[site].flatten(0, 1).amax(-1, keepdim=True)
        overlaps = (float(overlap(tokens, largest)) for tokens in (true, _shuffled(true, seed)))
        pieces = (float(on[tokens].mean()) for tokens in (where.flatten(), ~where.flatten()))
        rows.append((site, float(true.float().mean()), *overlaps, *pieces))
    return pd.DataFrame(rows, columns=["site", "tokens", "overlap", "chance", "here", "elsewhere"])


def _shuffled(true: Bool[Tensor, "token n"], seed: int) -> Bool[Tensor, "token n"]:
    return true[torch.randperm(len(true), generator=torch.Generator().manual_seed(seed))]


def _reconstruction(
    result: MethodResult,
    model: nn.Module,
    inputs: Shaped[Tensor, "rows pos ..."],
    g: Mapping[str, Float[Tensor, "rows pos _"]],
    output: Literal["kl", "mse"],
    seed: int,
) -> dict[str, float]:
    """Distances with all pieces, with importances as masks, rounded at 0.5, stochastic, none, and under the fresh adversary."""
    reconstruction = Reconstruction(model(inputs), output)

    def distance(masks: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        return reconstruction(result.output(inputs, masks))

    generator = torch.Generator().manual_seed(seed)
    uniform = {site: torch.rand(values.shape, generator=generator) for site, values in g.items()}
    widths = [values.shape[-1] for values in g.values()]

    def masks_of(sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {site: values + (1 - values) * sources[site] for site, values in g.items()}

    def attacked(sources: Float[Tensor, "1 1 n_total"]) -> Float[Tensor, ""]:
        return distance(masks_of(dict(zip(g, sources.split(widths, dim=-1), strict=True))))

    distances = {
        "unmasked": distance({site: torch.ones_like(values) for site, values in g.items()}),
        "importances": distance(g),
        "rounded": distance({site: (values > 0.5).to(values.dtype) for site, values in g.items()}),
        "stochastic": distance(masks_of(uniform)),
        "zero": distance({site: torch.zeros_like(values) for site, values in g.items()}),
    }
    start = torch.rand(1, 1, sum(widths), generator=generator)
    return {name: float(value) for name, value in distances.items()} | {"adversarial": fresh_pgd(attacked, start).loss}
