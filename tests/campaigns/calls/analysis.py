"""Calls of ``tl_vpd.analysis`` and of its results."""

from __future__ import annotations

from typing import Any

import numpy as np

import tl_vpd
from tests.campaigns.calls import edges
from tests.campaigns.calls.kinds import (
    SEED,
    Kind,
    any_of,
    boolean,
    choice,
    device,
    either,
    equal,
    factor,
    folder_to_write,
    how_many,
    integer,
    number,
    only,
    optional,
    own,
    path_to_read,
    plain,
    positions,
    sequence,
    subcomponents,
)
from tests.campaigns.calls.world import OUT, Call, Q, World, call, metric
from tl_vpd import analysis

REFERENCES = ("zero", "mean", "resample", "corrupted")


def calls(w: World) -> list[Call]:
    """The table."""
    return [*_functions(w), *_circuits(w), *_configs(w), *_results(w), *edges.calls(w)]


def config(kind: type, **settings: Any) -> tuple[Any, Kind]:
    """A config as an argument."""
    value = kind(**settings)
    return value, lambda v: v is None or isinstance(v, kind)


def _functions(w: World) -> list[Call]:
    target: Kind = lambda v: _target(v)  # noqa: E731
    mask = w.of_prompts
    return [
        call(
            tl_vpd.attribution_graph,
            **w.of_prompt,
            targets=(3, any_of(target, optional(sequence(target)))),
            pos=(-1, integer(-5, 4)),
            config=config(analysis.GraphConfig),
        ),
        call(
            analysis.dataset_graph,
            **mask,
            subcomponents=([f"{Q}:1", f"{OUT}:2"], w.several),
            config=config(analysis.DatasetGraphConfig),
        ),
        call(
            analysis.harvest,
            **mask,
            subcomponents=([f"{Q}:1"], w.several),
            config=config(analysis.HarvestConfig, windows=2, radius=2),
        ),
        call(
            analysis.ablation_table,
            **mask,
            metric=(metric, own(metric)),
            subcomponents=([f"{Q}:1"], w.several),
            config=config(analysis.AblationTableConfig),
        ),
        call(
            analysis.pick,
            harvest=(w.harvest, only(w.harvest)),
            n=(2, integer(1)),
            min_firings=(1, lambda v: None if integer(2)(v) is not False else integer(1, 1)(v)),
            max_density=(1.0, either(number(0.9, 1))),
        ),
    ]


def _target(value: Any) -> bool | None:
    """A token, a pair of tokens or a probability."""
    token = integer(0, 10)
    if isinstance(value, tuple):
        return len(value) == 2 and all(token(v) for v in value)
    if token(value):
        return True
    value = plain(value)
    return None if isinstance(value, float) and 0 <= value <= 1 else False


def _circuits(w: World) -> list[Call]:
    behaviour: Kind = lambda v: v is None or _target(v)  # noqa: E731
    prune = config(analysis.PruneConfig, steps=2, adversary_steps=1)
    node = subcomponents(w.counts, minimum=0)
    common = {
        **w.target,
        "prompts": w.of_prompts["prompts"],
        "nodes": ([f"{Q}:1"], either(node)),
        "metric": (metric, own(metric)),
        "reference_prompts": (None, optional(w.of_prompts["prompts"][1])),
        "attention_mask": w.of_prompts["attention_mask"],
    }
    audit = config(analysis.AuditConfig, ablations=("zero",), budgets=(1,), restarts=1, controls=0)
    repair = config(analysis.RepairConfig, steps=1, restarts=1, max_added=1, candidates=1)
    optional_target = {**common, "decomposition": (w.vpd, lambda v: None if v is None else v is w.vpd)}
    groups = {"one": [f"{Q}:1@2"]}
    return [
        call(analysis.audit_circuit, **optional_target, config=audit),
        call(analysis.repair_circuit, **optional_target, config=repair),
        call(
            analysis.prune,
            **w.of_prompt,
            behaviour=(3, behaviour),
            pos=(-1, integer(-5, 4)),
            coefficient=(0.05, number(0)),
            config=prune,
        ),
        call(
            analysis.prune_sweep,
            pos=(-1, integer(-5, 4)),
            **w.of_prompt,
            behaviour=(3, behaviour),
            coefficients=([0.05], sequence(number(0))),
            config=prune,
        ),
        call(
            analysis.ablate_nodes,
            **w.target,
            circuit=(w.circuit, only(w.circuit)),
            groups=(groups, lambda v: v is groups or (None if equal({})(v) else False)),
            behaviour=(3, behaviour),
        ),
    ]


