"""``decompose_targeted``: from a model, what is to be decomposed, and ordinary data to a decomposition.

    >>> run = decompose_targeted(model, ["import numpy as", "import pandas as"], tokens)        # doctest: +SKIP
    >>> run.decomposition.compact(model, ["import numpy as", "import pandas as"])               # doctest: +SKIP

The result is a ``Decomposition`` like others, and its record has ``targeted``. What the target does not use is left in Δ.
"""

from __future__ import annotations

from functools import partial
from os import PathLike
from typing import Any

from torch import nn

from tl_vpd.adapters import Adapter
from tl_vpd.checks import config_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.frozen import checked
from tl_vpd.training.config import ExecutionConfig, SavingConfig
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.session import Run, Session
from tl_vpd.training.targeted.config import TargetedConfig
from tl_vpd.training.targeted.data import TargetedData, targeted_data
from tl_vpd.training.targeted.start import start_at_target
from tl_vpd.training.targeted.trainer import TargetedTrainer


def decompose_targeted(
    model: nn.Module,
    target: Any,
    nontarget: Any,
    config: TargetedConfig | None = None,
    *,
    execution: ExecutionConfig | None = None,
    saving: SavingConfig | None = None,
    resume: bool | str | PathLike[str] | Decomposition = False,
    progress: bool = True,
) -> Run:
    """Trains a decomposition of what ``model`` uses on a target alone.

    Args:
        model: the target model; its weights, hooks, flags and gradients are afterwards as they were.
        target: what is decomposed: prompts (strings, or rows of tokens, of one or several lengths; each batch has one length, and
            few prompts are repeated), or anything that ``decompose`` takes.
        nontarget: the model's ordinary data, anything that ``decompose`` takes; its rows have a length of their own.
        config: what is learned (None: ``TargetedConfig()``).
        execution: as for ``decompose``.
        saving: as for ``decompose``.
        resume: as for ``decompose``.
        progress: as for ``decompose``.

    Raises:
        ValueError, KeyError, TypeError: data, sites, C or the model do not fit, or the run does not fit in memory; nothing has
            been written then.
        FileExistsError, FileNotFoundError, OSError, FloatingPointError: as ``decompose``.
    """
    config = checked(config_of(TargetedConfig, config))
    session = Session.of(execution, saving, resume=resume, progress=progress)

    def data(adapter: Adapter, processes: World) -> TargetedData:
        return targeted_data(adapter, target, nontarget, config, processes)

    def trainer(masked_model: MaskedModel, data: TargetedData, **how: Any) -> TargetedTrainer:
        shapes = (config.batch_size, data.context), (config.nontarget_rows, data.nontarget.context)
        trainer = TargetedTrainer(masked_model, config, shapes, **how)
        if config.init == "target":
            if trainer.sharded:
                raise ValueError(
                    "init='target' sets whole matrices: use it with sharding='none' or 'optimizer', or leave it out."
                )
            trainer.start = partial(
                start_at_target, masked_model, trainer.decomposition.components, data, trainer.world
            )
        return trainer

    def record(data: TargetedData) -> dict[str, Any]:
        description = data.describe()
        return {"targeted": {name: description[name] for name in ("target", "nontarget")}}

    return session.train(model, config, data, trainer, record_of=record)
