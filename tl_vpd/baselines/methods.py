"""VPD and the methods it is compared with, behind one interface: a model, its data and a config in; pieces with importances out.

======  ===================================================================================================================
name    method
======  ===================================================================================================================
vpd     adVersarial Parameter Decomposition: ``tl_vpd.decompose``
spd     Stochastic Parameter Decomposition (arXiv 2506.20790): ``tl_vpd.baselines.spd``
apd     Attribution-based Parameter Decomposition (arXiv 2501.14926), for models of vectors: ``tl_vpd.baselines.apd``
======  ===================================================================================================================

    >>> result = METHODS["spd"].run(model, data, spd_config(steps=40_000, C=20))         # doctest: +SKIP
    >>> result.pieces("embed"), result.importances(inputs)                               # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from tl_vpd.baselines.apd import APDConfig, apd
from tl_vpd.baselines.rank_one import vpd
from tl_vpd.baselines.spd import SPDConfig, spd
from tl_vpd.evaluation.ground_truth import MethodResult
from tl_vpd.training import VPDConfig
from tl_vpd.training.data import Batches


@runtime_checkable
class Decompose(Protocol):
    """How a method is called."""

    def __call__(
        self,
        model: nn.Module,
        data: Batches,
        config: Any,
        *,
        folder: Path | None = None,
        progress: bool = False,
        compile: bool = False,
    ) -> MethodResult:
        """Decomposes a model.

        Args:
            model: the target.
            data: what it is decomposed on.
            config: the method's.
            folder: where VPD and SPD store states, and from which an interrupted run continues (None: nowhere).
            progress: show a bar.
            compile: run VPD's and SPD's passes as compiled graphs.
        """


@dataclass(frozen=True)
class Method:
    """A method, the class of its config, and how it is called."""

    name: str
    config: type[VPDConfig] | type[APDConfig]
    run: Decompose


METHODS = {
    "vpd": Method("vpd", VPDConfig, vpd),
    "spd": Method("spd", SPDConfig, spd),
    "apd": Method("apd", APDConfig, apd),
}
