"""Subcomponents as features of Neuronpedia: the JSON that SAEDashboard writes, and that Neuronpedia's import script reads.

    features/
      1-w_in-vpd/            a source per site: its layer, its weight, and the name of the set
        batch-0.json         model_id, layer, sae_set, sae_id_suffix, and at most 128 features
        batch-1.json

===========================  ============================================================================================
of a feature                 is
===========================  ============================================================================================
``feature_index``            the subcomponent's index at its site
``frac_nonzero``             the fraction of tokens with importance above 0
``activations``              windows around its largest importances, with the importance (or the activation) at each token
``freq_hist_data_bar_*``     a histogram of its importances above 0: the middle of each bin, and the count
``pos_*``, ``neg_*``         tokens whose logits its write direction raises and lowers most, ``U[c] @ W_U``, and these numbers
``logits_hist_data_bar_*``   a histogram of them over the vocabulary
===========================  ============================================================================================

Logits are those of sites that write into the residual stream (W_O, W_out), without the final norm; for other sites, they are
empty lists, as is what only a dictionary of activations has (neighbouring neurons, correlated features).

    >>> save_neuronpedia(vpd, model, tokens, "features", model_id="gpt2-small")             # doctest: +SKIP
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.analysis.harvest import Harvest, HarvestConfig, SubcomponentHarvest, harvest
from tl_vpd.analysis.harvest.tokens import token_texts
from tl_vpd.checks import check_fields, check_finite, choice, config_of, instance, path_of, shown, text_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.importance_statistics import ALIVE
from tl_vpd.files.atomic import new_folder, write_text
from tl_vpd.files.json_files import json_text
from tl_vpd.site import Site

_ID = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
PER_FILE = 128
"""Features in a file: as many as Neuronpedia's client uploads at once."""
TOP = {"bin_min": -1, "bin_contains": -1}
"""How SAEDashboard marks a window as one of the largest activations, not of an interval."""
NONE: dict[str, list[Any]] = {
    f"{kind}_{column}": []
    for kind, columns in {
        "neuron_alignment": ("indices", "values", "l1"),
        "correlated_neurons": ("indices", "l1", "pearson"),
        "correlated_features": ("indices", "l1", "pearson"),
    }.items()
    for column in columns
} | {"decoder_weights_dist": [], "vector": []}
"""What the format has and a subcomponent does not."""
NO_LOGITS: dict[str, list[Any]] = {f"{end}_{column}": [] for end in ("pos", "neg") for column in ("str", "values")} | {
    f"logits_hist_data_bar_{column}": [] for column in ("values", "heights")
}


@dataclass(frozen=True)
class NeuronpediaConfig:
    """What the features of a set show.

    Attributes:
        set_name: of the set of sources; together with a site's layer and weight, a source's id: ``1-w_in-vpd``.
        values: what windows show at each token: ``importance`` in [0, 1], or ``activation``, the signed ``(x @ V[:, c]) ‖U[c]‖``.
        harvest: windows, threshold and memory of the pass over the prompts; its ``bins`` are those of all histograms.
        logits: tokens shown at each end.
        dataset: a name for the prompts.

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of range, or the name cannot be part of an address.
    """

    set_name: str = "vpd"
    values: Literal["importance", "activation"] = "importance"
    harvest: HarvestConfig = field(default_factory=lambda: HarvestConfig(threshold=0.0, bins=50))
    logits: int = 10
    dataset: str = ""

    def __post_init__(self) -> None:
        check_fields(self, logits=1)
        choice("values", self.values, ("importance", "activation"))
        instance("harvest", self.harvest, HarvestConfig)
        _check_id("set_name", self.set_name)


@torch.no_grad()
def save_neuronpedia(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    folder: str | os.PathLike[str],
    *,
    model_id: str,
    config: NeuronpediaConfig | None = None,
    attention_mask: Int[Tensor, "n pos"] | None = None,
) -> Path:
    """Writes what is alive on prompts, of mean importance above 1e-6, as features.

    Args:
        decomposition: of the model's weights.
        model: the target; with a tokenizer, tokens are text.
        prompts: strings, or rows of tokens ``[n, pos]``, which are run once; padding is left out.
        folder: does not exist, or is empty.
        model_id: the model's name at Neuronpedia, such as ``gpt2-small``.
        config: what features show (None: the defaults).
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Returns:
        The folder.

    Raises:
        FileExistsError: there is something in the folder.
        ValueError: a name cannot be part of an address, a site is in no layer, two sites would be one source, nothing is alive,
            a number is NaN or infinite, or the prompts or the decomposition are not this model's.
        OSError: the folder cannot be written; it is not there then.
    """
    config, place = config_of(NeuronpediaConfig, config), path_of("folder", folder)
    _check_id("model_id", text_of("model_id", model_id))
    sources = _sources(instance("decomposition", decomposition, Decomposition), config.set_name)
    with new_folder(place) as written:
        harvested = harvest(decomposition, model, prompts, config=config.harvest, attention_mask=attention_mask)
        alive = decomposition.site_axis.split_sites((harvested.mean_importance > ALIVE).cpu())
        if not any(bool(a.any()) for a in alive.values()):
            raise ValueError("No subcomponent is alive on these prompts: there is no feature to write.")
        features = _Features(decomposition, model, harvested, config)
        for name, (source, source_set) in sources.items():
            batch = {"model_id": model_id, "layer": decomposition.sites[name].layer, "sae_set": source_set}
            for i, indices in enumerate(alive[name].nonzero()[:, 0].split(PER_FILE)):
                if len(indices):
                    (written / source).mkdir(exist_ok=True)
                    content = {**batch, "sae_id_suffix": None, "features": list(features.of(name, indices))}
                    write_text(written / source / f"batch-{i}.json", json_text(content))
    return place


