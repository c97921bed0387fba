"""Calls of ``tl_vpd.evaluation``'s nulls, of the redundancy test, and of data beside a target."""

from __future__ import annotations

import torch
from torch import Tensor

import tl_vpd
from tests.campaigns.calls.analysis import config
from tests.campaigns.calls.kinds import (
    SEED,
    Kind,
    boolean,
    either,
    integer,
    number,
    only,
    optional,
    sequence,
    subcomponents,
    tokens,
)
from tests.campaigns.calls.world import Call, Q, World, call
from tests.tiny import GAMMA, some_tokens
from tl_vpd import evaluation


def calls(w: World) -> list[Call]:
    """The table."""
    prompts = {**w.target, "prompts": w.of_prompts["prompts"]}
    six = some_tokens(3, (6, 7))
    labels = (torch.arange(six.numel()) % 2).view_as(six)
    other = {"other": w.tokens}
    small = tl_vpd.VPDConfig(steps=1, batch_size=2, C=3, gamma=GAMMA, faithfulness={"warm_up_steps": 1})
    one = subcomponents(w.counts, lists=False)
    return [
        call(
            lambda **o: evaluation.probe_null(**o).to_pandas(),
            "evaluation: probe_null",
            **w.target,
            prompts=(six, tokens(rows=6)),
            labels=(labels, _labels(labels)),
            test_share=(0.5, either(number(0.5, 0.5))),
            batch_size=(2, integer(1)),
            seed=(3, SEED),
        ),
        call(
            lambda **o: evaluation.redundancy(**o).to_pandas(),
            "evaluation: redundancy",
            **prompts,
            subcomponents=([f"{Q}:1"], optional(either(sequence(one)))),
            rows=(1, integer(1)),
            batch_size=(2, integer(1)),
            seed=(3, SEED),
        ),
        call(
            lambda **o: dict(evaluation.untrained(**o).file_tensors()),
            "evaluation: untrained",
            decomposition=(w.vpd, only(w.vpd)),
            seed=(3, SEED),
        ),
        call(
            lambda **o: dict(evaluation.shuffled_model(**o).named_parameters()),
            "evaluation: shuffled_model",
            model=(w.model, only(w.model)),
            sites=(None, w.sites),
            seed=(3, SEED),
        ),
        call(
            lambda **o: evaluation.decompose_shuffled(**o) and None,
            "evaluation: decompose_shuffled",
            model=(w.model, only(w.model)),
            tokens=(w.tokens, either(tokens(rows=2))),
            config=(small, only(small)),
            seed=(3, SEED),
            execution=config(tl_vpd.ExecutionConfig),
            saving=config(tl_vpd.SavingConfig),
            progress=(False, boolean),
        ),
        call(evaluation.nontarget, **w.target, data=(other, only(other)), config=(w.cheap, optional(only(w.cheap)))),
    ]


def _labels(labels: Tensor) -> Kind:
    """The classes of the tokens; others of the same shape may leave a row without one."""

    def verdict(value: object) -> bool | None:
        if value is labels:
            return True
        right = isinstance(value, Tensor) and value.shape == labels.shape and value.device == labels.device
        return None if right and not value.is_floating_point() and not value.is_complex() else False

    assert torch.equal(labels.unique(), torch.tensor([0, 1]))
    return verdict
