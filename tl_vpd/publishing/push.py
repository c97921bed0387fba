"""A decomposition, its report and its card in one commit to the Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tl_vpd.components.storage import CONFIG, TENSORS
from tl_vpd.files.hub import check_login, check_push, upload
from tl_vpd.importance.decomposed import DecomposedWeights
from tl_vpd.publishing.card import model_card
from tl_vpd.publishing.config import CardConfig, Report

README, METRICS = "README.md", "metrics.json"


def push(
    weights: DecomposedWeights,
    repository: str,
    *,
    report: Report | None = None,
    card: CardConfig | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Pushes a decomposition; see ``tl_vpd.Decomposition.push_to_hub``.

    A ``metrics.json`` that is there is removed where no report comes: it is of other weights.
    """
    check_push(repository, private=private, revision=revision)
    text = str(model_card(weights, repository, report=report, config=card))
    check_login(repository)
    with tempfile.TemporaryDirectory() as name:
        folder = weights.write(Path(name))
        files: dict[str, Path | bytes] = {file: folder / file for file in (TENSORS, CONFIG)}
        if report is not None:
            report.save(folder / METRICS)
            files[METRICS] = folder / METRICS
        return upload(
            repository,
            {**files, README: text.encode()},
            key=TENSORS,
            absent=() if METRICS in files else (METRICS,),
            private=private,
            revision=revision,
        )
