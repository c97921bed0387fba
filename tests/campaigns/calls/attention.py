"""Calls of ``tl_vpd.analysis.attention`` and of its results."""

from __future__ import annotations

from typing import Any

from tests.campaigns.calls.analysis import config
from tests.campaigns.calls.kinds import (
    SEED,
    Kind,
    choice,
    either,
    equal,
    factor,
    how_many,
    integer,
    number,
    only,
    optional,
    sequence,
    subcomponents,
)
from tests.campaigns.calls.world import Call, K, Q, World, call
from tl_vpd.analysis import attention


def calls(w: World) -> list[Call]:
    """The table."""
    return [*_functions(w), *_results(w)]


def _functions(w: World) -> list[Call]:
    layer = {**w.of_prompts, "layer": (0, integer(0, 1))}
    of_first = {**layer, "layer": (0, lambda v: None if integer(1, 1)(v) else integer(0, 0)(v))}
    own = [site for site in w.counts if site in (Q, K)]
    of_layer = subcomponents({site: w.counts[site] for site in own}, none=True)
    address = subcomponents(w.counts, lists=False)
    pairs = [(f"{Q}:1", f"{K}:2")]
    pair: Kind = lambda v: True if equal(pairs[0])(v) else _pair(v, address)  # noqa: E731
    return [
        call(attention.score_terms, **of_first, pairs=(pairs, sequence(pair, minimum=0))),
        call(
            attention.attention_by_offset,
            **layer,
            ablate=(pairs, either(lambda v: sequence(pair, minimum=0)(v) or address(v))),
            max_offset=(3, integer(0)),
        ),
        call(
            attention.mean_strengths,
            **of_first,
            subcomponents=([f"{Q}:1", f"{K}:2"], either(of_layer)),
            max_offset=(3, integer(0)),
        ),
        call(
            attention.static_strengths,
            **of_first,
            subcomponents=([f"{Q}:1", f"{K}:2"], either(of_layer)),
            length=(5, optional(integer(1, 10))),
        ),
        call(attention.strongest_static, **layer, k=(3, how_many), length=(5, optional(integer(1, 10)))),
        call(
            attention.ov_overlap,
            **of_first,
            key=(f"{K}:1", either(optional(equal(f"{K}:1")))),
            config=config(attention.OVConfig, draws=2),
        ),
        call(attention.value_given_key, **layer, threshold=(0.25, number(0, 1))),
        call(attention.head_alignment, **w.target, layer=(0, integer(0, 1))),
        call(attention.head_norms, decomposition=(w.vpd, only(w.vpd)), layer=(0, integer(0, 1))),
        call(attention.OVConfig, threshold=(0.25, number(0, 1)), draws=(3, integer(1)), seed=(3, SEED)),
        call(
            attention.random_overlap,
            d_model=(8, lambda v: None if integer(1, 3)(v) else integer(4)(v)),
            d_head=(4, lambda v: integer(1, 8)(v) or (None if integer(9)(v) is not False else False)),
        ),
        call(
            lambda **o: w.hooked(lambda: attention.pair_ablation_hooks(**o)),
            "attention: pair_ablation_hooks",
            **w.target,
            pairs=(pairs, either(sequence(pair))),
            length=(8, lambda v: None if integer(11)(v) is not False else optional(integer(7, 10))(v)),
            amount=(0.5, factor),
        ),
    ]


def _pair(value: Any, address: Kind) -> bool | None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return None if all(address(v) is not False or equal("bias")(v) for v in value) else False


def _results(w: World) -> list[Call]:
    prompts = dict(decomposition=w.vpd, model=w.model, prompts=w.tokens, layer=0)
    mean = attention.mean_strengths(**prompts, subcomponents=[f"{Q}:1", f"{K}:2"], max_offset=3)
    norms, values = attention.head_norms(w.vpd, 0), attention.value_given_key(**prompts)
    static = attention.static_strengths(**prompts, subcomponents=[f"{Q}:1", f"{K}:2"], length=4)
    overlap = attention.ov_overlap(**prompts, config=attention.OVConfig(draws=2))
    offsets = attention.attention_by_offset(**prompts)
    k, head, offset = (3, how_many), (0, optional(integer(0, 1))), (1, integer(0, 3))
    return [
        call(mean.contrast, offset=(1, either(integer(0, 3)))),
        call(mean.heads, query=(f"{Q}:1", equal(f"{Q}:1")), key=(f"{K}:2", equal(f"{K}:2")), offset=offset),
        call(mean.top, k=k, offset=offset, head=head),
        call(mean.to_pandas, offset=offset),
        call(norms.top, k=k, head=head),
        call(static.top, k=k),
        call(w.terms.top, k=k),
        call(offsets.top, k=k),
        call(overlap.top, k=k, by=("read", choice("read", "write", "raw"))),
        call(values.top, k=k, min_both=(1, integer(0))),
        call(values.to_pandas, min_both=(1, integer(0))),
    ]
