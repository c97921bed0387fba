"""VPD and what it is compared with, behind one interface: a model, its data and a config in; pieces with importances out.

======  ===================================================================================================================
name    method
======  ===================================================================================================================
vpd     adVersarial Parameter Decomposition: ``tl_vpd.decompose``
spd     Stochastic Parameter Decomposition (arXiv 2506.20790), as a configuration of the same trainer: stochastic masks on all
        sites and layerwise, a small MLP a subcomponent for Γ, no adversary (``spd_config``)
apd     Attribution-based Parameter Decomposition (arXiv 2501.14926): ``tl_vpd.baselines.apd``, for models of vectors
======  ===================================================================================================================

    >>> found = METHODS["spd"].run(model, data, spd_config(steps=40_000, C=20))          # doctest: +SKIP
    >>> found.pieces("embed"), found.importances(inputs)                                # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tl_vpd.baselines.apd import APDConfig, apd
from tl_vpd.baselines.rank_one import RankOne
from tl_vpd.baselines.spd import SPDConfig
from tl_vpd.evaluation.ground_truth import MethodResult
from tl_vpd.training import ExecutionConfig, SavingConfig, VPDConfig, decompose
from tl_vpd.training.data import Batches


@dataclass(frozen=True)
class Method:
    """A way to take a model's weights apart.

    ``config``: what it is set with. ``run``: ``(model, data, config, out=None, progress=False, compile=False)``; with a folder
    ``out``, VPD and SPD go on where an earlier run was interrupted, and they alone can compile their passes.
    """

    name: str
    config: type[VPDConfig] | type[APDConfig]
    run: Callable[..., MethodResult]


def _vpd(
    model: nn.Module,
    data: Batches,
    config: VPDConfig,
    *,
    out: Path | None = None,
    progress: bool = False,
    compile: bool = False,
) -> RankOne:
    resume = out is not None and any(out.glob("state/step-*"))
    run = decompose(
        model,
        data,
        config,
        execution=ExecutionConfig(compile=compile),
        saving=None if out is None else SavingConfig(folder=out, save_every=1_000, keep_states=1),
        resume=resume,
        progress=progress,
    )
    if not run.finished:
        raise KeyboardInterrupt
    return RankOne(run.decomposition, model)


def _spd(model: nn.Module, data: Batches, config: SPDConfig, **how: Any) -> RankOne:
    if config.coefficients.adversarial:
        raise ValueError("SPD has no adversary: set coefficients.adversarial to 0, or ask for vpd.")
    return _vpd(model, data, config, **how)


def _apd(
    model: nn.Module,
    data: Batches,
    config: APDConfig,
    *,
    out: Path | None = None,
    progress: bool = False,
    compile: bool = False,
) -> MethodResult:
    if compile:
        raise ValueError("APD's trainer has nothing to compile: leave compile out.")
    return apd(model, data, config, progress=progress)


METHODS = {
    "vpd": Method("vpd", VPDConfig, _vpd),
    "spd": Method("spd", SPDConfig, _spd),
    "apd": Method("apd", APDConfig, _apd),
}
