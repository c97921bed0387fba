"""Harvest: where each subcomponent fires on a set of token rows, as statistics, windows of text and token tables.

A subcomponent *fires* at a token where its causal importance g exceeds a threshold. With ``N`` real tokens, ``n_f``
firings, ``n_t`` occurrences of token t and ``n_ft`` firings on it:

    recall(t) = n_ft / n_f                  the share of its firings that falls on t
    PMI(t)    = ln(n_ft N / (n_f n_t))      in nats: how much more often t meets a firing than by chance

*Input tokens* are those it fires at; *output tokens* those that follow in the text. The activation shown is
``(x @ V[:, c]) ‖U[c]‖``.

    >>> found = harvest(vpd, model, tokens)                     # doctest: +SKIP
    >>> found["blocks.1.mlp.W_in:12"].input_tokens(by="pmi")    # doctest: +SKIP
    >>> pick(found, 12)                                         # doctest: +SKIP

Memory holds one batch of importances, and a subcomponent's few windows and counts; never the importances of all rows.
Left out: the tokens the *model* predicts (output tokens are the text's), and correlations between subcomponents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.decomposition import Decomposition
from tl_vpd.hooks.importances import zero_padding
from tl_vpd.hooks.tapped import TappedModel
from tl_vpd.importance import lower_leaky
from tl_vpd.sites import Packing, Subcomponent, nearest

By = Literal["pmi", "recall"]


def pmi(
    together: Float[Tensor, " token"], firings: int, occurrences: Float[Tensor, " token"], n: int
) -> Float[Tensor, " token"]:
    """``ln(together · n / (firings · occurrences))`` in nats; −inf where they never meet."""
    return (together * n / (firings * occurrences)).log()


def recall(together: Float[Tensor, " token"], firings: int) -> Float[Tensor, " token"]:
    """The share of the firings that falls on each token."""
    return together / firings


def cut(peak: int, radius: int, real: Bool[Tensor, " pos"]) -> tuple[int, int]:
    """Start and stop of the run of real tokens around ``peak``, at most ``radius`` to each side."""
    start, stop = peak, peak + 1
    while start > max(0, peak - radius) and bool(real[start - 1]):
        start -= 1
    while stop < min(len(real), peak + radius + 1) and bool(real[stop]):
        stop += 1
    return start, stop


def peaks(
    g: Float[Tensor, "row pos C"], a: Float[Tensor, "row pos C"]
) -> tuple[Float[Tensor, "row C"], Int[Tensor, "row C"]]:
    """In every row the token of largest importance, as its score and position.

    Many importances are exactly 1: among equal ones the largest ``|activation|`` wins, in a row as between rows, which
    is why the score (float64) is ``g + 1e-6 |a| / (1 + |a|)``.
    """
    best = g.amax(1)
    size, at = torch.where(g == best[:, None], a.abs(), -1).max(1)
    size = size.double()
    return best.double() + 1e-6 * size / (1 + size), at


@dataclass(frozen=True)
class Window:
    """A stretch of one row around its token of largest importance, which lies at ``pos`` of the row, ``peak`` here."""

    row: int
    pos: int
    start: int
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    importances: Float[Tensor, " width"]
    activations: Float[Tensor, " width"]

    @property
    def peak(self) -> int:
        """The position within the window of the token it was cut around."""
        return self.pos - self.start

    def to_pandas(self) -> pd.DataFrame:
        """One row a token: row, pos, token_id, token, importance, activation."""
        return pd.DataFrame(
            {
                "row": self.row,
                "pos": range(self.start, self.start + len(self.tokens)),
                "token_id": self.token_ids,
                "token": self.tokens,
                "importance": self.importances.tolist(),
                "activation": self.activations.tolist(),
            }
        )


@dataclass(frozen=True)
class TokenCounts:
    """At which tokens subcomponents fired: sparse counts sorted by subcomponent, with the totals they are compared to.

    ``n`` positions were counted; ``occurrences`` are the tokens' among these, ``firings`` the subcomponents'.
    """

    index: Int[Tensor, " pair"]
    token: Int[Tensor, " pair"]
    count: Int[Tensor, " pair"]
    occurrences: Int[Tensor, " vocab"]
    firings: Int[Tensor, " C"]
    n: int

    def table(self, i: int, names: Mapping[int, str], *, k: int, by: str, min_count: int) -> pd.DataFrame:
        """The ``k`` best tokens of the i-th subcomponent by PMI or recall."""
        if by not in ("pmi", "recall"):
            raise ValueError(f"Tokens are ranked by 'pmi' or 'recall', not by {by!r}.")
        low, high = torch.searchsorted(self.index, torch.tensor([i, i + 1], device=self.index.device)).tolist()
        token, count = self.token[low:high], self.count[low:high]
        occurrences, firings = self.occurrences[token], int(self.firings[i])
        table = pd.DataFrame(
            {
                "token_id": token.tolist(),
                "token": [names[t] for t in token.tolist()],
                "count": count.tolist(),
                "occurrences": occurrences.tolist(),
                "recall": recall(count.double(), firings).tolist(),
                "pmi": pmi(count.double(), firings, occurrences.double(), self.n).tolist(),
            }
        )
        ties = ["recall" if by == "pmi" else "pmi", "token_id"]
        order = table[table["count"] >= min_count].sort_values([by, *ties], ascending=[False, False, True])
        return order.head(k).reset_index(drop=True)


@dataclass(frozen=True)
class SubcomponentHarvest:
    """What was found of one subcomponent.

    ``density`` is the share of real tokens with g > 0, ``firings`` the number with g > threshold, ``mean_activation``
    the mean signed activation over firings (NaN without any), ``norm`` is ``‖V[:, c]‖ ‖U[c]‖``.
    """

    subcomponent: Subcomponent
    mean_importance: float
    density: float
    firings: int
    mean_activation: float
    norm: float
    windows: tuple[Window, ...]
    _inputs: TokenCounts
    _outputs: TokenCounts
    _i: int
    _names: Mapping[int, str]

    def input_tokens(self, k: int = 10, *, by: By = "pmi", min_count: int = 2) -> pd.DataFrame:
        """Tokens it fires at, ``min_count`` times or more: token_id, token, count, occurrences, recall, pmi."""
        return self._inputs.table(self._i, self._names, k=k, by=by, min_count=min_count)

    def output_tokens(self, k: int = 10, *, by: By = "pmi", min_count: int = 2) -> pd.DataFrame:
        """Tokens that follow where it fires, as ``input_tokens``. A row's last token, followed by none, is left out."""
        return self._outputs.table(self._i, self._names, k=k, by=by, min_count=min_count)

    def to_pandas(self) -> pd.DataFrame:
        """All windows, one row a token; see ``Window.to_pandas`` (``window`` numbers them)."""
        parts = [w.to_pandas().assign(window=i) for i, w in enumerate(self.windows)]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


