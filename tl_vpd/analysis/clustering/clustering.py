"""Components: groups of subcomponents that are important together.

>>> clustering = cluster(vpd, model, tokens)                     # doctest: +SKIP
>>> clustering.top(5)                                            # doctest: +SKIP
>>> with vpd.attach(model) as attached, attached.ablated(clustering[3]):      # doctest: +SKIP
...     model(prompt)

What may be claimed: which subcomponents are important at the same tokens of these texts. How many components there are depends on
α and on the threshold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from tl_vpd.analysis.clustering.merging import MergeHistory
from tl_vpd.analysis.clustering.patterns import is_of
from tl_vpd.analysis.nodes import Node
from tl_vpd.checks import instance, integer, path_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.files.json_files import read_json, write_json
from tl_vpd.frozen import Frozen
from tl_vpd.hooks import CausalImportances
from tl_vpd.site import ConcatenatedAxis, Subcomponent

COMPONENT = "component"
"""``component:7`` is the address of a clustering's component 7."""


@dataclass(frozen=True)
class Component(Sequence[Subcomponent]):
    """A group of subcomponents: the sequence of its members, which goes wherever subcomponents are asked for.

    Attributes:
        number: in the clustering, by how often it is important.
        members: its subcomponents.
        lags: how many tokens before the component each member is important; all 0 unless merged over lags.
        tokens: at how many tokens it is important.
        density: the same as a fraction of all tokens.
    """

    number: int
    members: tuple[Subcomponent, ...]
    lags: tuple[int, ...]
    tokens: int
    density: float

    @property
    def address(self) -> str:
        """``component:7``, as labels and tables name it."""
        return f"{COMPONENT}:{self.number}"

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of its members, each once."""
        return tuple(dict.fromkeys(member.site for member in self.members))

    def nodes(self, pos: int) -> list[Node]:
        """Its members where they are important if the component is important at a position; those before the prompt are left out.

        Args:
            pos: of the component, counted from the start.
        """
        pos = integer("pos", pos, minimum=0)
        pairs = zip(self.members, self.lags, strict=True)
        return [Node(member.site, member.index, pos - lag) for member, lag in pairs if lag <= pos]

    def __getitem__(self, index: int) -> Subcomponent:  # type: ignore[override]
        return self.members[index]

    def __len__(self) -> int:
        return len(self.members)

    def __str__(self) -> str:
        more = f" and {len(self.members) - 3} more" if len(self.members) > 3 else ""
        return f"{self.address}: {', '.join(map(str, self.members[:3]))}{more}"


@dataclass(frozen=True)
class Clustering(Sequence[Component]):
    """Components of a decomposition, the most often important first, and all merges that led to them.

    Attributes:
        history: the merges.
        merges: how many of them these components have been through.
        chosen: the subcomponents that are important anywhere, by their place on ``site_axis``; the others are in no component.
        counts: at how many tokens each of these is important.
        n_tokens: how many tokens were looked at.
        site_axis: of the decomposition.
        settings: ``alpha``, ``threshold``, ``greed``, ``seed``, ``lags``, and the decomposition's ``norms`` by site.
    """

    history: MergeHistory
    merges: int
    chosen: Int[np.ndarray, " n"]
    counts: Int[np.ndarray, " n"]
    n_tokens: int
    site_axis: ConcatenatedAxis
    settings: dict[str, Any]

    @cached_property
    def partition(self) -> Int[np.ndarray, " n"]:
        """The number of each chosen subcomponent's component."""
        group = self.history.partition(self.merges)
        order = np.lexsort((np.arange(len(self._tokens)), -self._tokens))
        return order.argsort()[group]

    @cached_property
    def _tokens(self) -> Int[np.ndarray, " k"]:
        """At how many tokens each group of ``history.partition`` is important."""
        by_first = self.counts.copy()
        for (first, _), tokens in zip(self.history.pairs[: self.merges], self.history.tokens, strict=False):
            by_first[first] = tokens
        group = self.history.partition(self.merges)
        return by_first[np.unique(group, return_index=True)[1]]

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """All components."""
        subcomponents = [self.site_axis.at(int(i)) for i in self.chosen]
        members: list[list[int]] = [[] for _ in self._tokens]
        for place, number in enumerate(self.partition.tolist()):
            members[number].append(place)
        tokens, offsets = np.sort(self._tokens)[::-1].tolist(), self.history.offsets(self.merges).tolist()
        return tuple(
            Component(i, tuple(subcomponents[m] for m in group), tuple(offsets[m] for m in group), n, n / self.n_tokens)
            for i, (group, n) in enumerate(zip(members, tokens, strict=True))
        )

    def __getitem__(self, index: int) -> Component:  # type: ignore[override]
        index = integer("index", index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"Component {index} does not exist: there are 0 to {len(self) - 1}.")
        return self.components[index]

    def __len__(self) -> int:
        return len(self.chosen) - self.merges

    def __iter__(self) -> Iterator[Component]:
        return iter(self.components)

    def __repr__(self) -> str:
        return (
            f"Clustering({len(self)} components of {len(self.chosen)} subcomponents on {self.n_tokens:,} tokens, "
            f"alpha={self.settings['alpha']:g})"
        )

    def of(self, subcomponent: str | Subcomponent) -> Component:
        """The component of a subcomponent.

        Raises:
            KeyError: it is in none: important nowhere, or of a site that is not decomposed.
            TypeError, ValueError: it is not the address of a subcomponent.
        """
        address = Subcomponent.parse(subcomponent)
        for component in self.components:
            if address in component.members:
                return component
        raise KeyError(
            f"{address} is in no component: it is not important at any of the {self.n_tokens:,} tokens, or is not decomposed."
        )

    def at(self, merges: int) -> Clustering:
        """The same history after another number of merges, hence more or fewer components."""
        return replace(self, merges=integer("merges", merges, minimum=0, maximum=len(self.history.pairs)))

    def check(self, decomposition: Decomposition) -> None:
        """Raises ValueError unless these are components of this decomposition."""
        if self.site_axis.counts != decomposition.counts:
            raise ValueError("The clustering is of a decomposition with other sites or numbers of subcomponents.")
        if not is_of(self.settings.get("norms", {}), decomposition):
            raise ValueError("The clustering is of another decomposition, whose subcomponents have other norms.")

    def importances(self, ci: CausalImportances) -> Float[Tensor, "*batch component"]:
        """The largest importance of every component's members, each at its lag before the position.

        Args:
            ci: of this decomposition, ``[batch, pos, C_total]``.

        Raises:
            TypeError: it is something else.
            ValueError: it has another number of subcomponents.
        """
        instance("ci", ci, CausalImportances)
        if ci.concatenated.shape[-1] != self.site_axis.total:
            raise ValueError(
                f"The importances are of {ci.concatenated.shape[-1]} subcomponents and the clustering of "
                f"{self.site_axis.total}: both must be of one decomposition."
            )
        g = ci.concatenated
        values = g[..., torch.as_tensor(self.chosen, device=g.device)]
        offsets = torch.as_tensor(self.history.offsets(self.merges), device=g.device)
        for lag in offsets.unique().tolist():
            if lag:  # at the first positions there is nothing before
                columns = offsets == lag
                values[..., columns] = nn.functional.pad(values[..., columns], (0, 0, lag, 0))[..., :-lag, :]
        number = torch.as_tensor(self.partition, device=g.device).expand(values.shape)
        result = values.new_zeros(*values.shape[:-1], len(self)).scatter_reduce(-1, number, values, "amax")
        return result if ci.token_mask is None else result * ci.token_mask[..., None]

    def to_pandas(self) -> pd.DataFrame:
        """One row per component: ``component, members, sites, tokens, density, lags``, the first member."""
        return pd.DataFrame(
            {
                "component": [c.number for c in self],
                "members": [len(c.members) for c in self],
                "sites": [" ".join(c.sites) for c in self],
                "tokens": [c.tokens for c in self],
                "density": [c.density for c in self],
                "lags": [max(c.lags) for c in self],
                "first": [str(c.members[0]) for c in self],
            }
        )

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k components with the most members."""
        k = integer("k", k, minimum=1)
        return self.to_pandas().sort_values("members", ascending=False, kind="stable").head(k)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a JSON file.

        Raises:
            OSError: it cannot be written.
        """
        path, history = path_of("path", path), self.history
        numbers = {
            "chosen": self.chosen,
            "counts": self.counts,
            **{f.name: getattr(history, f.name) for f in fields(history)},
        }
        stored = {"format": 1, "settings": self.settings, "sites": self.site_axis.counts, "n_tokens": self.n_tokens}
        write_json(path, stored | {"merges": self.merges} | {name: array.tolist() for name, array in numbers.items()})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], decomposition: Decomposition) -> Clustering:
        """Reads what ``save`` wrote.

        Args:
            path: of the file.
            decomposition: whose components these are.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a clustering, is damaged, or is of another decomposition.
        """
        path = path_of("path", path)
        instance("decomposition", decomposition, Decomposition)
        content = read_json(path)
        try:
            if not isinstance(content, dict):
                raise ValueError("it is a list or a number.")
            stored = StoredClustering(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a whole clustering that save() wrote: {error}") from error
        axis = ConcatenatedAxis(stored.sites)
        lists = stored.pairs, stored.tokens, stored.chosen, stored.counts, stored.lags or [0] * len(stored.pairs)
        pairs, tokens, chosen, counts, lags = (np.array(values, dtype=np.int64) for values in lists)
        lengths = np.array(stored.description_length), np.array(stored.best_change)
        history = MergeHistory(pairs.reshape(-1, 2), *lengths, tokens, lags)
        clustering = cls(history, stored.merges, chosen, counts, stored.n_tokens, axis, stored.settings)
        clustering.check(decomposition)
        return clustering


class StoredClustering(Frozen):
    """What a file holds; see ``Clustering`` and ``MergeHistory``."""

    format: Literal[1]
    settings: dict[str, Any]
    sites: dict[str, int]
    n_tokens: int = Field(ge=1)
    merges: int = Field(ge=0)
    chosen: tuple[int, ...] = Field(min_length=1)
    counts: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    description_length: tuple[float, ...]
    best_change: tuple[float, ...]
    lags: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _fits(self) -> StoredClustering:
        n, total = len(self.chosen), sum(self.sites.values())
        of_rounds = self.pairs, self.tokens, self.best_change, *([] if self.lags is None else [self.lags])
        right = len(self.counts) == n == len(self.description_length) and {len(x) for x in of_rounds} == {n - 1}
        if not right or self.merges >= n:
            raise ValueError("its merges and subcomponents do not fit together.")
        if list(self.chosen) != sorted(set(self.chosen)) or self.chosen[0] < 0 or self.chosen[-1] >= total:
            raise ValueError("its subcomponents do not exist, or stand there twice.")
        merged = [second for _, second in self.pairs]
        if sorted(merged) != list(range(1, n)) or any(not 0 <= first < second for first, second in self.pairs):
            raise ValueError("its merges do not end in one group.")
        return self
