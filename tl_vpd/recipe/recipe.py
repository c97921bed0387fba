"""A run as one file: which model, which tokens, and the three configs of ``tl_vpd.decompose``.

    model: {name: bundled}                 # or a name that TransformerLens knows, with kind and options
    data: {tokens: bundled}                # or a .npy / .safetensors of tokens [n, pos], or text files
    vpd: {steps: 2000, C: 128}             # tl_vpd.VPDConfig: what is learned
    execution: {micro_batch: 4}            # tl_vpd.ExecutionConfig: how it runs
    saving: {folder: runs/first}           # tl_vpd.SavingConfig: what is written

A targeted run has ``targeted`` in the place of ``vpd`` (``tl_vpd.recipe.targeted``), and ``data`` is its non-target stream.
Unknown keys are refused. A recipe is data: nothing in it makes code of a file or of the Hub run (``tl_vpd.recipe.model``). Under
``torchrun`` every process reads the same recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError, model_validator

from tl_vpd.checks import sentence_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.feature_splitting import decompose_at_sizes, feature_splitting
from tl_vpd.frozen import Frozen
from tl_vpd.planning import Footprint, Machine, Target, TransformerShape, footprint, plan_lines, seconds_per_step
from tl_vpd.recipe.data import DataRecipe, read_utf8
from tl_vpd.recipe.model import ModelRecipe, usable_device
from tl_vpd.recipe.targeted import TargetedRecipe
from tl_vpd.recipe.yaml_text import yaml_data
from tl_vpd.training import ExecutionConfig, Run, SavingConfig, VPDConfig, decompose, decompose_targeted


class Recipe(Frozen):
    """A whole run."""

    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    vpd: VPDConfig = VPDConfig()
    targeted: TargetedRecipe | None = None
    """In the place of ``vpd``."""
    execution: ExecutionConfig = ExecutionConfig()
    saving: SavingConfig = SavingConfig()

    @model_validator(mode="after")
    def _one_method(self) -> Recipe:
        if self.targeted is not None and self.vpd != VPDConfig():
            raise ValueError("vpd would do nothing beside targeted: leave either out.")
        return self

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Reads a YAML file; raises FileNotFoundError where there is none, ValueError where it is not a recipe."""
        sections = "model, data, vpd (or targeted), execution and saving"
        if not path.is_file():
            what = "is not an ordinary file" if path.exists() else "does not exist"
            raise FileNotFoundError(f"{path} {what}: give a YAML file with {sections}.")
        content = yaml_data(read_utf8(path), str(path))
        if not isinstance(content, dict):
            what = "is empty" if content is None else f"holds a {type(content).__name__}"
            raise ValueError(f"{path} {what}; keys {sections} are needed.")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{path}: {sentence_of(error)}") from error

    def changed(self, **sections: Mapping[str, Any]) -> Recipe:
        """The recipe with other values in sections; None leaves the recipe's. Raises ValueError where one is not allowed.

        >>> Recipe().changed(vpd={"C": 8, "gamma": {"d_ci": 64}}, execution={"micro_batch": None}).vpd.gamma.d_ci
        64
        """
        try:
            return Recipe.model_validate(_merged(self.model_dump(), sections))
        except ValidationError as error:
            raise ValueError(sentence_of(error)) from error

    def train(self, *, resume: bool | Path | Decomposition = False, trust_remote_code: bool = False) -> Run:
        """Trains the decomposition.

        Args:
            resume: from the newest state, from this one, or a new run from a decomposition.
            trust_remote_code: as for ``ModelRecipe.load``.

        Raises:
            ValueError: no folder is named.
        """
        if self.saving.folder is None:
            raise ValueError("saving.folder is missing: name the folder that the decomposition goes to.")
        model = self.model.load(trust_remote_code=trust_remote_code)
        configs = {"execution": self.execution, "saving": self.saving}
        data = self.data.load(model)
        if self.targeted is None:
            return decompose(model, data, self.vpd, **configs, resume=resume)  # type: ignore[arg-type]
        target = self.targeted.load(model)
        return decompose_targeted(model, target, data, self.targeted.config, **configs, resume=resume)  # type: ignore[arg-type]

    def feature_splitting(
        self, factors: Sequence[float], *, rows: int, trust_remote_code: bool = False
    ) -> pd.DataFrame:
        """Trains decompositions with other numbers of subcomponents, and counts how many of each are alive.

        Args:
            factors: of the recipe's C.
            rows: of tokens that the counts are measured on: validation rows of the bundled tokens, else the first rows of the
                recipe's, which the runs are trained on.
            trust_remote_code: as for ``ModelRecipe.load``.
        """
        self._refuse_targeted("Feature splitting")
        model = self.model.load(trust_remote_code=trust_remote_code)
        tokens = self.data.load(model)
        runs = decompose_at_sizes(
            model, tokens, self.vpd, factors=factors, execution=self.execution, saving=self.saving
        )
        part = "validation" if self.data.tokens == "bundled" else "training"
        return feature_splitting(runs, model, self.data.first(model, rows, default_key=part))

    def _refuse_targeted(self, what: str) -> None:
        if self.targeted is not None:
            raise ValueError(f"{what} is of a plain run: leave targeted out of the recipe, and give vpd.")

    def plan(
        self,
        shape: TransformerShape | None = None,
        *,
        processes: int = 1,
        tflops: float | None = None,
        limit: float = 60.0,
        trust_remote_code: bool = False,
    ) -> list[str]:
        """What one process of the run stores and computes, how long it takes, and what fits where it does not; as text.

        Args:
            shape: of a transformer that is not loaded (None: the recipe's model).
            processes: how many split the batch.
            tflops: 10¹² FLOP per second of another device (None: this machine's, timed).
            limit: seconds that timing a step may take (0: none is timed).
            trust_remote_code: as for ``ModelRecipe.load``.
        """
        self._refuse_targeted("A plan")
        model, context = None, self.data.context
        if shape is None:
            model = self.model.load(trust_remote_code=trust_remote_code)
            context = context or self.data.length(model)
        if context is None:
            raise ValueError("Give --context: the tokens in a row.")
        target = Target.of(shape or model)  # type: ignore[arg-type]
        cost = footprint(target, self.vpd, context=context, execution=self.execution, processes=processes)
        machine = Machine.here(usable_device(self.model.device)) if tflops is None else Machine(tflops)
        why = _not_timed(cost, machine, limit, loaded=model is not None)
        seconds = None
        if model is not None and not why:
            seconds = seconds_per_step(model, self.vpd, context=context, execution=self.execution, limit=limit)
        return plan_lines(cost, machine, seconds, why=why)


