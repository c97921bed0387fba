"""Which subcomponents to look at: a few, spread over sites and firing densities."""

from __future__ import annotations

from collections.abc import Mapping

from tl_vpd.analysis.records import Harvest
from tl_vpd.site import Subcomponent


def pick(harvest: Harvest, n: int = 12, *, min_firings: int = 10, max_density: float = 0.5) -> list[Subcomponent]:
    """Up to ``n`` subcomponents to look at, spread over sites and firing densities; the same ones for the same harvest.

    Dead ones (fewer than ``min_firings`` firings) and always-on ones (density above ``max_density``) are passed over.
    Each site's others are ordered by density; around as many evenly spaced places of this order as the site has picks,
    the one with the largest mean importance where it is above 0 is taken. Not a random sample: no measure of the whole.

    Raises:
        ValueError: ``n`` is below 1, or no subcomponent qualifies.
    """
    if n < 1:
        raise ValueError(f"n={n}: at least one subcomponent has to be picked.")
    table = harvest.to_pandas()
    table = table[(table["firings"] >= min_firings) & (table["density"] <= max_density)]
    if not len(table):
        raise ValueError(
            f"None of {len(harvest)} subcomponents fires {min_firings} times or more and on at most {max_density:.0%} "
            "of the tokens: harvest more tokens, or loosen min_firings or max_density."
        )
    sites = {site: own.sort_values(["density", "subcomponent"]) for site, own in table.groupby("site", sort=False)}
    shares = _shares({site: len(own) for site, own in sites.items()}, n)
    picked: list[Subcomponent] = []
    for number, (site, share) in enumerate(shares.items()):
        own = sites[site].assign(strength=lambda d: d["mean_importance"] / d["density"])
        # With one pick a site, the golden ratio moves the place in the order of densities from site to site.
        offset = (number * 0.618034 + 0.5) % 1
        taken: set[str] = set()
        for j in range(share):
            centre = (j + offset) / share * len(own)
            half = max(1.0, len(own) / (4 * share))
            near = own.iloc[max(0, int(centre - half)) : int(centre + half) + 1]
            near = near[~near["subcomponent"].isin(taken)]
            near = near if len(near) else own[~own["subcomponent"].isin(taken)]
            taken.add(near.loc[near["strength"].idxmax(), "subcomponent"])
        picked += [Subcomponent.parse(name) for name in own["subcomponent"] if name in taken]
    return picked


def _shares(available: Mapping[str, int], n: int) -> dict[str, int]:
    """How many of ``n`` picks each site gets: evenly, none more than it has; if fewer than sites, spread over them."""
    names = list(available)
    if n < len(names):
        names = [names[(2 * i + 1) * len(names) // (2 * n)] for i in range(n)]
    shares = dict.fromkeys(names, 0)
    left = min(n, sum(available[name] for name in names))
    while left:
        for name in names:
            if left and shares[name] < available[name]:
                shares[name] += 1
                left -= 1
    return shares
