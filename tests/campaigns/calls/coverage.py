"""Which public calls and arguments the table lacks."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from tests.campaigns.calls.world import Call

ROOMS = {
    "analysis": "tl_vpd.analysis",
    "attention": "tl_vpd.analysis.attention",
    "baselines": "tl_vpd.baselines",
    "bundled": "tl_vpd.bundled",
    "evaluation": "tl_vpd.evaluation",
    "formats": "tl_vpd.formats",
    "hooks": "tl_vpd.hooks",
    "masking": "tl_vpd.masking",
    "planning": "tl_vpd.planning",
    "toys": "tl_vpd.toys",
    "training": "tl_vpd.training",
    "viz": "tl_vpd.viz",
}
RESULTS = "what calls return: users read them and do not make them"
INNER = "one step of a training loop, called thousands of times with tensors that the package makes: shapes are checked in tests"
CONFIG = "read from its fields by calls.configs"
PLAIN = "plain arithmetic on tensors"
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(
        [
            "AttentionByOffset",
            "AttributionGraph",
            "Attack",
            "AttackResult",
            "CausalImportances",
            "Check",
            "CircuitAudit",
            "ClusterEnsemble",
            "Clustering",
            "Column",
            "Columns",
            "Component",
            "Comparison",
            "ComponentActs",
            "DatasetGraph",
            "EdgeScores",
            "Evaluation",
            "Firings",
            "Footprint",
            "Harvest",
            "HeadNorms",
            "LogitEffects",
            "LabelScores",
            "MeanStrengths",
            "OVOverlap",
            "Panel",
            "Patterns",
            "ProbeNull",
            "PruneSweep",
            "PrunedCircuit",
            "RankOne",
            "Redundancy",
            "Repair",
            "Run",
            "Sample",
            "ScoreTerms",
            "SiteTruth",
            "StaticStrengths",
            "StepMetrics",
            "SubcomponentHarvest",
            "Target",
            "Truth",
            "ValueGivenKey",
            "Window",
        ],
        RESULTS,
    ),
    **dict.fromkeys(
        ["PersistentSources", "TargetedTrainer", "Trainer", "masks_from_sources", "restarted_pgd", "rows_of_slots"],
        INNER,
    ),
    **dict.fromkeys(["pattern_of", "spread_over_heads"], PLAIN),
    "AblationTableConfig(values)": "checked where it is used, against the sites at hand",
    "Attached": "made by Decomposition.attach, which is in the table",
    "Toy": "a protocol",
    "decompose_targeted(saving)": "as of decompose",
    "edit_page": "its panels and its page are in the table by themselves",
    "edit_panels": "an edit's evaluation is tried by tests.editing.wrong_calls",
    "apd(folder)": "as of decompose",
    "spd(data)": "as decompose's tokens; what does not fit the toy's own forward is its error",
    "spd(folder)": "as of decompose",
    "attack(span)": INNER,
    "attacked_masks(g)": INNER,
    "attacked_masks(generator)": INNER,
    "attacked_masks(site_axis)": INNER,
    "constant_masks(mask)": INNER,
    "constant_masks(site_axis)": INNER,
    "LocalModel": "takes a language model of transformers, which its tests have",
    "evaluation": "takes nothing",
    "load_circuit_tracer_transcoders": "files of others, damaged in tests.formats.test_transcoders",
    "load_paper_transcoders": "as load_circuit_tracer_transcoders",
    "load_param_decomp": "tried by the campaigns of damaged files",
    "load_saelens": "as load_circuit_tracer_transcoders",
    "save_param_decomp": "tried by the campaigns of damaged files",
    "sampled(importances)": INNER,
    "smollm2": "needs a package that is not a dependency",
    "spd_config": "the same as SPDConfig, which is in the table",
    "vpd": "decompose and RankOne, both in the table",
}
"""Public names, or arguments, that the table leaves out, each with the reason."""


def lacking(calls: list[Call]) -> Iterator[str]:
    """Public calls and arguments that are neither in the table nor left out with a reason.

    Args:
        calls: the table.
    """
    arguments: dict[str, set[str]] = defaultdict(set)
    for call in calls:
        arguments[re.split(r"[(.\[]", call.name.partition(": ")[2])[0]] |= set(call.arguments)
    for room, module in ROOMS.items():
        for name in importlib.import_module(module).__all__:
            value = getattr(importlib.import_module(module), name)
            if not callable(value) or name in LEFT_OUT:
                continue
            if name not in arguments:
                yield f"{room}: {name}"
                continue
            for parameter in _parameters(value):
                if parameter not in arguments[name] and f"{name}({parameter})" not in LEFT_OUT:
                    yield f"{room}: {name}({parameter})"


def _parameters(value: Any) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in inspect.signature(value).parameters.values() if p.kind not in kinds]
