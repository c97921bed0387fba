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

from collections.abc import Callable
from dataclasses import dataclass

from tl_vpd.baselines.apd import APDConfig, apd
from tl_vpd.baselines.rank_one import vpd
from tl_vpd.baselines.spd import SPDConfig, spd
from tl_vpd.evaluation.ground_truth import MethodResult
from tl_vpd.training import VPDConfig


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        config: the class of its config.
        run: takes a model, its data and a config; and by keyword a folder (VPD and SPD store states in it, and continue from it),
            ``progress`` (show a bar) and ``compile`` (run VPD's and SPD's passes as compiled graphs).
    """

    config: type[VPDConfig] | type[APDConfig]
    run: Callable[..., MethodResult]


METHODS = {
    "vpd": Method(VPDConfig, vpd),
    "spd": Method(SPDConfig, spd),
    "apd": Method(APDConfig, apd),
}
