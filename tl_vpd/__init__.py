"""tl_vpd: adVersarial Parameter Decomposition for TransformerLens.

>>> run = tl_vpd.decompose(model, tokens, tl_vpd.VPDConfig(steps=20_000))     # doctest: +SKIP
>>> with run.decomposition.attach(model) as attached:                         # doctest: +SKIP
...     logits, cache = model.run_with_cache(tokens)

The rooms ``analysis``, ``baselines``, ``bundled``, ``editing``, ``evaluation``, ``formats``, ``planning``, ``toys`` and ``viz``,
and what they put at the top, are loaded when they are first used.
"""

import importlib
from typing import Any

import tl_vpd.openmp  # noqa: F401  # first: what it sets is read when PyTorch is loaded
from tl_vpd.adapters import Unsupported, sites
from tl_vpd.decomposition import Decomposition
from tl_vpd.hooks import Attached, CausalImportances
from tl_vpd.importance import GammaConfig
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.publishing import CardConfig
from tl_vpd.site import Site, Subcomponent
from tl_vpd.training import (
    AdversaryConfig,
    Coefficients,
    ExecutionConfig,
    FaithfulnessConfig,
    MinimalityConfig,
    OptimizerConfig,
    Run,
    SavingConfig,
    TargetedConfig,
    VPDConfig,
    decompose,
    decompose_targeted,
)

__all__ = [
    "AdversaryConfig",
    "Attached",
    "CardConfig",
    "CausalImportances",
    "Coefficients",
    "Decomposition",
    "Evaluation",
    "EvaluationConfig",
    "ExecutionConfig",
    "FaithfulnessConfig",
    "GammaConfig",
    "Masks",
    "MinimalityConfig",
    "OptimizerConfig",
    "Run",
    "SavingConfig",
    "Site",
    "SiteMask",
    "Subcomponent",
    "TargetedConfig",
    "Unsupported",
    "VPDConfig",
    "attribution_graph",
    "compare",
    "decompose",
    "decompose_targeted",
    "evaluate",
    "harvest",
    "prune",
    "sites",
]

_ROOMS = ("analysis", "baselines", "bundled", "editing", "evaluation", "formats", "planning", "toys", "viz")
_AT_THE_TOP = {
    "Evaluation": "evaluation",
    "EvaluationConfig": "evaluation",
    "attribution_graph": "analysis",
    "compare": "baselines",
    "evaluate": "evaluation",
    "harvest": "analysis",
    "prune": "analysis",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"tl_vpd.{name}")
    if name in _AT_THE_TOP:
        return getattr(importlib.import_module(f"tl_vpd.{_AT_THE_TOP[name]}"), name)
    raise AttributeError(f"module 'tl_vpd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
