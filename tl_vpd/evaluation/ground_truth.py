"""How much of a known truth a decomposition found: lengths and directions, counts, patterns of importance, reconstruction.

For a site with one subcomponent a feature, ``W_j`` what the weight does with feature j and ``P_cj`` what piece c does with it
(for a rank-one piece ``V[j, c] U[c]``), SPD (arXiv 2506.20790, section 3.1) measures

    MMCS = mean_j max_c cos(P_cj, W_j)              mean max cosine similarity: directions
    ML2R = mean_j ‖P_cj‖ / ‖W_j‖   at that c        mean L2 ratio: lengths, 1 where nothing shrank or was split

over alive pieces (mean importance above 1e-6): a dead piece that is nearly 0 may point anywhere. Both are also given over all.

    >>> found = ground_truth(RankOne(vpd, model), model, toy.truth(model), inputs)     # doctest: +SKIP
    >>> found.sites                                                                    # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.evaluation.evaluate import ALIVE
from tl_vpd.evaluation.truth import SiteTruth, Truth
from tl_vpd.losses import kl_divergence, squared_error
from tl_vpd.masking import fresh_pgd

TOLERANCE = 0.1
"""An importance further than this from the truth's 0 or 1 counts as an error, as in SPD."""

DIRECTIONS = ("mmcs", "ml2r", "mmcs_all", "ml2r_all")
SITE_COLUMNS = ["site", "true", "alive", *DIRECTIONS, "pattern_errors", "pattern_entries", "count_errors", "together"]


@runtime_checkable
class Found(Protocol):
    """What any method finds: pieces that sum to each weight, and how important each is on an input."""

    def pieces(self, site: str) -> Float[Tensor, "n d_in d_out"]:
        """Every piece of a site as a matrix."""

    def importances(self, inputs: Shaped[Tensor, "rows pos ..."]) -> dict[str, Float[Tensor, "rows pos _"]]:
        """Importance of every piece by site."""

    def output(
        self, inputs: Shaped[Tensor, "rows pos ..."], masks: Mapping[str, Float[Tensor, "#rows #pos _"]]
    ) -> Float[Tensor, "rows pos d"]:
        """The model's output with ``Σ_c m_c P_c`` in the place of each weight (nothing stands for what the pieces leave over)."""


