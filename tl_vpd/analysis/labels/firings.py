"""At which tokens subcomponents or components fire, over rows of text: what labels are made from and judged on.

A subcomponent *fires* at a token where its causal importance g exceeds a threshold; a component where one of its
members does, its lag before the token (``Clustering.importances``).

    >>> fires = firings(vpd, model, tokens)                              # doctest: +SKIP
    >>> fires.components(clustering)                                     # doctest: +SKIP

Memory is that of one batch's importances and of 16 bytes per firing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.analysis.clustering import Clustering
from tl_vpd.analysis.harvest.batch import Batch, Chosen
from tl_vpd.analysis.harvest.rows import check_are_tokens
from tl_vpd.analysis.harvest.run import chosen_columns
from tl_vpd.analysis.harvest.tokens import token_texts
from tl_vpd.analysis.nodes import several
from tl_vpd.checks import check_fields, config_of, instance, seed_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent, nearest


@dataclass(frozen=True)
class FiringsConfig:
    """When a subcomponent fires, and how many rows run at once.

    Attributes:
        threshold: it fires where its importance exceeds this.
        batch_size: rows run at once, which bounds memory.

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of range.
    """

    threshold: float = 0.1
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_fields(self, batch_size=1)


@dataclass(frozen=True)
class Firings(Printed):
    """The tokens at which each subcomponent or component fires, on the CPU.

    Attributes:
        addresses: of the subcomponents (``blocks.1.attn.W_Q:316``) or components (``component:7``).
        ends: where each one's firings end in the next three; the first entry is 0.
        at: the token of each firing, ascending for each address, as ``row · n_pos + pos``.
        importances: g there.
        activations: ``(x @ V[:, c]) ‖U[c]‖`` there; of a component, its most important member's.
        tokens: all rows.
        real: False at padding.
        names: the text of every token that occurs.
        threshold: above which an importance counts as firing.
    """

    addresses: tuple[str, ...]
    ends: Int[np.ndarray, " addresses_plus_1"]
    at: Int[np.ndarray, " firing"]
    importances: Float[np.ndarray, " firing"]
    activations: Float[np.ndarray, " firing"]
    tokens: Int[np.ndarray, "n pos"]
    real: Bool[np.ndarray, "n pos"]
    names: Mapping[int, str]
    threshold: float

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {address: i for i, address in enumerate(self.addresses)}

    @property
    def counts(self) -> Int[np.ndarray, " address"]:
        """How often each fires."""
        return np.diff(self.ends)

    @property
    def density(self) -> Float[np.ndarray, " address"]:
        """The fraction of real tokens at which each fires."""
        return self.counts / max(int(self.real.sum()), 1)

    def __len__(self) -> int:
        return len(self.addresses)

    def number(self, address: str | Subcomponent) -> int:
        """The place of an address; raises KeyError for one that is not here."""
        text = str(Subcomponent.parse(address))
        if text not in self._numbers:
            raise KeyError(f"{text} is not among the {len(self)} of these firings{nearest(text, self.addresses)}.")
        return self._numbers[text]

    def of(self, i: int) -> slice:
        """Where the i-th one's firings lie in ``at``, ``importances`` and ``activations``."""
        return slice(int(self.ends[i]), int(self.ends[i + 1]))

    def numbers(self, subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None) -> list[int]:
        """The places of addresses, each once (None: all)."""
        if subcomponents is None:
            return list(range(len(self)))
        return list(dict.fromkeys(self.number(a) for a in several("subcomponents", subcomponents)))

    def in_rows(self, rows: Int[np.ndarray, " m"]) -> Firings:
        """The firings in these rows alone, in which there is nothing of the others."""
        place = np.full(len(self.tokens), -1)
        place[rows] = np.arange(len(rows))
        row, pos = np.divmod(self.at, self.tokens.shape[1])
        inside = place[row] >= 0
        ends = np.concatenate([[0], inside.cumsum()])[self.ends]
        at = place[row[inside]] * self.tokens.shape[1] + pos[inside]
        owner = np.repeat(np.arange(len(self)), np.diff(ends))
        order = np.lexsort((at, owner))
        return replace(
            self,
            ends=ends,
            at=at[order],
            importances=self.importances[inside][order],
            activations=self.activations[inside][order],
            tokens=self.tokens[rows],
            real=self.real[rows],
        )

    def shuffled(self, seed: int = 0) -> Firings:
        """The null: each fires as often, at random tokens, independently of the others."""
        generator = np.random.default_rng(seed_of(seed) % (1 << 64))
        real = self.real.reshape(-1).nonzero()[0]
        at = [np.sort(generator.choice(real, int(n), replace=False)) for n in self.counts]
        return replace(self, at=np.concatenate([np.zeros(0, dtype=np.int64), *at]))

    def components(self, clustering: Clustering) -> Firings:
        """The firings of a clustering's components, with the addresses ``component:0``, ``component:1``, …

        A member's firing counts at the token that is its lag later, unless the row ends before.

        Args:
            clustering: of the same decomposition.

        Raises:
            KeyError: a member is not here.
            TypeError: it is not a Clustering.
        """
        instance("clustering", clustering, Clustering)
        merged = []
        row_of, n_pos, real = self.at // self.tokens.shape[1], self.tokens.shape[1], self.real.reshape(-1)
        for component in clustering:
            moved = []
            for member, lag in zip(component.members, component.lags, strict=True):
                p = self.of(self.number(member))
                at = self.at[p] + lag
                inside = (at // n_pos == row_of[p]) & real[np.minimum(at, len(real) - 1)]
                moved.append((at[inside], self.importances[p][inside], self.activations[p][inside]))
            at, g, a = (np.concatenate(values) for values in zip(*moved, strict=True))
            order = np.lexsort((-g, at))
            order = order[np.unique(at[order], return_index=True)[1]]
            merged.append((at[order], g[order], a[order]))
        names = tuple(component.address for component in clustering)
        return joined(replace(self, addresses=names), merged)

    def to_pandas(self) -> pd.DataFrame:
        """One row per address: subcomponent, firings, density."""
        return pd.DataFrame({"subcomponent": self.addresses, "firings": self.counts, "density": self.density})


def joined(frame: Firings, firings: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Firings:
    """Firings on the same rows, from (tokens, importances, activations) of every address."""
    parts = list(firings)
    at, g, a = (np.concatenate([p[i] for p in parts] or [np.zeros(0)]) for i in range(3))
    ends = np.cumsum([0, *(len(p[0]) for p in parts)])
    return replace(frame, ends=ends, at=at.astype(np.int64), importances=g, activations=a)


@torch.no_grad()
def firings(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None = None,
    *,
    config: FiringsConfig | None = None,
    attention_mask: Int[Tensor, "n pos"] | None = None,
) -> Firings:
    """Runs Γ over rows of tokens once and notes where subcomponents fire.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: strings, or rows of tokens ``[n, pos]``; padding is left out.
        subcomponents: which ones (None: all).
        config: threshold and memory (None: the defaults).
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Raises:
        ValueError: no subcomponent is named, the prompts are not this model's or not tokens, or it has other weights.
        KeyError: a site is not decomposed.
        IndexError: there is no such subcomponent.
        TypeError: an argument is of another type.
    """
    config = config_of(FiringsConfig, config)
    instance("decomposition", decomposition, Decomposition)
    columns = chosen_columns(decomposition, subcomponents)
    with MaskedModel(decomposition, model) as masked_model:
        tokens = masked_model.adapter.tokens(prompts)
        check_are_tokens(tokens, "A table of firings")
        mask = masked_model.adapter.padding(tokens, attention_mask)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        parts, chosen = [], Chosen(decomposition, columns.to(tokens.device))
        for start in range(0, len(tokens), config.batch_size):
            rows = slice(start, start + config.batch_size)
            batch_mask = None if mask is None else mask[rows]
            inputs = masked_model.inputs(tokens[rows], batch_mask)
            g = decomposition.importances(inputs, batch_mask)
            firing = Batch(chosen, tokens[rows], real[rows], inputs, g).active().above(config.threshold)
            batch = firing.c, firing.token + start * tokens.shape[1], firing.g, firing.a
            parts.append([t.cpu().float().numpy() if t.is_floating_point() else t.cpu().numpy() for t in batch])
        names = token_texts(getattr(masked_model.adapter.model, "tokenizer", None), tokens)
    owner, at, g_all, a_all = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((at, owner))
    addresses = tuple(str(decomposition.site_axis.at(int(c))) for c in columns)
    ends = np.concatenate([[0], np.bincount(owner, minlength=len(addresses)).cumsum()])
    ordered = at[order], g_all[order], a_all[order]
    return Firings(addresses, ends, *ordered, tokens.cpu().numpy(), real.cpu().numpy(), names, config.threshold)


def by_site(decomposition: Decomposition, columns: Int[Tensor, " C"]) -> dict[str, Int[Tensor, " c"]]:
    """The indices within each site of some columns."""
    slices = decomposition.site_axis.slices
    inside = {name: columns[(columns >= s.start) & (columns < s.stop)] - s.start for name, s in slices.items()}
    return {name: indices for name, indices in inside.items() if len(indices)}
