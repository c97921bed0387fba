"""Three ways to spend the same importances without knowing which pieces matter.

Two take, at every token and site, the very values that Γ gave (so that counts match at every threshold) and hand them to
other pieces: *random* to alive subcomponents drawn at random; *singular* to the singular directions of the weight, the
largest value to the largest ``|σ_i · u_i · x|``. *Shuffled* leaves pieces and values together and hands them to other tokens
of the batch: how often each piece is important stays, where it is does not. A decomposition that is not far better than these
has found nothing (but singular directions *are* the truth where features are orthogonal).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.components import Components
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.sample import Importances, learned
from tl_vpd.site import ConcatenatedAxis, Site


def random_importances(
    g: Float[Tensor, "batch pos C_total"],
    alive: Bool[Tensor, " C_total"],
    site_axis: ConcatenatedAxis,
    generator: torch.Generator,
) -> Float[Tensor, "batch pos C_total"]:
    """Every token's importances handed to alive subcomponents of the same site at random."""
    chosen = []
    for name, own in site_axis.split_sites(g).items():
        draw = torch.rand(own.shape, generator=generator, device=own.device)
        chosen.append(hand_over(own, draw.masked_fill(~alive[site_axis.slices[name]], -1.0)))
    return torch.cat(chosen, dim=-1)


def shuffled_importances(
    g: Float[Tensor, "*batch C_total"], token_mask: Bool[Tensor, "*batch"] | None, generator: torch.Generator
) -> Float[Tensor, "*batch C_total"]:
    """Every real token's importances handed to another real token of the batch, all of its sites together."""
    real = torch.ones(g.shape[:-1], dtype=torch.bool, device=g.device) if token_mask is None else token_mask
    own = g[real]
    shuffled = g.clone()
    shuffled[real] = own[torch.randperm(len(own), generator=generator, device=g.device)]
    return shuffled


def singular_components(sites: Mapping[str, Site], weights: Mapping[str, Float[Tensor, "_ _"]]) -> Components:
    """The singular value decomposition of every weight as components: ``V = u``, ``U = σ vᵀ``, rank many of them."""
    parts = Components(list(sites.values()), {name: site.rank for name, site in sites.items()})
    with torch.no_grad():
        for name in sites:
            u, sigma, vh = torch.linalg.svd(weights[name].float(), full_matrices=False)
            parts.V[name].copy_(u)
            parts.U[name].copy_(sigma[:, None] * vh)
    return parts.to(next(iter(weights.values())))


def singular_importances(
    g: Float[Tensor, "batch pos C_total"],
    site_axis: ConcatenatedAxis,
    inputs: Mapping[str, Float[Tensor, "batch pos _"]],
    singular: Components,
) -> Float[Tensor, "batch pos rank_total"]:
    """Every token's importances handed to the singular directions that are strongest there."""
    chosen = []
    for name, own in site_axis.split_sites(g).items():
        strength = (inputs[name] @ singular.V[name]).abs() * singular.write_norms(name)
        chosen.append(hand_over(own, strength))
    return torch.cat(chosen, dim=-1)


def hand_over(
    values: Float[Tensor, "batch pos C"], strength: Float[Tensor, "batch pos R"]
) -> Float[Tensor, "batch pos R"]:
    """The largest value to the strongest of R pieces, the next to the next; what is over is dropped, what lacks is 0."""
    n = min(values.shape[-1], strength.shape[-1])
    largest = values.sort(dim=-1, descending=True).values[..., :n]
    order = strength.argsort(dim=-1, descending=True)[..., :n]
    return torch.zeros_like(strength).scatter(-1, order, largest.to(strength.dtype))


def controls_of(
    decomposition: Decomposition,
    weights: Mapping[str, Float[Tensor, "_ _"]],
    alive: Bool[Tensor, " C_total"],
    seed: int,
) -> dict[str, tuple[Decomposition | Components, Importances]]:
    """The controls by name: which pieces, and how they get their importances."""
    site_axis, own = decomposition.site_axis, learned(decomposition)
    singular = singular_components(decomposition.sites, weights)

    def at_random(index: int, inputs: Mapping[str, Tensor], token_mask: Tensor | None) -> Tensor:
        generator = torch.Generator(alive.device).manual_seed(seed * 1_000_003 + index)
        return random_importances(own(index, inputs, token_mask), alive, site_axis, generator)

    def by_strength(index: int, inputs: Mapping[str, Tensor], token_mask: Tensor | None) -> Tensor:
        return singular_importances(own(index, inputs, token_mask), site_axis, inputs, singular)

    def at_other_tokens(index: int, inputs: Mapping[str, Tensor], token_mask: Tensor | None) -> Tensor:
        generator = torch.Generator(alive.device).manual_seed(seed * 1_000_003 + 900_000 + index)
        return shuffled_importances(own(index, inputs, token_mask), token_mask, generator)

    return {
        "random": (decomposition, at_random),
        "singular": (singular, by_strength),
        "shuffled": (decomposition, at_other_tokens),
    }
