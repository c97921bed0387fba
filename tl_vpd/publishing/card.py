"""The card of a decomposition: what it is of, how to load it, what was measured, and what may be claimed from that.

    >>> model_card(vpd, "user/repo", report=report).save("README.md")               # doctest: +SKIP

Everything on it comes from the decomposition's record, its shapes, a report and a ``CardConfig``; nothing is measured here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tl_vpd.checks import config_of
from tl_vpd.files.hub import check_repository
from tl_vpd.importance.decomposed import DecomposedWeights
from tl_vpd.publishing.config import CardConfig, Report, check_report
from tl_vpd.publishing.figures import certificate_section, evaluation_section
from tl_vpd.publishing.loading import loading_section
from tl_vpd.publishing.sections import (
    claims_section,
    gamma_section,
    licence_section,
    remake_section,
    title_section,
    versions_section,
)

LIBRARY = "tl_vpd"
TAGS = ("interpretability", "mechanistic-interpretability", "parameter-decomposition", "transformer-lens")


def model_card(
    weights: DecomposedWeights,
    repository: str | None = None,
    *,
    report: Report | None = None,
    config: CardConfig | None = None,
) -> ModelCard:
    """The card of a decomposition.

    Args:
        weights: the decomposition.
        repository: where it will be on the Hub (None: the card loads it from a folder).
        report: its evaluation (None: the card says that it was not evaluated).
        config: licences and names.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the report is of another decomposition, or the repository's name is not one.
    """
    config = config_of(CardConfig, config)
    if repository is not None:
        check_repository(repository, with_user=True)
    if report is not None:
        check_report(report, weights.counts)
    base_model = config.base_model or _hub_name(weights.record)
    data = ModelCardData(
        library_name=LIBRARY,
        license=config.licence,
        base_model=base_model,
        datasets=list(config.datasets) or None,
        tags=list(TAGS),
    )
    sections = [
        title_section(weights, base_model, report),
        loading_section(weights, base_model, repository),
        evaluation_section(report),
        certificate_section(weights.record),
        gamma_section(weights.gamma_config),
        claims_section(weights.record, report),
        licence_section(config),
        remake_section(weights.record),
        versions_section(weights.record),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _hub_name(record: Any) -> str | None:
    """The target's name in the record, where it has the form of the Hub's and is not a folder on this machine."""
    target = record.get("target")
    name = target.get("name") if isinstance(target, dict) else None
    one = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII)
    return name if one and not Path(str(name)).exists() else None
