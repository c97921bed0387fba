"""Four ways to spend the same importances without knowing which pieces matter.

Three take, at every token and site, the values that Γ gave (so that counts match at every threshold) and give them to other
pieces: *random* to random alive subcomponents; *untrained* to the alive subcomponents that an untrained Γ of the same shape
ranks highest there (its values themselves are nearly all 0 or nearly all 1, as its output bias has it); *singular* to the
singular directions of the weight, the largest value to the largest ``|σ_i · u_i · x|``. *Shuffled* leaves pieces and values
together and gives them to another token, of another row: how often each piece is important stays the same, where it is does
not. A decomposition that is not far better than these says nothing about the model (but singular directions *are* the truth
where features are orthogonal).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.components import Components
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.batch import Rows
from tl_vpd.evaluation.nulls import untrained
from tl_vpd.evaluation.sample import Importances, Sample
from tl_vpd.site import ConcatenatedAxis, Site


def random_importances(
    g: Float[Tensor, "*batch C_total"],
    alive: Bool[Tensor, " C_total"],
    site_axis: ConcatenatedAxis,
    order: Float[Tensor, "*batch C_total"],
) -> Float[Tensor, "*batch C_total"]:
    """Every token's importances at alive subcomponents of the same site, the largest at that with the largest ``order``."""
    order = order.masked_fill(~alive, -torch.inf)
    by_site = site_axis.split_sites(g)
    return torch.cat(
        [reassigned(values, order[..., site_axis.slices[name]]) for name, values in by_site.items()], dim=-1
    )


def shuffled_importances(
    g: Float[Tensor, "row *pos C_total"],
    source: Bool[Tensor, "row *pos"],
    target: Bool[Tensor, "row *pos"],
    order: Float[Tensor, "row *pos"],
) -> Float[Tensor, "row *pos C_total"]:
    """Importances of rows at other tokens, all sites together: the token with the smallest ``order`` first.

    Args:
        g: importances.
        source: their real tokens.
        target: which tokens get them; from the first again where there are more of these.
        order: of the source's tokens.
    """
    result = torch.zeros_like(g).reshape(len(g), -1, g.shape[-1])
    for i, (values, real, wanted, rank) in enumerate(zip(g, source, target, order, strict=True)):
        tokens, places = real.reshape(-1).nonzero()[:, 0], wanted.reshape(-1).nonzero()[:, 0]
        tokens = tokens[rank.reshape(-1)[tokens].argsort()]
        repeated = tokens[torch.arange(len(places), device=g.device) % len(tokens)]
        result[i, places] = values.reshape(-1, g.shape[-1])[repeated]
    return result.reshape(g.shape)


def singular_components(sites: Mapping[str, Site], weights: Mapping[str, Float[Tensor, "_ _"]]) -> Components:
    """The singular value decomposition of every weight as components: ``V = u``, ``U = σ vᵀ``, as many as its rank."""
    counts = {name: site.rank for name, site in sites.items()}
    components = Components(list(sites.values()), counts, generator=torch.Generator())
    with torch.no_grad():
        for name in sites:
            u, sigma, vh = torch.linalg.svd(weights[name].float(), full_matrices=False)
            components.V[name].copy_(u)
            components.U[name].copy_(sigma[:, None] * vh)
    return components.to(next(iter(weights.values())))


def singular_importances(
    g: Float[Tensor, "*batch C_total"],
    site_axis: ConcatenatedAxis,
    inputs: Mapping[str, Float[Tensor, "*batch _"]],
    singular: Components,
) -> Float[Tensor, "*batch rank_total"]:
    """Every token's importances at the singular directions that are strongest there."""
    by_site = []
    for name, values in site_axis.split_sites(g).items():
        strength = (inputs[name] @ singular.V[name]).abs() * singular.write_norms(name)
        by_site.append(reassigned(values, strength))
    return torch.cat(by_site, dim=-1)


