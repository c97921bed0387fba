"""Calls of targeted decomposition, and of what is smaller or looks elsewhere: compact, features, a toy with a spare."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import tl_vpd
from tests.campaigns.calls.analysis import config
from tests.campaigns.calls.configs import fields
from tests.campaigns.calls.kinds import boolean, choice, either, integer, number, only, optional, text, tokens
from tests.campaigns.calls.world import Call, World, call
from tests.tiny import GAMMA
from tl_vpd import analysis, formats, hooks, toys, training


def calls(w: World) -> list[Call]:
    """The table."""
    small = training.TargetedConfig(steps=1, batch_size=2, C=3, gamma=GAMMA)
    toy, numbers = toys.Copying(), itertools.count()

    def new_folder() -> Path:
        return w.folder / f"features{next(numbers)}"

    def save(**options: Any) -> Any:
        return formats.save_neuronpedia(**{"folder": new_folder(), **options}) and None

    def save_in(folder: Any) -> None:
        save(folder=folder, decomposition=w.vpd, model=w.model, prompts=w.tokens, model_id="tiny")
        shutil.rmtree(folder)  # the next call gets the same

    def decompose(config: Any, **options: Any) -> Any:
        """With the short config where there is none: that of a whole run asks for more rows."""
        config = small if config is None else config
        return tl_vpd.decompose_targeted(config=config, **options).decomposition

    rows = (w.tokens, either(tokens(rows=2)))
    return [
        call(
            decompose,
            "training: decompose_targeted",
            model=(w.model, only(w.model)),
            target=rows,
            nontarget=rows,
            config=(small, optional(only(small))),
            execution=config(tl_vpd.ExecutionConfig),
            resume=(False, lambda v: True if v is False else (None if v is True else boolean(v) and None)),
            progress=(False, boolean),
        ),
        Call("training: TargetedConfig", training.TargetedConfig, fields(training.TargetedConfig)),
        Call("training: TargetedCoefficients", training.TargetedCoefficients, fields(training.TargetedCoefficients)),
        call(
            lambda **o: dict(hooks.compact(**o).file_tensors()),
            "hooks: compact",
            **w.of_prompts,
            threshold=(0.25, either(number(0, 1))),
            batch_size=(2, integer(1)),
        ),
        call(hooks.original_addresses, decomposition=(w.vpd, only(w.vpd))),
        call(
            save,
            "formats: save_neuronpedia",
            **w.of_prompts,
            model_id=("tiny", either(choice("tiny", "x"))),
            config=config(formats.NeuronpediaConfig),
        ),
        call(
            save_in,
            "formats: save_neuronpedia(folder)",
            folder=(new_folder(), lambda v: None if isinstance(v, str | Path) else False),
        ),
        call(
            formats.NeuronpediaConfig,
            set_name=("vpd", either(choice("vpd", "x"))),
            values=("activation", choice("importance", "activation")),
            harvest=(analysis.HarvestConfig(), lambda v: isinstance(v, analysis.HarvestConfig)),
            logits=(3, integer(1)),
            dataset=("a text", text),
        ),
        call(
            lambda **o: toys.Copying(**{"d_model": 8, **o}).build(0),
            "toys: Copying",
            training=(toy.training, lambda v: isinstance(v, toys.TargetTraining)),
            n_layers=(2, integer(1)),
            layer_dropout=(0.25, number(0, 0.9)),
            d_vocab=(17, integer(2)),
            length=(6, integer(2)),
            d_model=(8, integer(2)),
        ),
    ]
