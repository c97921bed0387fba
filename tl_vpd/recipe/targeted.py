"""The section of a targeted run: what is decomposed, and what is learned from it.

data: {tokens: bundled}                                          # the non-target stream
targeted: {prompts: ["import numpy as"], steps: 20000, C: 64}    # or target: {tokens: css/*.css}
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from tl_vpd.recipe.data import DataRecipe
from tl_vpd.training import TargetedConfig


class TargetedRecipe(TargetedConfig):
    """A ``TargetedConfig`` with its target."""

    prompts: tuple[str, ...] | None = None
    """The target as prompts, of one or several lengths."""
    target: DataRecipe | None = None
    """The target as rows of tokens or text files."""

    @model_validator(mode="after")
    def _one_target(self) -> TargetedRecipe:
        if (self.prompts is None) == (self.target is None):
            raise ValueError("a targeted run has one target: give prompts or target.")
        if self.prompts is not None and not all(self.prompts):
            raise ValueError("prompts has an empty prompt: leave it out.")
        return self

    @property
    def config(self) -> TargetedConfig:
        """What is learned."""
        return TargetedConfig(**self.model_dump(exclude={"prompts", "target"}))

    def load(self, model: Any) -> Any:
        """The target for a model; raises as ``DataRecipe.load``."""
        return list(self.prompts) if self.target is None and self.prompts else self.target.load(model)  # type: ignore[union-attr]
