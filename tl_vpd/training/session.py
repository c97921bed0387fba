"""What plain and targeted runs have in common: files, processes, sharding, the loop, and what is returned.

>>> session = Session.of(None, SavingConfig(folder="runs/first"), resume=True)      # doctest: +SKIP
>>> session.train(model, config, data, trainer)                                    # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import nn

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.checks import config_of, flag, shown
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.frozen import checked
from tl_vpd.printing import Printed
from tl_vpd.training.config import ExecutionConfig, SavingConfig, VPDConfig
from tl_vpd.training.data.run_data import RunData
from tl_vpd.training.distributed.processes import World, world
from tl_vpd.training.distributed.sharding import shard, unshard
from tl_vpd.training.fits import refuse_too_large
from tl_vpd.training.interrupts import interruptible
from tl_vpd.training.loop import Loop
from tl_vpd.training.new_decomposition import go_on_from, new_decomposition
from tl_vpd.training.outlook import rows_measured
from tl_vpd.training.precision import refuse_imitated
from tl_vpd.training.run_files import RunFiles, plain_data
from tl_vpd.training.run_report import RunReport
from tl_vpd.training.state import StoredRun
from tl_vpd.training.trainer import Trainer

Data = TypeVar("Data", bound=RunData)


@dataclass(frozen=True)
class Run(Printed):
    """What ``decompose`` returns: the decomposition, a row of metrics per logged step, and whether the last step was reached.

    ``checks``: a row per look at the run under rounded masks (``tl_vpd.training.outlook``): ``step``, ``distance``,
    ``yardstick``, their quotient ``share``, ``l0``, ``total``; of a resumed run, those since.
    """

    decomposition: Decomposition
    history: pd.DataFrame
    finished: bool
    config: VPDConfig
    checks: pd.DataFrame


@dataclass(frozen=True)
class Session:
    """How a run is carried out, and where it goes.

    Attributes:
        execution: how it runs.
        saving: what is written.
        resume: from the newest state, from the state at this path, or with V, U and Γ of a decomposition.
        progress: show a bar and lines.
    """

    execution: ExecutionConfig
    saving: SavingConfig
    resume: bool | Path | Decomposition
    progress: bool

    @classmethod
    def of(
        cls,
        execution: ExecutionConfig | None,
        saving: SavingConfig | None,
        *,
        resume: Any,
        progress: Any,
    ) -> Session:
        """A session of the arguments of ``decompose``, checked; raises as that does."""
        execution, saving = checked(config_of(ExecutionConfig, execution)), checked(config_of(SavingConfig, saving))
        progress = flag("progress", progress)
        if isinstance(resume, Decomposition):
            return cls(execution, saving, resume, progress)
        start_from = Path(resume).expanduser() if isinstance(resume, str | PathLike) else flag("resume", resume)
        if start_from and saving.folder is None:
            raise ValueError(
                f"resume={shown(resume)} needs the folder of the run: pass saving=SavingConfig(folder=...)."
            )
        return cls(execution, saving, start_from, progress)

    def train(
        self,
        model: nn.Module,
        config: VPDConfig,
        data_of: Callable[[Adapter, World], Data],
        trainer_of: Callable[..., Trainer],
        *,
        record_of: Callable[[Data], Mapping[str, Any]] = lambda data: {},
    ) -> Run:
        """A run from its first step, or from a state, to its last.

        Args:
            model: the target.
            config: what is learned.
            data_of: the data for the model's adapter and the processes.
            trainer_of: the trainer for the masked model and the data, with ``execution`` and ``world``.
            record_of: what the decomposition's record says of the data.

        Raises:
            ValueError, KeyError, TypeError, OSError, FloatingPointError: as ``decompose``.
        """
        execution, saving = self.execution, self.saving
        start, resume = (self.resume, False) if isinstance(self.resume, Decomposition) else (None, self.resume)
        files = None if saving.folder is None else RunFiles(saving.folder, saving)
        if files is not None:
            files.state_to_resume(resume)  # refused before anything is computed; asked again when the folder is locked
        adapter = adapt(model)
        _check_output(adapter, config)
        refuse_imitated(execution.precision, adapter.device)
        with (
            _gradients(adapter.device),
            world(adapter.device) as processes,
            closing(data_of(adapter, processes)) as data,
        ):
            run = StoredRun(plain_data(data.describe()))
            for rows, pos in data.shapes:
                refuse_too_large(adapter, config, execution, rows=rows, pos=pos, processes=processes.size)
            decomposition = new_decomposition(model, config)
            if start is not None:
                go_on_from(start, decomposition, model)
            decomposition.record |= record_of(data)
            with nullcontext() if files is None else files.locked(processes, adapter.device):
                state = None if files is None else files.state_to_resume(resume)
                if files is not None and state is not None:
                    run = files.stored_run(state, run.data or {})
                processes.wait()  # nobody writes before all have looked
                shard(decomposition, execution.sharding, processes)
                with (
                    MaskedModel(decomposition, model, fused_attention=True) as masked_model,
                    interruptible() as interrupted,
                ):
                    trainer = trainer_of(masked_model, data, execution=execution, world=processes)
                    first = data.first(rows_measured(data.sample))
                    report = RunReport(trainer, *first, show=self.progress and processes.first)
                    loop = Loop(trainer, data.at, files, report, saving.log_every, interrupted, run.data or {})
                    loop.start(state, run.history, warm_up=start is None)
                    loop.train()
                history, finished = loop.history, trainer.done >= config.steps
                checks = report.table()
                del trainer, report, loop  # and with them AdamW's moments, before parameters are gathered
                unshard(decomposition)
                if finished and not bool(torch.stack([p.isfinite().all() for p in decomposition.parameters()]).all()):
                    raise FloatingPointError("The last update gave values that are not finite; no result was written.")
                if files is not None and finished and processes.first:
                    files.finish(decomposition)
                processes.wait()
        return Run(decomposition, pd.DataFrame([asdict(m) for m in history]), finished, config, checks)


def _check_output(adapter: Adapter, config: VPDConfig) -> None:
    """Raises ValueError where nobody has said how the outputs of a custom model, which may not be logits, are compared."""
    if not adapter.return_types and "output" not in config.model_fields_set:
        kind = type(adapter.model).__name__
        raise ValueError(
            f"How outputs of a {kind} are to be compared is not said: give output='kl' in {type(config).__name__} where they are "
            "logits, and output='mse' where not."
        )


@contextmanager
def _gradients(device: torch.device) -> Iterator[None]:
    """Gradients on and autocast off, whatever the caller has set; afterwards as it was."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield
