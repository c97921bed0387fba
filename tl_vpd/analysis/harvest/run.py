"""``harvest``: where each subcomponent fires on rows of tokens, in one pass and within a given memory.

A subcomponent *fires* at a token where its causal importance g exceeds a threshold.
*Input tokens* are those it fires at; *output tokens* those that follow in the text. The activation shown is
``(x @ V[:, c]) ‖U[c]‖``.

    >>> harvested = harvest(vpd, model, tokens)                     # doctest: +SKIP
    >>> rows = np.load("tokens.npy", mmap_mode="r")                 # doctest: +SKIP
    >>> harvest(vpd, model, rows, config=HarvestConfig(samples=16, lags=2), folder="harvest")   # doctest: +SKIP

Memory does not grow with the rows: windows and sums are of a fixed size, token counts drop the rarest pairs beyond a limit (and
say so, ``TokenCounts.missing``), and importances and activations go to the disk, if a folder is given. There, an interrupted
harvest goes on where it last wrote. Left out: the tokens the *model* predicts (output tokens are the text's).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_vpd.analysis.harvest.batch import Batch, Chosen
from tl_vpd.analysis.harvest.columns import Columns, Entries
from tl_vpd.analysis.harvest.config import HarvestConfig
from tl_vpd.analysis.harvest.merging import joined
from tl_vpd.analysis.harvest.result import FILE, Harvest, read_harvest
from tl_vpd.analysis.harvest.rows import Rows
from tl_vpd.analysis.harvest.tally import Tally
from tl_vpd.analysis.harvest.tokens import token_texts
from tl_vpd.analysis.harvest.windows import Windows
from tl_vpd.analysis.nodes import several
from tl_vpd.checks import config_of, instance, path_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.files.lock import locked
from tl_vpd.forward import MaskedModel
from tl_vpd.site import Subcomponent

_COPIES = 8
"""What a batch takes beside all importances, in tensors of that size: enough for a third of them above 0."""
_TENSOR, _TOKENS = 1 << 24, 1024
"""On a CPU as many tokens run at once as keep these tensors within such bytes (the C library hands memory of more than 32 MB back
each time), or the second number if that is more."""
_PAIR = 100
"""Bytes of a (subcomponent, token) pair while pairs are added up, on both sides."""


@torch.no_grad()
def harvest(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None = None,
    *,
    config: HarvestConfig | None = None,
    attention_mask: Int[Tensor, "n pos"] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Harvest:
    """Runs the model over rows of tokens once and collects what every subcomponent does there.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: strings, or rows of tokens ``[n, pos]``; padding is left out. A memory-mapped array, a dataset or any iterable of
            rows of one length is read a few rows at a time, and each of its tokens counts.
        subcomponents: which ones (None: all). With very many, naming the ones to look at saves memory.
        config: windows, threshold and memory (None: the defaults).
        attention_mask: 0 at padding (None: where TransformerLens sees padding).
        folder: for importances and activations by subcomponent (``Harvest.columns``), and to continue after an interruption with
            the same call; a finished one is read (None: they are not stored).

    Raises:
        ValueError: no subcomponent is named, the prompts are not this model's or not tokens, it has other weights, the memory is
            too small, or the folder holds another harvest.
        KeyError: a site is not decomposed.
        IndexError: there is no such subcomponent.
        TypeError: an argument is of another type.
        OSError: the folder cannot be written, or another process writes into it.

    Warns (RuntimeWarning) where importances or activations are NaN or infinite.
    """
    config = config_of(HarvestConfig, config)
    instance("decomposition", decomposition, Decomposition)
    chosen = chosen_columns(decomposition, subcomponents)
    place = None if folder is None else path_of("folder", folder)
    with MaskedModel(decomposition, model) as masked_model:
        rows = Rows(masked_model.adapter, prompts, attention_mask)
        with nullcontext() if place is None else locked(place):
            harvested = _Pass(decomposition, masked_model, rows, chosen, config, place).run()
    _warn_of_undefined(harvested)
    return harvested


@dataclass(frozen=True)
class Budget:
    """What fits into the memory.

    Attributes:
        rows: run at once.
        pairs: of subcomponent and token that are counted.
        entries: bytes of importances and activations before they go to the disk.
    """

    rows: int
    pairs: int
    entries: int


def budget(config: HarvestConfig, C: int, total: int, context: int) -> Budget:
    """Divides the memory.

    Args:
        config: with the memory.
        C: number of harvested subcomponents.
        total: number of all, whose importances are computed.
        context: tokens in a row.

    Raises:
        ValueError: it is too small for what does not depend on the rows, or for one row.
    """
    windows = Windows.bytes_for(C, config.windows + config.samples, config.radius)
    pairs = 0 if config.lags is None else 4 * (config.lags + 1) * C * C
    fixed = 2 * (windows + pairs)  # the sums so far, and those of the next rows
    row = 4 * context * (total + _COPIES * C)
    if (rest := config.memory - fixed) < 2 * row:
        raise ValueError(
            f"memory={config.memory} is too little: {C} subcomponents need {fixed + 2 * row:,} bytes for windows, pairs and "
            "one row; give more memory, fewer windows or lags, or fewer subcomponents."
        )
    return Budget(max(1, min(config.batch_size, rest // 2 // row)), max(1000, rest // 4 // _PAIR), rest // 16)


class _Pass:
    """One pass over rows."""

    def __init__(
        self,
        decomposition: Decomposition,
        masked_model: MaskedModel,
        rows: Rows,
        chosen: Int[Tensor, " C"],
        config: HarvestConfig,
        folder: Path | None,
    ) -> None:
        self.decomposition, self.masked_model, self.rows = decomposition, masked_model, rows
        self.config, self.folder = config, folder
        self.chosen = chosen.to(masked_model.adapter.device)
        self.by_site = Chosen(decomposition, self.chosen)
        self.budget = budget(config, len(chosen), decomposition.site_axis.total, rows.context)
        self.at_once = self.budget.rows
        if self.chosen.device.type == "cpu":
            enough = max(_TENSOR // (4 * decomposition.site_axis.total), _TOKENS) // rows.context
            self.at_once = min(self.at_once, max(1, enough))
        norms = [decomposition.V[s].norm(dim=0) * decomposition.U[s].norm(dim=-1) for s in decomposition.sites]
        norm = torch.cat(norms).detach()
        self.norm = norm[chosen.to(norm.device)].to(self.chosen.device)

    def run(self) -> Harvest:
        """The harvest of all rows."""
        done = self._so_far()
        row = start = self.config.first_row if done is None else done.rows[-1][1]
        tally, entries = self._empty()
        for tokens, mask in self.rows.batches(row - self.config.first_row, self.at_once):
            real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
            inputs = self.masked_model.inputs(tokens, mask)
            batch = Batch(self.by_site, tokens, real, inputs, self.decomposition.importances(inputs, mask))
            active = tally.add(batch, row)
            row += len(tokens)
            if self.folder is None:
                continue
            entries.add(active, row - len(tokens))
            if entries.bytes > self.budget.entries:
                done = self._joined(done, tally, entries, (start, row))
                done.write(self.folder, finished=False)
                (tally, entries), start = self._empty(), row
        if tally.n:
            done = self._joined(done, tally, entries, (start, row))
        assert done is not None
        if self.folder is not None:
            done.write(self.folder)
        return done

    def _empty(self) -> tuple[Tally, Entries]:
        return Tally(self.chosen, self.config, self.budget.pairs), Entries(len(self.chosen), self.rows.context)

    def _joined(self, done: Harvest | None, tally: Tally, entries: Entries, rows: tuple[int, int]) -> Harvest:
        """The harvest so far with the next rows; their entries go to the disk."""
        files: tuple[Path, ...] | None = None
        if self.folder is not None:
            number = 0 if done is None or done.columns is None else len(done.columns.files)
            files = (self.folder / f"columns-{number:05}.safetensors",)
            entries.write(files[0])
        counts = tally.inputs.counts()
        tokenizer = getattr(self.masked_model.adapter.model, "tokenizer", None)
        part = tally.result(
            token_texts(tokenizer, counts.occurrences.nonzero()[:, 0]),
            site_axis=self.decomposition.site_axis,
            norm=self.norm,
            rows=(rows,),
            context=self.rows.context,
            first=tuple(self.rows.first.tolist()),
            columns=None if files is None else Columns(files, self.rows.context),
        )
        return part if done is None else joined(done, part, self.budget.pairs)

    def _so_far(self) -> Harvest | None:
        """What the folder holds of this harvest (None: nothing).

        Raises:
            ValueError: it is of other subcomponents, rows or settings.
        """
        if self.folder is None or not (self.folder / FILE).exists():
            return None
        done, _ = read_harvest(self.folder, self.chosen.device)
        if differs := self._difference(done):
            raise ValueError(
                f"{self.folder} holds a harvest {differs}: give the same call as for it, or another folder."
            )
        return done

    def _difference(self, done: Harvest) -> str:
        """How a stored harvest is not the beginning of this one (empty: it is)."""
        axis, config, rows = self.decomposition.site_axis, self.config.what(), done.rows[-1][1] - self.config.first_row
        if done.site_axis.counts != axis.counts or not torch.equal(done.chosen, self.chosen):
            return "of other subcomponents"
        if not torch.allclose(done.norm, self.norm, rtol=1e-4):
            return "of another decomposition"
        if done.config.what() != config or done.config.first_row != self.config.first_row:
            return "with another config"
        if done.first != tuple(self.rows.first.tolist()) or done.columns is None or len(done.rows) > 1:
            return "of other rows"
        return f"of {rows} rows, and there are {self.rows.n}" if self.rows.n is not None and self.rows.n < rows else ""


def chosen_columns(
    decomposition: Decomposition, subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None
) -> Int[Tensor, " C"]:
    """Concatenated positions, ascending, each once."""
    site_axis = decomposition.site_axis
    if subcomponents is None:
        return torch.arange(site_axis.total)
    parsed = [decomposition.subcomponent(address) for address in several("subcomponents", subcomponents)]
    return torch.tensor(sorted({site_axis.slices[c.site].start + c.index for c in parsed}))


def _warn_of_undefined(harvested: Harvest) -> None:
    mean, activation = harvested.importance, harvested.mean_activation
    undefined = ~mean.isfinite() | ~(activation.isfinite() | (harvested.firings == 0))
    if bool(undefined.any()):
        first = harvested.site_axis.at(int(harvested.chosen[undefined][0]))
        warnings.warn(
            f"Importances or activations of {int(undefined.sum())} of {len(undefined)} harvested subcomponents are NaN or "
            f"infinite, the first is {first}: look at the weights and at the model's activations.",
            RuntimeWarning,
            stacklevel=4,
        )