def reassigned(values: Float[Tensor, "*batch C"], strength: Float[Tensor, "*batch R"]) -> Float[Tensor, "*batch R"]:
    """The largest value at the strongest of R pieces, the next at the next; surplus values are dropped, missing ones are 0."""
    n = min(values.shape[-1], strength.shape[-1])
    largest = values.sort(dim=-1, descending=True).values[..., :n]
    order = strength.argsort(dim=-1, descending=True)[..., :n]
    return torch.zeros_like(strength).scatter(-1, order, largest.to(strength.dtype))


def random_control(importances: Importances, alive: Bool[Tensor, " C_total"]) -> Importances:
    """Importances at random alive subcomponents."""

    def control(sample: Sample, rows: Rows, inputs: Mapping[str, Tensor]) -> Tensor:
        g = importances(sample, rows, inputs)
        order = sample.uniform("random control", rows, g.shape[1:])
        return random_importances(g, alive, sample.site_axis, order)

    return control


def untrained_control(
    decomposition: Decomposition, importances: Importances, alive: Bool[Tensor, " C_total"], *, seed: int
) -> Importances:
    """Importances at the alive subcomponents that an untrained Γ ranks highest at each token.

    Args:
        decomposition: whose Γ's shape it has.
        importances: whose values it gets.
        alive: which subcomponents may get them.
        seed: of the untrained Γ.
    """
    null = untrained(decomposition, seed=seed)

    def control(sample: Sample, rows: Rows, inputs: Mapping[str, Tensor]) -> Tensor:
        g = importances(sample, rows, inputs)
        return random_importances(g, alive, sample.site_axis, null.pre_sigmoid(inputs, rows.token_mask))

    return control


def shuffled_control(importances: Importances, every: Rows) -> Importances:
    """Importances at random tokens of other rows.

    Args:
        importances: that are moved.
        every: all rows, of which each gets another's importances (its own at other tokens where it is the only row).
    """

    def control(sample: Sample, rows: Rows, inputs: Mapping[str, Tensor]) -> Tensor:
        device = sample.masked_model.adapter.device
        order = torch.randperm(len(every), generator=sample.generator(900_000), device=device).tolist()
        partner = dict(zip(order, [*order[1:], *order[:1]], strict=True))  # a permutation could leave rows in place
        at = {number: i for i, number in enumerate(every.numbers)}
        others = every.take([partner[at[number]] for number in rows.numbers])
        g = importances(sample, others, sample.clean(others)[1])
        everywhere = torch.ones_like(g[..., 0], dtype=torch.bool)
        source, target = (everywhere if r.token_mask is None else r.token_mask for r in (others, rows))
        return shuffled_importances(g, source, target, sample.uniform("shuffled control", rows, g.shape[1:-1]))

    return control


def controls_of(
    decomposition: Decomposition, sample: Sample, weights: Mapping[str, Float[Tensor, "_ _"]]
) -> dict[str, tuple[Decomposition | Components, Importances]]:
    """The controls by name: their pieces, and how these get their importances.

    Args:
        decomposition: that is measured.
        sample: of the decomposition.
        weights: of the model, by site.
    """
    importances, site_axis, alive = sample.importances, decomposition.site_axis, sample.statistics.alive
    singular = singular_components(decomposition.sites, weights)

    def by_strength(control: Sample, rows: Rows, inputs: Mapping[str, Tensor]) -> Tensor:
        every = all(
            name in inputs for name in decomposition.gamma_inputs
        )  # singular pieces alone collect sites' inputs
        g = importances(control, rows, inputs if every else sample.clean(rows)[1])
        return singular_importances(g, site_axis, inputs, singular)

    return {
        "random": (decomposition, random_control(importances, alive)),
        "singular": (singular, by_strength),
        "shuffled": (decomposition, shuffled_control(importances, sample.rows)),
        "untrained": (decomposition, untrained_control(decomposition, importances, alive, seed=sample.seed)),
    }
