"""What a label is made from: windows of text and token tables of one subcomponent or component."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from tl_vpd.analysis.clustering.clustering import COMPONENT
from tl_vpd.analysis.harvest import Harvest, Window
from tl_vpd.analysis.harvest.tokens import token_table
from tl_vpd.analysis.labels.firings import Firings
from tl_vpd.analysis.labels.trials import TrialMaker
from tl_vpd.analysis.nodes import several
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent

MANY = 1_000_000
"""Rows of a token table before the best are chosen."""


@dataclass(frozen=True)
class Evidence(Printed):
    """What is known of one address.

    Attributes:
        address: of a subcomponent or component.
        density: the fraction of tokens at which it fires.
        windows: around firings, the most important first.
        inputs: all tokens at which it fires twice or more, as ``SubcomponentHarvest.input_tokens`` gives them.
        outputs: the same of tokens that follow.
        threshold: it fires where its importance exceeds this.
    """

    address: str
    density: float
    windows: tuple[Window, ...]
    inputs: pd.DataFrame
    outputs: pd.DataFrame
    threshold: float

    @property
    def signed(self) -> bool:
        """Whether the sign of its activation means something: that of a component is another member's from token to token."""
        return not self.address.startswith(f"{COMPONENT}:")


def evidence_of(
    source: Harvest | Firings,
    subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None,
    *,
    windows: int,
    radius: int,
    seed: int,
) -> list[Evidence]:
    """The evidence of addresses (None: all that fire at all).

    Args:
        source: a harvest, of which the windows and samples are shown, or firings.
        subcomponents: the addresses.
        windows: how many at most.
        radius: tokens on each side of a firing, of firings.
        seed: of the windows of firings.

    Raises:
        KeyError, IndexError: an address is not there.
        ValueError: one that is named never fires.
    """
    if isinstance(source, Harvest):
        all_addresses = [str(source.site_axis.at(i)) for i in source.chosen.tolist()]
        names = all_addresses if subcomponents is None else _unique(subcomponents)
        made = [_of_harvest(source, name, windows) for name in names]
    else:
        maker = TrialMaker(source, radius=radius, per_test=windows, seed=seed)
        made = [_of_firings(maker, i, windows) for i in source.numbers(subcomponents)]
    silent = [evidence.address for evidence in made if not evidence.windows]
    if silent and subcomponents is not None:
        raise ValueError(
            f"{silent[0]} fires nowhere (its importance exceeds {made[0].threshold:g} at no token): leave it out."
        )
    return [evidence for evidence in made if evidence.windows]


def _unique(subcomponents: str | Subcomponent | Sequence[str | Subcomponent]) -> list[str]:
    return list(dict.fromkeys(str(Subcomponent.parse(a)) for a in several("subcomponents", subcomponents)))


def _of_harvest(harvest: Harvest, address: str, n: int) -> Evidence:
    """Half of the windows are those of the largest importance, where there are samples."""
    record = harvest[address]
    best = record.windows[: n - min(len(record.samples), n // 2)]
    at = {(w.row, w.pos) for w in best}
    shown = [*best, *(w for w in record.samples if (w.row, w.pos) not in at)][:n]
    inputs, outputs = (table(MANY, by="recall") for table in (record.input_tokens, record.output_tokens))
    return Evidence(address, record.firings / harvest.n, tuple(shown), inputs, outputs, harvest.config.threshold)


def _of_firings(maker: TrialMaker, i: int, n: int) -> Evidence:
    """Windows around random firings, none of which is in another one's window."""
    firings = maker.firings
    fires, where = maker.fires(i), firings.of(i)
    generator = np.random.default_rng([i, maker.seed % (1 << 64)])
    dense = np.zeros((2, fires.size), dtype=np.float32)
    dense[0, firings.at[where]], dense[1, firings.at[where]] = firings.importances[where], firings.activations[where]
    centres = maker.spaced(i, generator)[:n]
    windows = [_window(maker, dense, c) for c in sorted(centres, key=lambda c: -dense[0, c])]
    tokens, real = torch.from_numpy(firings.tokens), torch.from_numpy(firings.real)
    on = torch.from_numpy(fires).view(tokens.shape)
    followed = real[:, :-1] & real[:, 1:]
    inputs, outputs = (
        token_table(t, f, firings.names, k=MANY, by="recall", min_count=2)
        for t, f in ((tokens[real], on[real]), (tokens[:, 1:][followed], on[:, :-1][followed]))
    )
    density = float(firings.density[i])
    return Evidence(firings.addresses[i], density, tuple(windows), inputs, outputs, firings.threshold)


def _window(maker: TrialMaker, dense: np.ndarray, centre: int) -> Window:
    start, stop = maker.span(centre)
    row, pos = divmod(centre, maker.n_pos)
    ids = tuple(maker.firings.tokens.reshape(-1)[start:stop].tolist())
    g, a = torch.from_numpy(dense[:, start:stop])
    return Window(row, pos, start - row * maker.n_pos, ids, tuple(maker.firings.names[t] for t in ids), g, a)
