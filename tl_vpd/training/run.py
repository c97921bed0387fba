"""``decompose``: from a model and tokens to a decomposition, with a progress bar, metrics, states and resuming.

    >>> saving = SavingConfig(folder="runs/gpt2")                                          # doctest: +SKIP
    >>> run = decompose(model, tokens, VPDConfig(steps=2_000), saving=saving)              # doctest: +SKIP
    >>> run.decomposition.save("gpt2-vpd"); run.history.tail()                             # doctest: +SKIP

Ctrl-C and SIGTERM finish the current step, save, and return what has been trained. Under ``torchrun`` every process trains on its
rows of the batch (``tl_vpd.training.distributed.processes``); the first writes the files (``tl_vpd.training.run_files``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.checks import config_of, flag, integer, shown
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.frozen import checked
from tl_vpd.training.config import ExecutionConfig, SavingConfig, VPDConfig
from tl_vpd.training.data import ProcessBatches, batches_of, is_dataset, token_column
from tl_vpd.training.distributed.processes import World, world
from tl_vpd.training.distributed.sharding import shard, unshard
from tl_vpd.training.interrupts import interruptible
from tl_vpd.training.loop import Loop
from tl_vpd.training.new_decomposition import new_decomposition
from tl_vpd.training.outlook import rows_measured
from tl_vpd.training.run_files import RunFiles, plain_data
from tl_vpd.training.run_report import RunReport
from tl_vpd.training.state import StoredRun
from tl_vpd.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What ``decompose`` returns: the decomposition, a row of metrics per logged step, and whether the last step was reached.

    ``checks``: a row per look at the run under rounded masks (``tl_vpd.training.outlook``): ``step``, ``distance``,
    ``yardstick``, their quotient ``share``, ``l0``, ``total``; of a resumed run, those since.
    """

    decomposition: Decomposition
    history: pd.DataFrame
    finished: bool
    config: VPDConfig
    checks: pd.DataFrame


def decompose(
    model: nn.Module,
    tokens: Any,
    config: VPDConfig | None = None,
    *,
    execution: ExecutionConfig | None = None,
    saving: SavingConfig | None = None,
    resume: bool | str | PathLike[str] = False,
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
            states of later steps are removed then.
        context: length of the rows that a dataset of text is cut into (None: the model's context).
        progress: show a bar, and what to expect of the run before it (``tl_vpd.training.run_report``).

    Raises:
        ValueError, KeyError, TypeError: tokens, sites, C or the model do not fit; nothing has been written then.
        FileExistsError: ``saving.folder`` holds a run and ``resume`` is off.
        FileNotFoundError: ``resume`` is on and it holds none.
        OSError: ``saving.folder`` cannot be written, checked before the first step, or another process trains in it.
        FloatingPointError: a loss is not finite; the last saved state is intact.
    """
    config, execution = checked(config_of(VPDConfig, config)), checked(config_of(ExecutionConfig, execution))
    saving, start_from = checked(config_of(SavingConfig, saving)), _resume(resume)
    progress = flag("progress", progress)
    context = None if context is None else integer("context", context, minimum=2)
    if start_from and saving.folder is None:
        raise ValueError(f"resume={shown(resume)} needs the folder of the run: pass saving=SavingConfig(folder=...).")
    files = None if saving.folder is None else RunFiles(saving.folder, saving)
    if files is not None:
        files.state_to_resume(start_from)  # refused before anything is computed; asked again when the folder is locked
    adapter = adapt(model)
    with (
        _gradients(adapter.device),
        world(adapter.device) as processes,
        closing(_batches(adapter, tokens, config, context, processes)) as batches,
    ):
        run = StoredRun(plain_data(batches.describe()))
        decomposition = new_decomposition(model, config)
        with nullcontext() if files is None else files.locked(processes, adapter.device):
            state = None if files is None else files.state_to_resume(start_from)
            if files is not None and state is not None:
                run = files.stored_run(state, run.data or {})
            processes.wait()  # nobody writes before all have looked
            shard(decomposition, execution.sharding, processes)
            with (
                MaskedModel(decomposition, model, fused_attention=True) as masked_model,
                interruptible() as interrupted,
            ):
                shape = (config.batch_size, batches.context)
                trainer = Trainer(masked_model, config, shape, execution=execution, world=processes)
                report = RunReport(trainer, *_first_rows(adapter, batches), show=progress and processes.first)
                loop = Loop(trainer, batches, files, report, saving.log_every, interrupted, run.data or {})
                loop.start(state, run.history)
                loop.train()
            history, finished = loop.history, trainer.done >= config.steps
            checks = pd.DataFrame([asdict(check) | {"share": check.share} for check in report.checks])
            del trainer, report, loop  # and with them AdamW's moments, before parameters are gathered
            unshard(decomposition)
            if finished and not all(bool(p.isfinite().all()) for p in decomposition.parameters()):
                raise FloatingPointError("The last update gave values that are not finite; no result was written.")
            if files is not None and finished and processes.first:
                files.finish(decomposition)
            processes.wait()
    return Run(decomposition, pd.DataFrame([asdict(m) for m in history]), finished, config, checks)


def _resume(resume: Any) -> bool | Path:
    """``resume`` as True, False or a path."""
    return Path(resume).expanduser() if isinstance(resume, str | PathLike) else flag("resume", resume)


@contextmanager
def _gradients(device: torch.device) -> Iterator[None]:
    """Gradients on and autocast off, whatever the caller has set; afterwards as it was."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def _batches(adapter: Adapter, data: Any, config: VPDConfig, context: int | None, processes: World) -> ProcessBatches:
    """This process's rows of each batch, after a look at some of them."""
    if context is not None and not (is_dataset(data) and token_column(data) is None):
        raise ValueError(f"context={context} would do nothing: only datasets of text are cut into rows.")
    text = isinstance(data, str) or (isinstance(data, list) and bool(data) and isinstance(data[0], str))
    if text or isinstance(data, Tensor):
        data = adapter.tokens(data)
    rows = processes.rows(config.batch_size)
    batches = batches_of(
        data,
        config.batch_size,
        config.seed,
        tokenizer=getattr(adapter.model, "tokenizer", None),
        context=context or getattr(getattr(adapter.model, "cfg", None), "n_ctx", None),
        row_slice=slice(rows.start, rows.stop),
    )
    sample = batches.sample()
    if sample.is_floating_point() and sample.dtype != adapter.dtype:
        raise ValueError(
            f"The data holds vectors in {sample.dtype} and the model is in {adapter.dtype}: convert either, such as with "
            f"data.astype('float32') or model.double()."
        )
    adapter.tokens(sample)
    return batches


def _first_rows(adapter: Adapter, batches: ProcessBatches) -> tuple[Tensor, Tensor | None]:
    """A few rows to measure on, and which of their tokens are real."""
    rows = batches.sample()
    tokens = adapter.tokens(rows[: rows_measured(rows)])
    return tokens, adapter.padding(tokens, None)