def _sources(decomposition: Decomposition, set_name: str) -> dict[str, tuple[str, str]]:
    """Every site's source and the set it is of."""
    sources: dict[str, tuple[str, str]] = {}
    for name, site in decomposition.sites.items():
        if site.layer is None:
            raise ValueError(f"{name} is in no layer, and every source of Neuronpedia is of one: leave this site out.")
        source_set = f"{name.rpartition('.')[2].lower()}-{set_name}"
        source = f"{site.layer}-{source_set}"
        if (source, source_set) in sources.values():
            raise ValueError(
                f"Two sites would be the source {source}, one is {name}: Neuronpedia cannot tell them apart."
            )
        sources[name] = source, source_set
    return sources


class _Features:
    """Features of a harvest."""

    def __init__(
        self, decomposition: Decomposition, model: nn.Module, harvested: Harvest, config: NeuronpediaConfig
    ) -> None:
        adapter = adapt(model)
        self.decomposition, self.harvested, self.config = decomposition, harvested, config
        self.unembedding = adapter.unembedding()
        self.tokenizer = getattr(adapter.model, "tokenizer", None)

    def of(self, site: str, indices: Int[Tensor, " n"]) -> Iterator[dict[str, Any]]:
        """Of some of a site's subcomponents."""
        rows = {
            "n_prompts_total": sum(stop - start for start, stop in self.harvested.rows),
            "n_tokens_in_prompt": self.harvested.context,
        }
        for index, logits in zip(indices.tolist(), self._logits(self.decomposition.sites[site], indices), strict=True):
            record = self.harvested[f"{site}:{index}"]
            yield {
                "feature_index": index,
                **NONE,
                **logits,
                "frac_nonzero": record.density,
                **_bars("freq", record.histogram, 0.0, 1.0),
                **rows,
                "dataset": self.config.dataset,
                "activations": self._activations(record),
            }

    def _activations(self, record: SubcomponentHarvest) -> list[dict[str, Any]]:
        activations = []
        for window in record.windows:
            values = (window.importances if self.config.values == "importance" else window.activations).tolist()
            tokens = {"tokens": list(window.tokens), "values": values, "qualifying_token_index": window.peak}
            activations.append({**TOP, "bin_max": max(values), **tokens})
        return activations

    def _logits(self, site: Site, indices: Int[Tensor, " n"]) -> list[dict[str, Any]]:
        """What each write direction adds to the logits; empty where it does not write into the residual stream."""
        if self.unembedding is None or site.short not in ("o", "out"):
            return [NO_LOGITS] * len(indices)
        W_U, bins = self.unembedding.weight, self.config.harvest.bins
        logits = (self.decomposition.U[site.name][indices.to(self.decomposition.device)].to(W_U) @ W_U.T).float()
        check_finite(f"U/{site.name} @ W_U", logits)
        low, high = (ends.tolist() for ends in logits.aminmax(dim=1))
        features = []
        for row, a, b in zip(logits, low, high, strict=True):
            features.append(_bars("logits", torch.histc(row, bins, a, b) if bins and a < b else None, a, b))
        for end, largest in (("pos", True), ("neg", False)):
            values, ids = logits.topk(min(self.config.logits, logits.shape[1]), largest=largest)
            names = token_texts(self.tokenizer, ids)
            for feature, numbers, tokens in zip(features, values.tolist(), ids.tolist(), strict=True):
                feature |= {f"{end}_str": [names[t] for t in tokens], f"{end}_values": numbers}
        return features


def _bars(kind: str, counts: Tensor | None, low: float, high: float) -> dict[str, list[Any]]:
    """A histogram over bins of equal width: the middle of each, and its count."""
    heights = [] if counts is None else [int(n) for n in counts.tolist()]
    values = [low + (high - low) * (i + 0.5) / len(heights) for i in range(len(heights))]
    return {f"{kind}_hist_data_bar_values": values, f"{kind}_hist_data_bar_heights": heights}


def _check_id(name: str, value: str) -> None:
    if not _ID.fullmatch(value) or len(value) > 100:
        raise ValueError(
            f"{name}={shown(value)}: give at most 100 letters and digits, with single '.', '_' or '-' between them."
        )
