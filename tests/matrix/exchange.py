"""The check of cells about files: a decomposition made on one class attaches to every other class of the same weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

import pytest
import torch

from tests.matrix import oracle
from tests.matrix.checks import Case, close, moved
from tests.matrix.models import PROCESSING, UNPROCESSED, Absent, Kind, build, kinds_here
from tests.tiny import decomposition_of
from tl_vpd import Decomposition

PROCESSED = dict.fromkeys(PROCESSING, True)


@torch.no_grad()
def one_file_for_every_class(case: Case) -> None:
    """Importances and masked logits are equal through a file, and weights processed otherwise are refused by name."""
    others: list[Kind] = [kind for kind in kinds_here() if kind not in (case.kind, "native")]
    if case.kind == "native" or case.family in ("attention only", "SoLU", "no norm"):
        raise Absent("no other class has this model")
    if not others:
        raise Absent("this version has no other class")
    for processing, opposite in ((UNPROCESSED, PROCESSED), (PROCESSED, UNPROCESSED)):
        mine = build(case.family, case.kind, case.dtype, processing=processing)
        with tempfile.TemporaryDirectory() as folder:
            decomposition_of(mine).save(folder)
            vpd = Decomposition.load(folder)
        ci = vpd.causal_importances(mine, case.tokens)
        masks = ci.masks("stochastic", seed=0, delta=0.3)
        with vpd.attach(mine) as attached, attached.masked(masks):
            expected = case.logits(mine)
        moved("masked logits", expected, case.logits(mine))
        for kind in others:
            other = build(case.family, kind, case.dtype, processing=processing)
            result = vpd.causal_importances(other, case.tokens)
            close(f"importances on {kind}", result.concatenated, ci.concatenated, 2e-5)
            with vpd.attach(other) as attached, attached.masked(masks):
                close(f"masked logits on {kind}", oracle.logits_of(other(case.tokens)), expected, 1e-4)
        for kind in (case.kind, *others):
            _refused_by_name(vpd, build(case.family, kind, case.dtype, processing=opposite), processing, opposite)


def _refused_by_name(
    vpd: Decomposition, model: torch.nn.Module, then: Mapping[str, bool], now: Mapping[str, bool]
) -> None:
    said = rf"made with .*fold_ln={then['fold_ln']}.*this model has .*fold_ln={now['fold_ln']}"
    with pytest.raises(ValueError, match=said):
        vpd.attach(model).detach()
