"""Calls of ``tl_vpd.training``, ``planning``, ``recipe``, ``toys``, ``baselines`` and ``bundled``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import tl_vpd
from tests.campaigns.calls.analysis import config
from tests.campaigns.calls.kinds import (
    SEED,
    Kind,
    boolean,
    choice,
    device,
    either,
    integer,
    number,
    only,
    optional,
    path_to_read,
    patterns,
    sequence,
    text,
    tokens,
)
from tests.campaigns.calls.world import Call, World, call
from tests.tiny import GAMMA
from tl_vpd import baselines, bundled, planning, recipe, toys, training


def calls(w: World) -> list[Call]:
    """The table."""
    return [*_training(w), *_planning(w), *_toys(w), *_bundled(w)]


def _training(w: World) -> list[Call]:
    model = ("model", (w.model, only(w.model)))
    short = dict(steps=1, batch_size=2, C=3, gamma=GAMMA, faithfulness={"warm_up_steps": 1})
    small = tl_vpd.VPDConfig(**short)
    shape = planning.TransformerShape(layers=1, d_model=8, heads=2, d_mlp=8, vocabulary=11)
    del shape
    return [
        call(
            lambda **o: tl_vpd.decompose(**o).decomposition,
            "training: decompose",
            model=model[1],
            tokens=(w.tokens, either(tokens(rows=2))),
            config=(small, only(small)),
            execution=config(tl_vpd.ExecutionConfig),
            saving=config(tl_vpd.SavingConfig),
            resume=(False, lambda v: True if v is False else (None if v is True else boolean(v) and None)),
            context=(None, lambda v: True if v is None else (None if integer(2)(v) is not False else False)),
            progress=(False, boolean),
        ),
        call(training.new_decomposition, model=model[1], config=(small, only(small))),
        call(
            lambda **o: {k: dict(v.file_tensors()) for k, v in tl_vpd.evaluation.decompose_at_sizes(**o).items()},
            "training: decompose_at_sizes",
            model=model[1],
            tokens=(w.tokens, either(tokens(rows=2))),
            config=(small, only(small)),
            execution=config(tl_vpd.ExecutionConfig),
            saving=config(tl_vpd.SavingConfig),
            progress=(False, boolean),
            factors=([1.0], lambda v: sequence(number(above=0), minimum=0)(v) and (True if len(v) else None)),
        ),
        call(lambda device: str(recipe.usable_device(device)), "recipe: usable_device", device=("cpu", device)),
    ]


def _planning(w: World) -> list[Call]:
    target = planning.Target.of(w.model)
    small = tl_vpd.VPDConfig(C=3, batch_size=2, gamma=GAMMA)
    result = planning.footprint(target, small, context=7)
    machine, count = planning.Machine(0.5, memory=1 << 30), integer(1)
    divides: Kind = lambda v: count(v) and None  # noqa: E731
    return [
        call(
            lambda **o: planning.footprint(**o).table(),
            "planning: footprint",
            target=(target, only(target)),
            config=(small, optional(only(small))),
            context=(7, integer(1)),
            execution=config(tl_vpd.ExecutionConfig),
            processes=(1, either(integer(1, 2))),
        ),
        call(
            planning.Machine,
            tflops=(0.5, number(above=0)),
            memory=(100, integer(0, size=False)),
            bfloat16=(1.5, optional(number(above=0))),
            timed=(True, boolean),
        ),
        call(
            planning.plan_lines,
            cost=(result, only(result)),
            machine=(machine, only(machine)),
            seconds=(0.5, optional(number(above=0))),
            why=("it is late", text),
        ),
        call(
            lambda **o: planning.seconds_per_step(**o) and None,
            "planning: seconds_per_step",
            model=(w.model, only(w.model)),
            config=(small, optional(only(small))),
            context=(7, either(integer(1, 10))),
            execution=config(tl_vpd.ExecutionConfig),
            limit=(0.1, number(0)),
        ),
        call(
            planning.first_try,
            model=(w.model, only(w.model, target)),
            sites=("blocks.1.*", patterns([site.name for site in target.sites])),
            steps=(3, count),
            batch_size=(2, count),
            yardstick=(0.5, optional(number(above=0))),
        ),
        call(
            planning.yardstick,
            model=(w.model, only(w.model)),
            tokens=(w.tokens, tokens()),
            sites=("blocks.1.*", patterns([site.name for site in target.sites])),
        ),
        call(planning.Target.of, model=(w.model, only(w.model))),
        call(
            planning.TransformerShape,
            **{name: (8, _lax(divides)) for name in ("layers", "d_model", "heads", "d_mlp", "vocabulary", "itemsize")},
            gated=(True, _lax(boolean)),
            kv_heads=(8, _lax(optional(lambda v: None if count(v) else count(v)))),
            others=(3, _lax(integer(0))),
        ),
    ]


def _lax(kind: Kind) -> Kind:
    """What pydantic reads from text, as recipes need it (YAML reads 1e-3 as text), may be accepted."""

    def verdict(value: Any) -> bool | None:
        right = kind(value)
        if right is not False:
            return None if isinstance(value, np.generic | np.ndarray | torch.Tensor) else right
        if isinstance(value, bool):
            return False
        try:
            read = float(value)
            return None if kind(read) is not False or kind(int(read)) is not False else False
        except (TypeError, ValueError, OverflowError, RuntimeError):
            return False

    return verdict


def _toys(w: World) -> list[Call]:
    toy, training_of = toys.TMS(3, 2), toys.TargetTraining
    how = {"training": (toy.training, lambda v: isinstance(v, training_of))}
    count = integer(1)
    steps = {"seed": (3, SEED), "steps": (1, optional(integer(0)))}
    apd = baselines.APDConfig(steps=1, batch_size=2, C=2)
    spd = baselines.spd_config(steps=1, batch_size=2, C=2, faithfulness={"warm_up_steps": 1})
    model, data = toy.build(0), toy.batches(2)
    switches = {
        "progress": (False, boolean),
        "compile": (False, lambda v: True if v is False else (None if boolean(v) is not False else False)),
    }
    same = {"model": (model, only(model)), "data": (data, only(data))}
    return [
        call(lambda **o: toys.train(**o), "toys: train", toy=(toy, only(toy)), **steps, progress=(False, boolean)),
        call(
            toys.recipe,
            toy=("tms_5_2", choice(*toys.TOYS)),
            method=("vpd", choice("vpd", "spd", "apd")),
            seed=(3, SEED),
            steps=(1, optional(count)),
        ),
        call(
            lambda **o: toys.TMS(**o).build(0),
            "toys: TMS",
            **how,
            n_features=(3, count),
            n_hidden=(2, count),
            identity=(False, boolean),
            probability=(0.5, number(0, 1)),
            vectors=(8, count),
        ),
        call(toy.build, seed=(3, SEED)),
        call(lambda **o: toy.batches(**o).at(0), "toys: TMS.batches", rows=(2, count), seed=(3, SEED)),
        call(
            lambda **o: toys.Compressed(**{"n_features": 4, "d_resid": 6, "neurons": 4, **o}).build(0),
            "toys: Compressed",
            **how,
            n_features=(4, count),
            d_resid=(6, count),
            neurons=(4, count),
            n_layers=(1, count),
            probability=(0.5, number(0, 1)),
            vectors=(8, count),
        ),
        call(
            lambda **o: toys.Grammar(**{"d_model": 8, "d_mlp": 8, "n_heads": 2, **o}).build(0),
            "toys: Grammar",
            **how,
            context=(32, either(integer(32, 32))),
            n_layers=(1, count),
            d_model=(8, either(integer(8, 8))),
            n_heads=(2, either(integer(2, 2))),
            d_mlp=(8, count),
        ),
        call(
            lambda **o: toys.Induction(**{"d_model": 8, **o}).build(0),
            "toys: Induction",
            **how,
            d_vocab=(33, either(integer(33, 33))),
            context=(33, either(integer(33, 33))),
            shortest=(6, either(integer(6, 6))),
            longest=(16, either(integer(16, 16))),
            d_model=(8, either(integer(8, 8))),
            n_heads=(1, either(integer(1, 1))),
        ),
        call(
            training_of,
            "toys: TargetTraining",
            steps=(3, integer(1)),
            rows=(3, count),
            lr=(0.5, number(above=0)),
            schedule=("constant", choice("constant", "cosine")),
            weight_decay=(0.5, number(0)),
        ),
        call(
            lambda **o: _pieces(baselines.apd(**o)),
            "baselines: apd",
            **same,
            config=(apd, either_none(apd)),
            **switches,
        ),
        call(
            lambda **o: _pieces(baselines.spd(data=data, **o)),
            "baselines: spd",
            model=same["model"],
            config=(spd, either_none(spd)),
            **switches,
        ),
        call(
            lambda slope: baselines.SlopedSquash(slope) and None, "baselines: SlopedSquash", slope=(0.5, number(0, 1))
        ),
    ]


def either_none(config: Any) -> Kind:
    """This config; None stands for a run of the defaults, which is long."""
    return lambda value: True if value is config else (None if value is None else False)


def _pieces(result: Any) -> Mapping[str, torch.Tensor]:
    return {site: result.pieces(site).detach() for site in ("embed", "unembed")}


def _bundled(w: World) -> list[Call]:
    folder = {"folder": (bundled.MODEL, path_to_read(bundled.MODEL))}
    return [
        call(lambda **o: bundled.model(**o) and None, "bundled: model", device=("cpu", device), **folder),
        call(
            lambda kind: bundled.model(kind=kind) and None,
            "bundled: model(kind)",
            kind=(None, optional(choice("bridge", "hooked_transformer"))),
        ),
        call(lambda **o: bundled.decomposition(**o) and None, "bundled: decomposition", device=("cpu", device)),
        call(bundled.tokens, part=("validation", choice("validation", "training")), **folder),
        call(bundled.training_record, **folder),
    ]