@dataclass(frozen=True)
class Harvest:
    """Statistics, windows and token counts of the harvested subcomponents ``C``, on the model's device.

    ``chosen`` holds their packed positions, ascending; ``rows`` is −1 where a subcomponent has fewer windows.
    """

    packing: Packing
    chosen: Int[Tensor, " C"]
    mean_importance: Float[Tensor, " C"]
    density: Float[Tensor, " C"]
    firings: Int[Tensor, " C"]
    mean_activation: Float[Tensor, " C"]
    norm: Float[Tensor, " C"]
    rows: Int[Tensor, "C window"]
    positions: Int[Tensor, "C window"]
    importances: Float[Tensor, "C window width"]
    activations: Float[Tensor, "C window width"]
    inputs: TokenCounts
    outputs: TokenCounts
    tokens: Int[Tensor, "n pos"]
    real: Bool[Tensor, "n pos"]
    names: Mapping[int, str]
    threshold: float
    radius: int

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, address: str | Subcomponent) -> SubcomponentHarvest:
        """One subcomponent; raises KeyError or IndexError if it does not exist, or KeyError if it was not harvested."""
        i = self._index(address)
        return SubcomponentHarvest(
            subcomponent=self.packing.at(int(self.chosen[i])),
            mean_importance=float(self.mean_importance[i]),
            density=float(self.density[i]),
            firings=int(self.firings[i]),
            mean_activation=float(self.mean_activation[i]),
            norm=float(self.norm[i]),
            windows=tuple(self._window(i, j) for j in range(self.rows.shape[1]) if self.rows[i, j] >= 0),
            _inputs=self.inputs,
            _outputs=self.outputs,
            _i=i,
            _names=self.names,
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row a subcomponent: subcomponent, site, mean_importance, density, firings, mean_activation, norm."""
        parts = [self.packing.at(i) for i in self.chosen.tolist()]
        return pd.DataFrame(
            {
                "subcomponent": [str(part) for part in parts],
                "site": [part.site for part in parts],
                "mean_importance": self.mean_importance.tolist(),
                "density": self.density.tolist(),
                "firings": self.firings.tolist(),
                "mean_activation": self.mean_activation.tolist(),
                "norm": self.norm.tolist(),
            }
        )

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` subcomponents of the largest mean importance."""
        ordered = self.to_pandas().sort_values("mean_importance", ascending=False, kind="stable")
        return ordered.head(k).reset_index(drop=True)

    def _index(self, address: str | Subcomponent) -> int:
        wanted = Subcomponent.parse(address)
        if wanted.site not in self.packing.slices:
            raise KeyError(f"{wanted.site!r} is not a decomposed site{nearest(wanted.site, self.packing.names)}.")
        count = self.packing.counts[wanted.site]
        if wanted.index >= count:
            raise IndexError(f"{wanted} does not exist: {wanted.site} has {count} subcomponents, 0 to {count - 1}.")
        packed = self.packing.slices[wanted.site].start + wanted.index
        found = (self.chosen == packed).nonzero()
        if not len(found):
            raise KeyError(f"{wanted} was not harvested; name it in harvest(..., subcomponents=[...]).")
        return int(found[0, 0])

    def _window(self, i: int, j: int) -> Window:
        row, pos = int(self.rows[i, j]), int(self.positions[i, j])
        start, stop = cut(pos, self.radius, self.real[row])
        inside = slice(start - pos + self.radius, stop - pos + self.radius)
        ids = tuple(self.tokens[row, start:stop].tolist())
        names = tuple(self.names[t] for t in ids)
        return Window(row, pos, start, ids, names, self.importances[i, j, inside], self.activations[i, j, inside])


@torch.no_grad()
def harvest(
    decomposition: Decomposition,
    model: nn.Module,
    tokens: Int[Tensor, "n pos"] | str | list[str],
    *,
    subcomponents: Sequence[str | Subcomponent] | None = None,
    windows: int = 8,
    radius: int = 20,
    batch_size: int = 32,
    threshold: float = 0.1,
    attention_mask: Int[Tensor, "n pos"] | None = None,
) -> Harvest:
    """Runs the model over rows of tokens once and collects what every subcomponent does there.

    Args:
        tokens: rows ``[n, pos]`` or strings; padding (or 0 in ``attention_mask``) is left out.
        subcomponents: which ones (None: all). With very many, naming the ones to look at saves memory.
        windows: windows kept of each, at most one a row, in order of the largest importance.
        radius: tokens shown on each side of a window's peak.
        threshold: it fires where g exceeds this.

    Raises:
        ValueError: an option is out of range, or the tokens are not this model's.
        KeyError, IndexError: a subcomponent does not exist.
    """
    for name, value, least in (("windows", windows, 1), ("radius", radius, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: at least {least} is needed.")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold}: importances lie in [0, 1], so it must be at least 0 and below 1.")
    chosen = _chosen(decomposition, subcomponents)
    with TappedModel(decomposition, model) as tapped:
        tokens = tapped.adapter.tokens(tokens)
        keep = tapped.adapter.padding(tokens, attention_mask)
        real = torch.ones_like(tokens, dtype=torch.bool) if keep is None else keep
        tally = _Tally(len(chosen), int(tokens.max()) + 1, windows, radius, threshold, tokens.device)
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            own_keep = None if keep is None else keep[rows]
            _, inputs = tapped.clean(tokens[rows], own_keep)
            g = zero_padding(lower_leaky(decomposition.pre_sigmoid(inputs, own_keep)), own_keep)
            g = g if subcomponents is None else g[..., chosen.to(g.device)]
            tally.add(tokens[rows], real[rows], g, _activations(decomposition, inputs, chosen), start)
        names = _names(getattr(tapped.adapter.model, "tokenizer", None), tokens)
    return tally.result(decomposition, chosen.to(tokens.device), tokens, real, names)


def _chosen(decomposition: Decomposition, subcomponents: Sequence[str | Subcomponent] | None) -> Int[Tensor, " C"]:
    """Packed positions, ascending, each once."""
    packing = decomposition.packing
    if subcomponents is None:
        return torch.arange(packing.total)
    if isinstance(subcomponents, (str, Subcomponent)):
        subcomponents = [subcomponents]
    if not len(subcomponents):
        raise ValueError("No subcomponent is named; pass subcomponents=None for all of them.")
    found = [decomposition.subcomponent(address) for address in subcomponents]
    return torch.tensor(sorted({packing.slices[f.site].start + f.index for f in found}))


def _of_site(chosen: Int[Tensor, " C"], where: slice) -> Int[Tensor, " own"]:
    return chosen[(chosen >= where.start) & (chosen < where.stop)] - where.start


def _activations(
    decomposition: Decomposition, inputs: Mapping[str, Tensor], chosen: Int[Tensor, " C"]
) -> Float[Tensor, "row pos C"]:
    parts = []
    for name, where in decomposition.packing.slices.items():
        own = _of_site(chosen, where).to(decomposition.device)
        V, U = decomposition.V[name][:, own], decomposition.U[name][own]
        parts.append(inputs[name] @ (V * U.norm(dim=-1)).to(inputs[name].dtype))
    return torch.cat(parts, dim=-1)


def _names(tokenizer: Any, tokens: Int[Tensor, "n pos"]) -> dict[int, str]:
    """The text of every token that occurs; its number where there is no text for it alone (half a character)."""
    ids = tokens.unique().tolist()
    if tokenizer is None:
        return {i: str(i) for i in ids}
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    names = {}
    for i, text, piece in zip(ids, texts, pieces, strict=True):
        # Sentencepiece tokenizers drop the space in front when a token is decoded alone.
        spaced = " " + text if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text
        names[i] = f"⟨{i}⟩" if not text or "\ufffd" in text else spaced
    return names


class _Tally:
    """Running sums, token counts and best windows of ``C`` subcomponents."""

    def __init__(self, C: int, vocab: int, windows: int, radius: int, threshold: float, device: torch.device) -> None:
        self.radius, self.threshold, self.n = radius, threshold, 0
        self.g, self.a = (torch.zeros(C, dtype=torch.float64, device=device) for _ in range(2))
        self.positive, self.firings = (torch.zeros(C, dtype=torch.int64, device=device) for _ in range(2))
        self.inputs, self.outputs = _Pairs(C, vocab, device), _Pairs(C, vocab, device)
        self.score = torch.full((C, windows), -1.0, dtype=torch.float64, device=device)
        self.rows, self.positions = (torch.full((C, windows), -1, device=device) for _ in range(2))
        self.seen = torch.zeros(2, C, windows, 2 * radius + 1, device=device)

    def add(
        self,
        tokens: Int[Tensor, "row pos"],
        real: Bool[Tensor, "row pos"],
        g: Float[Tensor, "row pos C"],
        a: Float[Tensor, "row pos C"],
        first_row: int,
    ) -> None:
        """Takes in one batch of rows."""
        wide = torch.promote_types(g.dtype, torch.float32)
        g, a = g.to(wide), a.to(wide)
        fires = (g > self.threshold).float()  # sums of floats are far faster than of booleans, and exact up to 2^24
        self.n += int(real.sum())
        self.g += g.sum((0, 1)).double()
        self.positive += (g > 0).float().sum((0, 1)).long()
        self.firings += fires.sum((0, 1)).long()
        self.a += (a * fires).sum((0, 1)).double()
        followed = real[:, :-1] & real[:, 1:]
        self.inputs.add(tokens[real], fires[real])
        self.outputs.add(tokens[:, 1:][followed], fires[:, :-1][followed])
        self._keep_best(g, a, first_row)

    def _keep_best(self, g: Float[Tensor, "row pos C"], a: Float[Tensor, "row pos C"], first_row: int) -> None:
        n_rows, n_pos, C = g.shape
        windows = self.score.shape[1]
        score, at = peaks(g, a)
        score = torch.where(g.gather(1, at[:, None])[:, 0] > self.threshold, score, -1.0)
        self.score, source = torch.cat([self.score, score.T], 1).topk(windows, dim=1)
        rows = torch.arange(first_row, first_row + n_rows, device=score.device).expand(C, n_rows)
        self.rows = torch.cat([self.rows, rows], 1).gather(1, source)
        self.positions = torch.cat([self.positions, at.T], 1).gather(1, source)
        # Outside the row the nearest token's value is taken; ``cut`` leaves those places out.
        around = torch.arange(-self.radius, self.radius + 1, device=score.device)
        pos = (self.positions[..., None] + around).clamp(0, n_pos - 1)
        row = (self.rows - first_row).clamp(0)[..., None]
        c = torch.arange(C, device=score.device)[:, None, None]
        fresh = torch.stack([g[row, pos, c], a[row, pos, c]])
        old = self.seen.gather(2, source.clamp(max=windows - 1)[None, ..., None].expand_as(self.seen))
        self.seen = torch.where((source >= windows)[None, ..., None], fresh.to(old), old)

    def result(
        self,
        decomposition: Decomposition,
        chosen: Int[Tensor, " C"],
        tokens: Int[Tensor, "n pos"],
        real: Bool[Tensor, "n pos"],
        names: Mapping[int, str],
    ) -> Harvest:
        norm = torch.cat(
            [decomposition.V[s].norm(dim=0) * decomposition.U[s].norm(dim=-1) for s in decomposition.sites]
        )[chosen]
        return Harvest(
            packing=decomposition.packing,
            chosen=chosen,
            mean_importance=(self.g / self.n).float(),
            density=(self.positive / self.n).float(),
            firings=self.firings,
            mean_activation=(self.a / self.firings).float(),
            norm=norm.detach(),
            rows=torch.where(self.score > 0, self.rows, -1),
            positions=self.positions,
            importances=self.seen[0],
            activations=self.seen[1],
            inputs=self.inputs.counts(),
            outputs=self.outputs.counts(),
            tokens=tokens,
            real=real,
            names=names,
            threshold=self.threshold,
            radius=self.radius,
        )


class _Pairs:
    """Counts of (subcomponent, token) pairs, kept sparse: most subcomponents meet few of the tokens."""

    def __init__(self, C: int, vocab: int, device: torch.device) -> None:
        self.vocab, self.n = vocab, 0
        self.occurrences = torch.zeros(vocab, dtype=torch.int64, device=device)
        self.firings = torch.zeros(C, dtype=torch.int64, device=device)
        self.keys, self.values = (torch.zeros(0, dtype=torch.int64, device=device) for _ in range(2))

    def add(self, tokens: Int[Tensor, " m"], fires: Float[Tensor, "m C"]) -> None:
        """Counts ``m`` positions; ``fires`` is 1 or 0."""
        self.n += len(tokens)
        self.occurrences += torch.bincount(tokens, minlength=self.vocab)
        self.firings += fires.sum(0).long()
        distinct, place = tokens.unique(return_inverse=True)
        dense = torch.zeros(len(distinct), fires.shape[1], device=fires.device).index_add_(0, place, fires)
        t, c = dense.nonzero(as_tuple=True)
        keys = torch.cat([self.keys, c * self.vocab + distinct[t]])
        values = torch.cat([self.values, dense[t, c].long()])
        self.keys, place = keys.unique(return_inverse=True)
        self.values = torch.zeros_like(self.keys).index_add_(0, place, values)

    def counts(self) -> TokenCounts:
        index, token = self.keys // self.vocab, self.keys % self.vocab
        return TokenCounts(index, token, self.values, self.occurrences, self.firings, self.n)


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
