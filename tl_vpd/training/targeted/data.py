"""The two streams of a targeted run, on the device of its model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.training.data.run_data import RunData, is_text, run_data
from tl_vpd.training.data.token_batches import holds_vectors
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.targeted.config import TargetedConfig
from tl_vpd.training.targeted.prompts import PromptBatches


class TargetedData(RunData):
    """Batches of both streams; what is measured during the run is measured on the target.

    Args:
        target: what is decomposed.
        nontarget: ordinary data.
        prompts: of the target (None: it is data of rows enough for batches).
    """

    def __init__(self, target: RunData, nontarget: RunData, prompts: list[Tensor] | None) -> None:
        super().__init__(target.adapter, target.batches, target.rows)
        self.nontarget, self.prompts = nontarget, prompts

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and positions of the target's batches, and of the non-target ones."""
        return [*super().shapes, *self.nontarget.shapes]

    def at(self, step: int) -> tuple[Any, ...]:
        """The batches of a step, as ``TargetedTrainer.step`` takes them."""
        return *super().at(step), *self.nontarget.at(step)

    def describe(self) -> dict[str, Any]:
        """What distinguishes both from others, for resuming."""
        target = self.batches.describe()
        nontarget = self.nontarget.describe()
        return {"rows": target["rows"], "context": self.context, "target": target, "nontarget": nontarget}

    def close(self) -> None:
        """Ends background work."""
        super().close()
        self.nontarget.close()


def targeted_data(
    adapter: Adapter, target: Any, nontarget: Any, config: TargetedConfig, processes: World
) -> TargetedData:
    """This process's rows of both streams' batches.

    Args:
        adapter: of the model.
        target: prompts, rows of tokens, or what ``decompose`` takes.
        nontarget: what ``decompose`` takes.
        config: of the run.
        processes: that split each batch.

    Raises:
        ValueError: the data does not fit the model.
        TypeError: it is not data.
    """
    streams, prompts = list[RunData](), None
    for name, data, rows in (("target", target, config.batch_size), ("nontarget", nontarget, config.nontarget_rows)):
        try:
            if name == "target" and (prompts := prompts_of(adapter, target, rows)) is not None:
                data = PromptBatches(prompts, rows, config.seed)
            streams.append(run_data(adapter, data, rows, config.seed, processes))
        except (ValueError, TypeError) as error:
            for stream in streams:
                stream.close()
            raise type(error)(f"{name}: {error}") from error
    return TargetedData(streams[0], streams[1], prompts)


def prompts_of(adapter: Adapter, target: Any, batch_size: int) -> list[Tensor] | None:
    """The target's prompts as rows of tokens; None where it is data of rows enough for batches.

    Args:
        adapter: whose tokenizer is used.
        target: of a targeted run.
        batch_size: rows in a batch.
    """
    if is_text(target):
        texts = [target] if isinstance(target, str) else target
        return [adapter.tokens([text])[0] for text in texts]
    if isinstance(target, Tensor | np.ndarray):
        few = target.ndim == 1 or (target.ndim == 2 and len(target) < batch_size)
        target = (
            list(torch.as_tensor(target).reshape(-1, target.shape[-1])) if few and not holds_vectors(target) else target
        )
    elif isinstance(target, list | tuple) and target and all(isinstance(token, int) for token in target):
        target = [target]
    if isinstance(target, list | tuple) and all(isinstance(row, list | tuple | Tensor | np.ndarray) for row in target):
        return [_prompt(adapter, i, row) for i, row in enumerate(target)]
    return None


def _prompt(adapter: Adapter, i: int, tokens: Any) -> Tensor:
    """A prompt given as tokens."""
    if not len(tokens):
        raise ValueError(f"Prompt {i} has no tokens: leave it out.")
    try:
        row = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"prompt {i} is neither text nor a row of tokens: give integers.") from error
    return adapter.tokens(row[None])[0]
