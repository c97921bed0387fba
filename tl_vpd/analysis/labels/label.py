"""``label``: a short text for each subcomponent or component, from a language model or from token statistics.

>>> labels = label(harvest(vpd, model, tokens))                                  # doctest: +SKIP
>>> labels = label(harvested, ["blocks.1.mlp.W_in:12"], Endpoint(...))           # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tl_vpd.analysis.harvest import Harvest
from tl_vpd.analysis.labels.asking import LanguageModel, Question, field_of
from tl_vpd.analysis.labels.endpoint import Cost, Endpoint
from tl_vpd.analysis.labels.evidence import Evidence, evidence_of
from tl_vpd.analysis.labels.firings import Firings
from tl_vpd.analysis.labels.labels import Label, Labels
from tl_vpd.analysis.labels.prompts import label_messages
from tl_vpd.checks import check_fields, config_of, flag, instance
from tl_vpd.site import Subcomponent

STATISTICS = "token statistics"
"""The source of labels that no language model wrote."""


@dataclass(frozen=True)
class LabelConfig:
    """What a label is made from, and how long it may be.

    Attributes:
        windows: of text that are shown, at most.
        tokens: of each token table.
        radius: tokens on each side of a firing, of windows that are made from ``Firings`` (a harvest has its own).
        max_words: of a label.
        max_length: characters of a label.
        seed: of the windows that are made from ``Firings``.

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of range.
    """

    windows: int = 30
    tokens: int = 8
    radius: int = 20
    max_words: int = 8
    max_length: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, windows=1, tokens=1, radius=0, max_words=1, max_length=(1, 200))


def label(
    source: Harvest | Firings,
    subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None = None,
    model: LanguageModel | None = None,
    *,
    config: LabelConfig | None = None,
    progress: bool = True,
) -> Labels:
    """Labels subcomponents or components.

    Args:
        source: a harvest, or firings (of components: ``firings.components(clustering)``).
        subcomponents: which addresses (None: all that fire at all).
        model: an ``Endpoint`` or ``LocalModel``, asked one question for each address (None: labels name the tokens at which, or
            before which, each fires most).
        config: what is shown (None: the defaults).
        progress: show the cost beforehand and a bar.

    Raises:
        TypeError: an argument is of another type.
        KeyError, IndexError: an address is not in the source.
        ValueError: an address never fires, or the questions cost more than the endpoint's ``max_cost``.
        OSError: of the endpoint; see ``Endpoint.ask``.

    Warns (RuntimeWarning) where the model has given no label to some addresses.
    """
    config = config_of(LabelConfig, config)
    evidence = _evidence(source, subcomponents, config)
    flag("progress", progress)
    if model is None:
        return Labels({e.address: Label(statistics_label(e, config), STATISTICS) for e in evidence})
    instance("model", model, LanguageModel)  # type: ignore[type-abstract]
    answers = model.ask(_questions(evidence, config), progress=progress)
    labels = {e.address: Label(text, model.name) for e, text in zip(evidence, answers, strict=True) if text is not None}
    if missing := [e.address for e, text in zip(evidence, answers, strict=True) if text is None]:
        warnings.warn(
            f"{model.name} has no label for {len(missing)} of {len(evidence)}, the first is {missing[0]}: ask for these again.",
            RuntimeWarning,
            stacklevel=2,
        )
    return Labels(labels)


def label_cost(
    source: Harvest | Firings,
    subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None,
    endpoint: Endpoint,
    *,
    config: LabelConfig | None = None,
) -> Cost:
    """What ``label`` with these arguments would ask and cost at most; asks nothing.

    Args:
        source: as for ``label``.
        subcomponents: as for ``label``.
        endpoint: with its prices.
        config: as for ``label``.

    Raises:
        TypeError, KeyError, IndexError, ValueError: as for ``label``.
    """
    config, endpoint = config_of(LabelConfig, config), instance("endpoint", endpoint, Endpoint)
    return endpoint.cost(_questions(_evidence(source, subcomponents, config), config))


def _evidence(
    source: Harvest | Firings,
    subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None,
    config: LabelConfig,
) -> list[Evidence]:
    instance("source", source, Harvest, Firings)
    if isinstance(source, Harvest) and (config.radius, config.seed) != (LabelConfig.radius, LabelConfig.seed):
        raise ValueError("radius and seed do nothing for a harvest, whose windows are made: give them to harvest().")
    return evidence_of(source, subcomponents, windows=config.windows, radius=config.radius, seed=config.seed)


def _questions(evidence: Sequence[Evidence], config: LabelConfig) -> list[Question]:
    parse = partial(checked_label, max_words=config.max_words, max_length=config.max_length)
    return [
        Question(
            label_messages(e, max_words=config.max_words, tokens=config.tokens),
            parse,
            answer_tokens=20 + 8 * config.max_words,
            opening='{"label": "',
        )
        for e in evidence
    ]


def checked_label(answer: str, *, max_words: int, max_length: int) -> str:
    """The label in a model's answer.

    Args:
        answer: JSON, ``{"label": "..."}``.
        max_words: it may have.
        max_length: characters it may have.

    Raises:
        ValueError: it is not such an answer, or the label is not a short line of plain text.
    """
    text = field_of(answer, "label")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("The answer's label is not a text.")
    text = text.strip()
    if not text.isprintable() or len(text) > max_length or len(text.split()) > max_words:
        raise ValueError(
            f"The answer's label is not one line of at most {max_words} words and {max_length} characters."
        )
    return text


def statistics_label(evidence: Evidence, config: LabelConfig) -> str:
    """At or before which tokens it fires most, compared with chance.

    Of each table, tokens are ranked by ``recall · PMI``; the table whose first three sum to more is shown.
    """
    ranked = {}
    for name, table in (("at", evidence.inputs), ("before", evidence.outputs)):
        gain = (table["recall"] * table["pmi"]).sort_values(ascending=False, kind="stable").head(3)
        ranked[name] = gain[gain > 0]
    name, gain = max(ranked.items(), key=lambda item: item[1].sum())
    table = evidence.inputs if name == "at" else evidence.outputs
    texts = [f"{table['token'][i]!r} {table['recall'][i]:.0%}" for i in gain.index]
    while texts and len(f"{name} {', '.join(texts)}") > config.max_length:
        texts.pop()
    return f"{name} {', '.join(texts)}" if texts else "no token more than by chance"