def _not_timed(cost: Footprint, machine: Machine, limit: float, *, loaded: bool) -> str:
    """Why no step can be timed; empty if one can."""
    products = cost.step_flops / (machine.tflops * 1e12)
    reasons = {
        "it is planned for another device": not machine.timed,
        "the model is not loaded": not loaded,
        "its batch is split among processes": cost.processes > 1,
        "it needs more memory than this machine has": 0 < machine.memory < cost.total,
        f"two would take longer than {limit:g} s": 2 * products > limit,
    }
    return next((why for why, holds in reasons.items() if holds), "")


def recipe_and_shape(path: Path | None, numbers: Mapping[str, Any]) -> tuple[Recipe, TransformerShape | None]:
    """A recipe from a file, or an empty one for the numbers of a transformer; raises ValueError for both, or for neither."""
    options = {name: value for name, value in numbers.items() if value is not None}
    if path is not None:
        recipe = Recipe.read(path)
        if options:
            raise ValueError(f"{path} names the model: leave out {_options(options)}.")
        return recipe, None
    missing = [
        name for name, field in TransformerShape.model_fields.items() if field.is_required() and name not in options
    ]
    if missing:
        raise ValueError(f"Give a recipe, or the model's numbers too: {_options(missing)}.")
    return Recipe(), TransformerShape(**options)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with those of ``changes`` that are not None."""
    result = dict(values)
    for name, change in changes.items():
        if isinstance(change, Mapping) and isinstance(result.get(name), Mapping):
            result[name] = _merged(result[name], change)
        elif change is not None:
            result[name] = change
    return result


def _options(names: Any) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