def _configs(w: World) -> list[Call]:
    step = {"step_size": (0.5, optional(number(above=0))), "restarts": (2, integer(1)), "seed": (3, SEED)}
    attack = {
        **step,
        "lower_is_better": (False, boolean),
        "per_position": (False, boolean),
        "reference": ("zero", choice(*REFERENCES)),
        "among": (["blocks.0.*"], lambda v: True if v is None else (None if equal([], ())(v) else _texts(v))),
    }
    return [
        call(
            analysis.AblationTableConfig,
            pos=(None, either(positions(7))),
            amount=(0.5, factor),
            threshold=(0.25, number(0, 1)),
            rows=(3, integer(1)),
            progress=(False, boolean),
        ),
        call(
            analysis.GraphConfig,
            threshold=(0.25, number(0, 1)),
            min_weight=(0.25, number(0)),
            importances=(True, lambda v: boolean(v) and (True if v is True else None)),
            fixed=(("norms",), lambda v: None if _texts(v) is not False or equal((), [])(v) else False),
            tokens_at_once=(3, integer(1)),
            progress=(False, boolean),
        ),
        call(
            analysis.DatasetGraphConfig,
            absolute=(False, boolean),
            batch_size=(3, integer(1)),
            progress=(False, boolean),
        ),
        call(
            analysis.HarvestConfig,
            windows=(3, integer(1)),
            radius=(3, integer(0)),
            threshold=(0.25, lambda v: None if number(1, 1)(v) else number(0, 1)(v)),
            batch_size=(3, integer(1)),
            bins=(3, integer(0)),
            samples=(3, how_many),
            seed=(3, SEED),
            lags=(3, optional(integer(0))),
            memory=(3, integer(1)),
            first_row=(3, integer(0)),
        ),
        call(
            analysis.AuditConfig,
            **attack,
            ablations=(["zero"], sequence(choice(*REFERENCES, "stochastic", "adversarial"))),
            budgets=([3], sequence(integer(1))),
            draws=(3, integer(1)),
            controls=(3, integer(0)),
        ),
        call(
            analysis.RepairConfig,
            **attack,
            target=(0.5, either(number(0, 1))),
            steps=(3, integer(1)),
            max_added=(3, integer(0)),
            candidates=(3, integer(1)),
        ),
        call(
            analysis.PruneConfig,
            variant=("adversarial", choice("adversarial", "importances_only")),
            steps=(3, integer(1)),
            lr=(0.5, number(above=0)),
            warm_up=(0.5, number(0, 1)),
            p=(0.5, number(above=0)),
            adversary_steps=(3, integer(0)),
            adversary_step_size=(0.5, number(above=0)),
            reach=("alive_and_deltas", either(choice("alive_and_deltas"))),
            seed=(3, SEED),
            recorded=(None, optional(boolean)),
            progress=(False, boolean),
        ),
        call(
            analysis.Node,
            name=(Q, lambda v: None if isinstance(v, str) else False),
            index=(3, optional(integer(0, 2**64 - 1, size=False))),
            pos=(3, optional(integer(0, 2**64 - 1, size=False))),
        ),
    ]


def _texts(value: Any) -> bool | None:
    if isinstance(value, str):
        return None
    many = isinstance(value, list | tuple | np.ndarray) and len(value) > 0
    return None if many and all(isinstance(v, str) for v in value) else False


def _results(w: World) -> list[Call]:
    graph, harvest = w.graph, w.harvest
    one, audit = harvest[harvest.to_pandas()["subcomponent"][0]], w.audit
    node = str(graph.subcomponents()[0])
    exists: Kind = lambda v: True if equal(node)(v) else _node(v, len(graph))  # noqa: E731
    address = str(one.subcomponent)
    by = choice("pmi", "recall")
    return [
        call(graph.number, node=(node, exists)),
        call(graph.top_edges, k=(3, how_many), source=(None, optional(exists)), target=(None, optional(exists))),
        call(graph.paths, target=(None, optional(either(exists))), k=(3, how_many)),
        call(graph.subgraph, nodes=([node], either(sequence(exists)))),
        call(graph.pruned, nodes=(3, optional(how_many)), min_weight=(0.25, number(0))),
        call(
            lambda folder: graph.save(folder) and None,
            "analysis: AttributionGraph.save",
            folder=(w.folder / "new_graph", folder_to_write),
        ),
        call(
            analysis.AttributionGraph.load, folder=(w.saved_graph, path_to_read(w.saved_graph)), device=("cpu", device)
        ),
        call(harvest.top, k=(3, how_many)),
        call(
            lambda address: harvest[address].to_pandas(),
            "analysis: Harvest[…]",
            address=(address, subcomponents(w.counts, lists=False)),
        ),
        call(one.input_tokens, k=(3, how_many), by=("pmi", by), min_count=(1, integer(0))),
        call(one.output_tokens, k=(3, how_many), by=("pmi", by), min_count=(1, integer(0))),
        call(audit.top, k=(3, how_many), steps=(None, optional(integer(2, 2)))),
        call(audit.value, ablation=("adversarial", choice("adversarial", "zero")), steps=(2, optional(integer(2, 2)))),
        call(w.circuit.top, k=(3, how_many)),
    ]


def _node(value: Any, n: int) -> bool | None:
    """A node's number, or an address that may exist."""
    from tl_vpd.analysis import Node

    if integer(0, n - 1)(value):
        return True
    if integer(-n, -1)(value):
        return None
    return None if isinstance(value, str | Node) and ":" in str(value) else False
