"""Which subcomponents to look at: a few, spread over sites and firing densities."""

from __future__ import annotations

from collections.abc import Mapping

from tl_vpd.analysis.harvest.result import Harvest
from tl_vpd.checks import instance, integer, number
from tl_vpd.site import Subcomponent


def pick(harvest: Harvest, n: int = 12, *, min_firings: int = 10, max_density: float = 0.5) -> list[Subcomponent]:
    """Up to ``n`` subcomponents to look at, spread over sites and firing densities; the same ones for the same harvest.

    Dead ones (fewer than ``min_firings`` firings) and always-on ones (density above ``max_density``) are left out.
    Each site's others are ordered by density; near each of as many evenly spaced ranks as the site has picks, the one with the
    largest mean importance where it is above 0 is picked. This is not a random sample: it measures nothing of the whole.

    Args:
        harvest: of the subcomponents to pick from.
        n: how many.
        min_firings: firings that a subcomponent needs.
        max_density: the largest density.

    Raises:
        ValueError: a number is out of its range, or no subcomponent qualifies.
        TypeError: an argument is of another type.
    """
    instance("harvest", harvest, Harvest)
    n, min_firings = integer("n", n, minimum=1), integer("min_firings", min_firings, minimum=1)
    max_density = number("max_density", max_density, minimum=0, maximum=1)
    table = harvest.to_pandas()
    table = table[(table["firings"] >= min_firings) & (table["density"] <= max_density)]
    if not len(table):
        raise ValueError(
            f"None of {len(harvest)} subcomponents fires {min_firings} times or more and on at most {max_density:.0%} "
            "of the tokens: harvest more tokens, or loosen min_firings or max_density."
        )
    sites = {site: rows.sort_values(["density", "subcomponent"]) for site, rows in table.groupby("site", sort=False)}
    counts = picks_per_site({site: len(rows) for site, rows in sites.items()}, n)
    picked: list[Subcomponent] = []
    for place, (site, count) in enumerate(counts.items()):
        rows = sites[site].assign(strength=lambda d: d["mean_importance"] / d["density"])
        # With one pick per site, the golden ratio moves the rank in the order of densities from site to site.
        offset = (place * 0.618034 + 0.5) % 1
        names: set[str] = set()
        for j in range(count):
            centre = (j + offset) / count * len(rows)
            half = max(1.0, len(rows) / (4 * count))
            near = rows.iloc[max(0, int(centre - half)) : int(centre + half) + 1]
            near = near[~near["subcomponent"].isin(names)]
            near = near if len(near) else rows[~rows["subcomponent"].isin(names)]
            names.add(near.loc[near["strength"].idxmax(), "subcomponent"])
        picked += [Subcomponent.parse(name) for name in rows["subcomponent"] if name in names]
    return picked


def picks_per_site(available: Mapping[str, int], n: int) -> dict[str, int]:
    """How many of ``n`` picks each site gets: evenly, none more than it has; if fewer than sites, spread over them."""
    names = list(available)
    if n < len(names):
        names = [names[(2 * i + 1) * len(names) // (2 * n)] for i in range(n)]
    counts = dict.fromkeys(names, 0)
    left = min(n, sum(available[name] for name in names))
    while left:
        for name in names:
            if left and counts[name] < available[name]:
                counts[name] += 1
                left -= 1
    return counts
