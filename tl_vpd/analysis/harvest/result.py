"""The result of a harvest, and its file.

folder/harvest.safetensors            sums, windows, counts, pairs; texts of tokens
folder/columns-00000.safetensors      importances and activations, where the harvest was made in a folder (``columns``)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from tl_vpd.analysis.harvest.columns import Columns
from tl_vpd.analysis.harvest.config import HarvestConfig
from tl_vpd.analysis.harvest.neighbours import Neighbours
from tl_vpd.analysis.harvest.records import SubcomponentHarvest
from tl_vpd.analysis.harvest.tokens import TokenCounts
from tl_vpd.analysis.harvest.windows import Windows
from tl_vpd.checks import integer, path_of
from tl_vpd.files.atomic import new_folder
from tl_vpd.files.tensor_file import open_tensors, write_tensors
from tl_vpd.frozen import Frozen
from tl_vpd.printing import Printed
from tl_vpd.site import ConcatenatedAxis, Subcomponent, nearest

FILE = "harvest.safetensors"


@dataclass(frozen=True)
class Harvest(Printed):
    """Statistics, windows and token counts of the harvested subcomponents ``C``, on the model's device.

    Attributes:
        site_axis: of the decomposition.
        config: what was collected.
        chosen: concatenated positions of the subcomponents, ascending.
        norm: ``‖V[:, c]‖ ‖U[c]‖``.
        n: how many real tokens.
        importance: the sum of importances.
        positive: at how many tokens importance is above 0.
        firings: at how many it is above the threshold.
        activation: the sum of activations there.
        histogram: counts of importances in bins of equal width in (0, 1].
        windows: of the largest importances.
        samples: around random firings.
        inputs: counts of the tokens at which they fire.
        outputs: of those that follow.
        together: how often pairs fire at one token or some apart (``neighbours``), on the CPU.
        names: texts of tokens.
        rows: first and last + 1 of each run of rows.
        context: tokens in a row.
        first: tokens of the first row.
        columns: all importances and activations (None: the harvest was not made in a folder).
    """

    site_axis: ConcatenatedAxis
    config: HarvestConfig
    chosen: Int[Tensor, " C"]
    norm: Float[Tensor, " C"]
    n: int
    importance: Float[Tensor, " C"]
    positive: Int[Tensor, " C"]
    firings: Int[Tensor, " C"]
    activation: Float[Tensor, " C"]
    histogram: Int[Tensor, "C bins"]
    windows: Windows
    samples: Windows
    inputs: TokenCounts
    outputs: TokenCounts
    together: Int[Tensor, "lag C C"]
    names: Mapping[int, str]
    rows: tuple[tuple[int, int], ...]
    context: int
    first: tuple[int, ...]
    columns: Columns | None = None

    @property
    def mean_importance(self) -> Float[Tensor, " C"]:
        """Over real tokens."""
        return (self.importance / self.n).float()

    @property
    def density(self) -> Float[Tensor, " C"]:
        """The fraction of real tokens with g > 0."""
        return (self.positive / self.n).float()

    @property
    def mean_activation(self) -> Float[Tensor, " C"]:
        """Over firings (NaN without any)."""
        return (self.activation / self.firings).float()

    @property
    def threshold(self) -> float:
        """A subcomponent fires where g exceeds this."""
        return self.config.threshold

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, address: str | Subcomponent) -> SubcomponentHarvest:
        """One subcomponent; raises KeyError or IndexError if it does not exist, or KeyError if it was not harvested."""
        i = self.index(address)
        samples = self.samples.of(i, self.names)
        return SubcomponentHarvest(
            subcomponent=self.site_axis.at(int(self.chosen[i])),
            mean_importance=float(self.importance[i] / self.n),
            density=float(self.positive[i] / self.n),
            firings=int(self.firings[i]),
            mean_activation=float(self.activation[i] / self.firings[i]),
            norm=float(self.norm[i]),
            windows=self.windows.of(i, self.names),
            samples=tuple(sorted(samples, key=lambda w: -float(w.importances[w.peak]))),
            histogram=self.histogram[i],
            _inputs=self.inputs,
            _outputs=self.outputs,
            _neighbours=Neighbours(self.together, self.firings, self.chosen, self.site_axis),
            _i=i,
            _names=self.names,
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per subcomponent: subcomponent, site, mean_importance, density, firings, mean_activation, norm."""
        subcomponents = [self.site_axis.at(i) for i in self.chosen.tolist()]
        return pd.DataFrame(
            {
                "subcomponent": [str(c) for c in subcomponents],
                "site": [c.site for c in subcomponents],
                "mean_importance": self.mean_importance.tolist(),
                "density": self.density.tolist(),
                "firings": self.firings.tolist(),
                "mean_activation": self.mean_activation.tolist(),
                "norm": self.norm.tolist(),
            }
        )

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` subcomponents of the largest mean importance."""
        k = integer("k", k, minimum=0)
        ordered = self.to_pandas().sort_values("mean_importance", ascending=False, kind="stable")
        return ordered.head(k).reset_index(drop=True)

    def index(self, address: str | Subcomponent) -> int:
        """A subcomponent's place among the harvested ones; raises as ``harvested[address]``."""
        parsed = Subcomponent.parse(address)
        if parsed.site not in self.site_axis.slices:
            raise KeyError(f"{parsed.site!r} is not a decomposed site{nearest(parsed.site, self.site_axis.names)}.")
        count = self.site_axis.counts[parsed.site]
        if not 0 <= parsed.index < count:
            raise IndexError(f"{parsed} does not exist: {parsed.site} has {count} subcomponents, 0 to {count - 1}.")
        concatenated = self.site_axis.slices[parsed.site].start + parsed.index
        matches = (self.chosen == concatenated).nonzero()
        if not len(matches):
            raise KeyError(f"{parsed} was not harvested; name it in harvest(..., subcomponents=[...]).")
        return int(matches[0, 0])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes a new folder, with a copy of the columns if there are some.

        Raises:
            FileExistsError: there is something in the folder.
            ValueError: there are NaN or infinite numbers.
            OSError: the folder cannot be written.
        """
        place = path_of("folder", folder)
        with new_folder(place) as written:
            copies = []
            for i, path in enumerate(self.columns.files if self.columns else ()):
                copies.append(written / f"columns-{i:05}.safetensors")
                shutil.copyfile(path, copies[-1])
            columns = Columns(tuple(copies), self.context) if self.columns else None
            replace(self, columns=columns).write(written)
        return place

    def write(self, folder: Path, *, finished: bool = True) -> None:
        """Writes the harvest's file beside its columns.

        Args:
            folder: of the columns.
            finished: whether these are all rows.
        """
        content = {
            "format": 1,
            "finished": finished,
            "sites": self.site_axis.counts,
            "config": {f.name: getattr(self.config, f.name) for f in fields(self.config)},
            "n": self.n,
            "rows": [list(run) for run in self.rows],
            "context": self.context,
            "first": list(self.first),
            "names": {str(token): text for token, text in self.names.items()},
            "counts": {name: [getattr(self, name).n, getattr(self, name).missing] for name in ("inputs", "outputs")},
            "columns": None if self.columns is None else [path.name for path in self.columns.files],
        }
        write_tensors(folder / FILE, _tensors(self), content)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Harvest:
        """Reads what ``save`` wrote, or what a harvest wrote into its folder.

        Args:
            folder: of the harvest.
            device: of all tensors but ``together`` and the columns.

        Raises:
            FileNotFoundError: there is no harvest in the folder.
            ValueError: it is damaged, is something else, or was interrupted: make it again to continue it.
        """
        place = path_of("folder", folder)
        harvested, finished = read_harvest(place, device)
        if not finished:
            raise ValueError(
                f"The harvest in {place} was interrupted: call harvest(..., folder=...) again to continue it."
            )
        if harvested.columns:
            harvested.columns.check()
        return harvested


class StoredHarvest(Frozen):
    """What the file says beside its tensors."""

    format: Literal[1]
    finished: bool
    sites: dict[str, int]
    config: dict[str, Any]
    n: int = Field(ge=1)
    rows: tuple[tuple[int, int], ...]
    context: int = Field(ge=1)
    first: tuple[int, ...]
    names: dict[str, str]
    counts: dict[str, tuple[int, int]]
    columns: tuple[str, ...] | None


def read_harvest(folder: Path, device: str | torch.device = "cpu") -> tuple[Harvest, bool]:
    """A harvest and whether it is finished.

    Args:
        folder: of the harvest.
        device: of its tensors.

    Raises:
        FileNotFoundError, ValueError: as for ``Harvest.load``.
    """
    path = folder / FILE
    with open_tensors(path) as file:
        try:
            stored = StoredHarvest(**file.content)
            config = HarvestConfig(**stored.config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not the file of a harvest: {error}") from error
        tensors = {key: file.read(key) for key in file.shapes}
    parts: dict[str, dict[str, Any]] = {"": {}, "inputs": {}, "outputs": {}, "windows": {}, "samples": {}}
    for key, tensor in tensors.items():
        where, _, name = key.rpartition(".")
        parts.setdefault(where, {})[name] = tensor if key == "together" else tensor.to(device)
    files = None if stored.columns is None else tuple(folder / Path(name).name for name in stored.columns)
    try:
        for name, (n, missing) in stored.counts.items():
            parts[""][name] = TokenCounts(**parts.pop(name), n=n, missing=missing)
        for name in ("windows", "samples"):
            parts[""][name] = Windows(**parts.pop(name))
        harvested = Harvest(
            **parts[""],
            site_axis=ConcatenatedAxis(stored.sites),
            config=config,
            n=stored.n,
            names={int(token): text for token, text in stored.names.items()},
            rows=stored.rows,
            context=stored.context,
            first=stored.first,
            columns=None if files is None else Columns(files, stored.context),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks a part of a harvest: {error}.") from error
    return harvested, stored.finished


def _tensors(harvested: Harvest) -> dict[str, Tensor]:
    """All tensors by key."""
    tensors = {}
    for field in fields(harvested):
        value = getattr(harvested, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
        elif isinstance(value, Windows | TokenCounts):
            inner = {f.name: getattr(value, f.name) for f in fields(value)}
            tensors |= {f"{field.name}.{name}": t for name, t in inner.items() if isinstance(t, Tensor)}
    return tensors