@dataclass(frozen=True)
class GroundTruth:
    """What was found of what is known.

    ``sites``: a row a site, with ``true`` and ``alive`` counts; ``mmcs``, ``ml2r`` (NaN where directions are not known), the
    same over all pieces; ``pattern_errors``, the importances of the probe that are further than 0.1 from the truth's under the
    best matching, of ``pattern_entries``; ``count_errors`` (the function of that name); ``together``, of sites that are one
    piece, the share of inputs on which all alive pieces of all such sites are above 0.5, or none is.

    ``latents``: a row a latent, with the subcomponent matched to it, the ``overlap`` of its importance with it (1: the same
    tokens) and the overlap by ``chance``, with the latent's tokens shuffled.

    ``needed``: a row a site of which it is known where it is needed, with the share of ``tokens`` that need it, the ``overlap``
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
    found: Found,
    model: nn.Module,
    truth: Truth,
    inputs: Shaped[Tensor, "rows pos ..."],
    *,
    output: Literal["kl", "mse"] = "mse",
    seed: int = 0,
) -> GroundTruth:
    """Measures what a method found against what is true of the model.

    Args:
        inputs: a sample of the model's data, on which counts, togetherness and reconstruction are taken.
        output: KL for logits, squared error for others.

    Raises:
        KeyError, AttributeError: the truth names a site that the model does not have.
    """
    weights = {site: adapt(model).weight(site) for site in truth.sites}
    g = found.importances(inputs)
    alive = {site: own.mean((0, 1)) > ALIVE for site, own in g.items()}
    probed = found.importances(truth.probe)
    whole = [site for site, known in truth.sites.items() if known.whole]
    rows = []
    for site, known in truth.sites.items():
        errors, entries = pattern_errors(probed[site].flatten(0, 1), known.pattern, known.either)
        row = {"site": site, "true": known.count, "alive": int(alive[site].sum())}
        row |= _directions(found.pieces(site), weights[site], known, alive[site])
        row |= {"pattern_errors": errors, "pattern_entries": entries}
        row |= {"count_errors": count_errors(probed[site].flatten(0, 1), known.count)}
        row |= {"together": _together({name: g[name][..., alive[name]] for name in whole}) if site in whole else np.nan}
        rows.append(row)
    return GroundTruth(
        pd.DataFrame(rows, columns=SITE_COLUMNS),
        _latents(probed, truth.latents, seed),
        _needed(probed, truth.needed, seed),
        _reconstruction(found, model, inputs, g, output, seed),
    )


def mmcs_and_ml2r(
    own: Float[Tensor, "n feature d"], true: Float[Tensor, "feature d"]
) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
    """Each feature's largest cosine over pieces, and the ratio of lengths at that piece (0 and 0 where there are no pieces).

    Args:
        own: what each piece does with each feature. true: what the weight does.
    """
    if len(own) == 0:
        return torch.zeros(len(true)), torch.zeros(len(true))
    # Lengths however small have a direction: only an exact 0 has none.
    cosines = torch.einsum("n f d, f d -> n f", *(F.normalize(t, dim=-1, eps=1e-30) for t in (own, true)))
    best, at = cosines.max(0)
    return best, own.norm(dim=-1).gather(0, at[None])[0] / true.norm(dim=-1)


def pattern_errors(
    g: Float[Tensor, "probe n"],
    pattern: Bool[Tensor, "probe count"],
    either: Bool[Tensor, "probe count"] | None = None,
) -> tuple[int, int]:
    """Importances further than 0.1 from the truth's under the matching with the least summed difference, and how many there are.

    A true subcomponent for which there is no piece counts as one of importance 0, and a piece that is over as one that should
    be 0 everywhere. Entries that are in ``either`` do not count.
    """
    size = max(g.shape[1], pattern.shape[1])
    own = F.pad(g, (0, size - g.shape[1]))
    true = F.pad(pattern.to(g.dtype), (0, size - pattern.shape[1]))
    counts = torch.ones_like(true) if either is None else 1 - F.pad(either.to(g.dtype), (0, size - either.shape[1]))
    apart = torch.stack([(own - true[:, j, None]).abs().mul(counts[:, j, None]).sum(0) for j in range(size)])
    _, matched = linear_sum_assignment(apart.double().numpy())
    wrong = ((own[:, torch.from_numpy(matched)] - true).abs() > TOLERANCE) & (counts > 0)
    return int(wrong.sum()), pattern.numel() if either is None else int((~either).sum())


def count_errors(g: Float[Tensor, "probe n"], count: int) -> int:
    """How far a site is from having exactly ``count`` pieces, whatever directions they read (0: it has).

    Of the ``count`` pieces with the largest summed importance, those that no input of the probe needs (all below 0.9), and of
    the others every importance above 0.1. So SPD's authors count (``goodfire-ai/spd``, target solutions of dense layers): a
    piece that an input's direction is orthogonal to is not important there, by the definition of importance, so that "always"
    cannot be asked of single inputs.
    """
    order = g.sum(0).argsort(descending=True)
    needed = (g[:, order[:count]] >= 1 - TOLERANCE).any(0)
    return count - int(needed.sum()) + int((g[:, order[count:]] > TOLERANCE).sum())


def overlap(latents: Bool[Tensor, "token latent"], g: Float[Tensor, "token n"]) -> Float[Tensor, "latent n"]:
    """``Σ min(t, g) / Σ max(t, g)``: 1 where importance is 1 at exactly the latent's tokens (Jaccard's index, for weights)."""
    both = latents.to(g.dtype).T @ g.clamp(0, 1)
    return both / (latents.sum(0)[:, None] + g.clamp(0, 1).sum(0)[None] - both).clamp(min=1e-12)


def _directions(
    pieces: Float[Tensor, "n d_in d_out"],
    W: Float[Tensor, "d_in d_out"],
    known: SiteTruth,
    alive: Bool[Tensor, " n"],
) -> dict[str, float]:
    if known.basis is None:
        return dict.fromkeys(DIRECTIONS, np.nan)
    own, true = known.effects(pieces), known.effects(W)
    cosines, ratios = mmcs_and_ml2r(own[alive], true)
    cosines_all, ratios_all = mmcs_and_ml2r(own, true)
    means = (float(values.mean()) for values in (cosines, ratios, cosines_all, ratios_all))
    return dict(zip(DIRECTIONS, means, strict=True))


def _together(whole: Mapping[str, Float[Tensor, "rows pos _"]]) -> float:
    """The share of inputs on which all of these pieces are important or none is."""
    on = torch.cat(list(whole.values()), dim=-1) > 0.5
    if on.shape[-1] == 0:
        return float("nan")
    return float((on.all(-1) | ~on.any(-1)).float().mean())


def _latents(
    probed: Mapping[str, Float[Tensor, "rows pos _"]], latents: Mapping[str, Bool[Tensor, "rows pos"]], seed: int
) -> pd.DataFrame:
    columns = ["latent", "tokens", "subcomponent", "overlap", "chance"]
    if not latents:
        return pd.DataFrame(columns=columns)
    g = torch.cat([own.flatten(0, 1) for own in probed.values()], dim=-1)
    names = [f"{site}:{c}" for site, own in probed.items() for c in range(own.shape[-1])]
    true = torch.stack([own.flatten() for own in latents.values()], dim=-1)
    measured, chance = overlap(true, g), overlap(_shuffled(true, seed), g)
    matched, by_chance = (linear_sum_assignment(t.double().numpy(), maximize=True)[1] for t in (measured, chance))
    rows = [
        (name, int(true[:, i].sum()), names[c], float(measured[i, c]), float(chance[i, d]))
        for i, (name, c, d) in enumerate(zip(latents, matched.tolist(), by_chance.tolist(), strict=True))
    ]
    return pd.DataFrame(rows, columns=columns)


def _needed(
    probed: Mapping[str, Float[Tensor, "rows pos _"]], needed: Mapping[str, Bool[Tensor, "rows pos"]], seed: int
) -> pd.DataFrame:
    rows = []
    for site, where in needed.items():
        true, on = where.flatten()[:, None], (probed[site] > 0.5).flatten(0, 1).sum(-1).float()
        largest = probed[site].flatten(0, 1).amax(-1, keepdim=True)
        overlaps = (float(overlap(own, largest)) for own in (true, _shuffled(true, seed)))
        pieces = (float(on[own].mean()) for own in (where.flatten(), ~where.flatten()))
        rows.append((site, float(true.float().mean()), *overlaps, *pieces))
    return pd.DataFrame(rows, columns=["site", "tokens", "overlap", "chance", "here", "elsewhere"])


def _shuffled(true: Bool[Tensor, "token n"], seed: int) -> Bool[Tensor, "token n"]:
    return true[torch.randperm(len(true), generator=torch.Generator().manual_seed(seed))]


def _reconstruction(
    found: Found,
    model: nn.Module,
    inputs: Shaped[Tensor, "rows pos ..."],
    g: Mapping[str, Float[Tensor, "rows pos _"]],
    output: Literal["kl", "mse"],
    seed: int,
) -> dict[str, float]:
    """Distances with all pieces, with importances as masks, rounded at 0.5, stochastic, none, and under the fresh adversary."""
    target = model(inputs)
    log_target = target.float().log_softmax(-1)

    def distance(masks: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        got = found.output(inputs, masks)
        return squared_error(target, got) if output == "mse" else kl_divergence(log_target, got)

    generator = torch.Generator().manual_seed(seed)
    drawn = {site: torch.rand(own.shape, generator=generator) for site, own in g.items()}
    widths = [own.shape[-1] for own in g.values()]

    def attacked(sources: Float[Tensor, "1 1 n_total"]) -> Float[Tensor, ""]:
        by_site = dict(zip(g, sources.split(widths, dim=-1), strict=True))
        return distance({site: own + (1 - own) * by_site[site] for site, own in g.items()})

    values = {
        "unmasked": distance({site: torch.ones_like(own) for site, own in g.items()}),
        "importances": distance(g),
        "rounded": distance({site: (own > 0.5).to(own.dtype) for site, own in g.items()}),
        "stochastic": distance({site: own + (1 - own) * drawn[site] for site, own in g.items()}),
        "zero": distance({site: torch.zeros_like(own) for site, own in g.items()}),
    }
    start = torch.rand(1, 1, sum(widths), generator=generator)
    return {name: float(value) for name, value in values.items()} | {"adversarial": fresh_pgd(attacked, start).loss}
