"""``decompose``: from a model and tokens to a decomposition, with a progress bar, metrics, states and resuming.

    >>> saving = SavingConfig(folder="runs/gpt2")                                          # doctest: +SKIP
    >>> run = decompose(model, tokens, VPDConfig(steps=2_000), saving=saving)              # doctest: +SKIP
    >>> run.decomposition.save("gpt2-vpd"); run.history.tail()                             # doctest: +SKIP

Ctrl-C and SIGTERM finish the current step, save, and return what has been trained. Under ``torchrun`` every process trains on its
rows of the batch (``tl_vpd.training.distributed.processes``); the first writes the files (``tl_vpd.training.run_files``).
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

from tl_vpd.adapters import Adapter
from tl_vpd.checks import config_of, integer
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.frozen import checked
from tl_vpd.training.config import ExecutionConfig, SavingConfig, VPDConfig
from tl_vpd.training.data.run_data import RunData, run_data
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.session import Run, Session
from tl_vpd.training.targeted.config import TargetedConfig
from tl_vpd.training.trainer import Trainer


def decompose(
    model: nn.Module,
    tokens: Any,
    config: VPDConfig | None = None,
    *,
    execution: ExecutionConfig | None = None,
    saving: SavingConfig | None = None,
    resume: bool | str | PathLike[str] | Decomposition = False,
    context: int | None = None,
    progress: bool = True,
) -> Run:
    """Trains a decomposition of ``model`` on rows of tokens.

    Args:
        model: the target; its weights, hooks, flags and gradients are afterwards as they were.
        tokens: rows ``[n, pos]`` of one length (a tensor, or an array, memory-mapped or not), strings (padding is left out of Γ,
            losses and statistics), an iterable of rows, a Hugging Face dataset, or an object that makes the batch of each step
            (``tl_vpd.training.data``). A custom model may take vectors, ``[n, pos, d]`` or ``[n, d]``.
        config: what is learned (None: ``VPDConfig()``).
        execution: how it runs (None: ``ExecutionConfig()``).
        saving: what is written (None: nothing).
        resume: continue from the newest state in ``saving.folder`` (there must be one), or from the state at this path there;
            states of later steps are removed then. A decomposition of the same sites, C and Γ starts a new run from its V, U and
            Γ, whatever ``config.init`` says and without a warm-up: optimizer, adversary and schedules begin anew, and
            ``record["start"]`` keeps its record.
        context: length of the rows that a dataset of text is cut into (None: the model's context).
        progress: show a bar, and what to expect of the run before it (``tl_vpd.training.run_report``).

    Raises:
        ValueError, KeyError, TypeError: tokens, sites, C or the model do not fit, or the run does not fit in memory; nothing has
            been written then.
        FileExistsError: ``saving.folder`` holds a run and ``resume`` is off.
        FileNotFoundError: ``resume`` is on and it holds none.
        OSError: ``saving.folder`` cannot be written, checked before the first step, or another process trains in it.
        FloatingPointError: a loss is not finite; the last saved state is intact.
    """
    config = checked(config_of(VPDConfig, config))
    if isinstance(config, TargetedConfig):
        raise TypeError("A TargetedConfig came where VPDConfig is needed: call decompose_targeted().")
    session = Session.of(execution, saving, resume=resume, progress=progress)
    context = None if context is None else integer("context", context, minimum=2)

    def data(adapter: Adapter, processes: World) -> RunData:
        return run_data(adapter, tokens, config.batch_size, config.seed, processes, context=context)

    def trainer(masked_model: MaskedModel, data: RunData, **how: Any) -> Trainer:
        return Trainer(masked_model, config, (config.batch_size, data.context), **how)

    return session.train(model, config, data, trainer)
