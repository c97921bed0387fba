"""``tl-vpd label``: labels and scores of a decomposition's subcomponents and components, in a file.

Labels are made from every other row; the rest of the rows, which the labeller has not seen, are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tl_vpd.adapters.quiet import quiet_transformers
from tl_vpd.analysis import (
    Clustering,
    Endpoint,
    Firings,
    Labels,
    LanguageJudge,
    LocalModel,
    TokenJudge,
    firings,
    label,
    label_cost,
    score_labels,
)
from tl_vpd.checks import choice
from tl_vpd.recipe.evaluating import numbers
from tl_vpd.recipe.named import Named

LEAST = 8
"""An address that fires less often has no label."""


@dataclass(frozen=True)
class Labelling:
    """Who labels what, and who judges.

    Attributes:
        most: subcomponents, those of the largest mean importance, and as many components (None: all).
        components: a file of ``Clustering.save``, whose components are labelled too (None: there are none).
        endpoint: a language model on a network that labels (None: another one does).
        local: the folder of a language model of transformers that labels in this process (None: token statistics do).
        judge: ``tokens`` (no language model), ``model`` (the one that labels) or ``none``.

    Raises:
        ValueError: there are two language models, or none where one is to judge.
    """

    most: int | None = None
    components: Path | None = None
    endpoint: Endpoint | None = None
    local: Path | None = None
    judge: str = "tokens"

    def __post_init__(self) -> None:
        choice("judge", self.judge, ("tokens", "model", "none"))
        if self.endpoint is not None and self.local is not None:
            raise ValueError("There are an endpoint and a local model: give one of the two.")
        if self.judge == "model" and self.endpoint is None and self.local is None:
            raise ValueError("judge='model' needs a language model: give an endpoint or a local model.")


def label_by_name(
    named: Named, out: Path, labelling: Labelling, *, only_cost: bool, say: Callable[[str], None]
) -> Labels:
    """Labels, scores and writes a new file; with ``only_cost`` it says what an endpoint's labels would cost, and asks nothing."""
    if out.exists():
        raise FileExistsError(f"{out} is there already: give the name of a new file.")
    if only_cost and labelling.endpoint is None:
        raise ValueError("Only an endpoint costs anything: give one, or leave the question of cost out.")
    vpd, model, tokens = named.load()
    fires = firings(vpd, model, tokens)
    groups = [fires]
    if labelling.components is not None:
        groups.append(fires.components(Clustering.load(labelling.components, vpd)))
    model_of_labels = labelling.endpoint or (None if labelling.local is None else _local(labelling.local))
    labels = Labels({})
    for group in groups:
        source, rest = (group.in_rows(np.arange(start, len(tokens), 2)) for start in (0, 1))
        if not (names := chosen(source, labelling.most)):
            continue
        if only_cost and labelling.endpoint is not None:
            say(str(label_cost(source, names, labelling.endpoint)))
        else:
            made = label(source, names, model_of_labels)
            labels = Labels({**labels, **_scored(made, rest, model_of_labels, labelling.judge)})
    if not only_cost:
        labels.save(out)
    return labels


def endpoint_of(
    address: str | None, model: str | None, key_variable: str, prices: str | None, max_cost: float | None, folder: Path
) -> Endpoint | None:
    """The endpoint of a command's options; None where there is no address, and ValueError where options lack one."""
    if address is None:
        if given := [n for n, x in (("model", model), ("prices", prices), ("max-cost", max_cost)) if x is not None]:
            raise ValueError(f"The option for {given[0]} does nothing without --endpoint: give its address.")
        return None
    if model is None:
        raise ValueError("--endpoint needs --language-model, the model's name there.")
    both = numbers("--prices", prices, float) if prices else [None, None]
    if len(both) != 2:
        raise ValueError(
            f"--prices {prices!r}: give two numbers, of a million tokens sent and answered, such as 0.4,1.6."
        )
    return Endpoint(
        base_url=address,
        model=model,
        key_variable=key_variable,
        input_price=both[0],
        output_price=both[1],
        max_cost=max_cost,
        folder=folder,
    )


def chosen(fires: Firings, most: int | None) -> list[str]:
    """The addresses that fire often enough, those of the largest summed importance first."""
    sums = np.add.reduceat(np.append(fires.importances, 0.0), fires.ends[:-1]) * (fires.counts > 0)
    often = [i for i in np.argsort(-sums, kind="stable").tolist() if fires.counts[i] >= LEAST]
    return [fires.addresses[i] for i in often[:most]]


def _scored(labels: Labels, fires: Firings, model: Endpoint | LocalModel | None, judge: str) -> Labels:
    if judge == "none":
        return labels
    if judge == "tokens" or model is None:
        return labels.with_scores(score_labels(fires, TokenJudge(), list(labels)))
    return labels.with_scores(score_labels(fires, LanguageJudge(model), list(labels), labels=labels))


def _local(folder: Path) -> LocalModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: give the folder of a causal language model of transformers."
        )
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        return LocalModel(
            model, AutoTokenizer.from_pretrained(folder, local_files_only=True), name=folder.resolve().name
        )
