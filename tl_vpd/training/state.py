"""The state of a run on disk: everything that the next step depends on, and what has been measured.

A folder ``state/`` with ``step-00001000.safetensors``: V, U, Γ, AdamW's moments, the adversary's sources and moments, the
frequencies' running mean and the step (random numbers, schedules and the place in the data follow from seed and step), the
metrics up to the step, and the description of the data. Every tensor and everything else has a checksum
(``tl_vpd.files.tensor_file``). The newest ``keep`` files stay.

A state has whole tensors, whatever the sharding and the number of processes that wrote it, so that a run may continue with
others.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_vpd.checks import integer
from tl_vpd.components.fingerprint import Fingerprint
from tl_vpd.files.atomic import make_folder
from tl_vpd.files.tensor_file import TensorFile, open_tensors, write_tensors
from tl_vpd.training.distributed.sharding import copy_whole, whole
from tl_vpd.training.metrics import StepMetrics, metrics_of
from tl_vpd.training.state_checks import RefusedState, check_config, check_precision, check_target
from tl_vpd.training.state_entries import SHARED, entries_of
from tl_vpd.training.trainer import Trainer

log = logging.getLogger(__name__)
HISTORY = "history"
"""The key of the rows of metrics; the content has the names of the columns."""


@dataclass(frozen=True)
class StoredRun:
    """What a state knows of its run besides the trainer.

    Attributes:
        data: the description of what is trained on (None: a state of an older version, which has neither).
        history: the rows of metrics of the steps before the state's.
    """

    data: Mapping[str, Any] | None = None
    history: Sequence[StepMetrics] = ()


def save_state(trainer: Trainer, folder: Path, *, keep: int = 2, run: StoredRun | None = None) -> Path:
    """Writes the trainer's state; every process must call it, and the first writes.

    States of later steps are removed: they are of work that is done again, after the run was resumed from an older state.

    Args:
        trainer: of the run.
        folder: of states.
        keep: the newest states that stay.
        run: what is stored with it (None: nothing).

    Raises:
        ValueError: ``keep`` is below 1.
        OSError: it cannot be written; older states are left alone, and all processes raise.
        FloatingPointError: something is not finite; older states are left alone, and all processes raise.
    """
    integer("keep_states", keep, minimum=1)
    path = folder / f"step-{trainer.done:08d}.safetensors"
    tensors = _gathered(trainer)
    failure: Exception | None = None
    if trainer.world.first:
        try:
            _write(trainer, path, tensors, run or StoredRun())
            _remove_others(path, keep)
        except (OSError, FloatingPointError) as error:
            failure = error
    trainer.world.raise_together(failure, trainer.decomposition.device, f"The first process could not write {path}.")
    return path


def latest_state(folder: Path) -> Path | None:
    """The newest state in a folder, if there is one."""
    states = _states(folder)
    return states[-1] if states else None


def read_run(path: Path) -> StoredRun:
    """What a state knows of its run besides the trainer.

    Raises:
        ValueError: the file is damaged.
    """
    with _intact(path) as file:
        if file.content is None:
            log.warning("%s is of an older version and has no checksums: what it holds cannot be proved.", path)
            return StoredRun()
        names, rows = file.content[HISTORY], file.read(HISTORY).tolist()
        history = [metrics_of(dict(zip(names, row, strict=True))) for row in rows]
        return StoredRun(file.content["data"], history)


def load_state(trainer: Trainer, path: Path) -> None:
    """Restores a state in place; the number of processes and the sharding may differ from those that wrote it.

    All is checked before anything is changed. Where the run is carried out in another way than before, so that it continues to
    rounding and not bit for bit, a warning says in which.

    Args:
        trainer: of the run, of the same config, precision and target.
        path: of the state.

    Raises:
        ValueError: the file is damaged, or the run it belongs to had another config, precision or other target weights.
    """
    with _intact(path) as file:
        content = _content(file)
        check_config(trainer.config, path, content["config"])
        check_precision(trainer.engine.precision, path, content["precision"])
        stored = {name: Fingerprint(**f) for name, f in content["fingerprints"].items()}
        check_target(trainer.weights, path, stored)
        _check_tensors(trainer, file)
        _fill(trainer, file)
    if content.get("start") is not None:
        trainer.decomposition.record["start"] = content["start"]
    how = content["how"]
    changed = [
        f"{k}={how[k]!r} then, {trainer.how[k]!r} now" for k in how if k in trainer.how and how[k] != trainer.how[k]
    ]
    if changed:
        log.warning("%s: the run continues, the same to rounding, not bit for bit (%s)", path, "; ".join(changed))


# -- writing -----------------------------------------------------------------------------------------------------------


def _gathered(trainer: Trainer) -> dict[str, Tensor]:
    """The whole state on the CPU, tensor by tensor; only the first process stores it."""
    tensors: dict[str, Tensor] = {}
    for key, entry in entries_of(trainer).items():
        tensor = trainer.world.gather_rows(entry) if key in SHARED else whole(entry)
        if trainer.world.first:
            tensors[key] = tensor.cpu().contiguous()
    return tensors


def _write(trainer: Trainer, path: Path, tensors: dict[str, Tensor], run: StoredRun) -> None:
    folder = path.parent
    make_folder(folder)
    for unfinished in folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
        unfinished.unlink(missing_ok=True)
    columns = [f.name for f in fields(trainer.metrics_kind)]
    content = {
        "config": trainer.config.model_dump(mode="json"),
        "fingerprints": {name: f.model_dump() for name, f in trainer.decomposition.fingerprints.items()},
        "precision": trainer.engine.precision,
        "how": trainer.how,
        "data": run.data,
        "start": trainer.decomposition.record.get("start"),
        HISTORY: columns,
    }
    rows = [[float(getattr(metrics, name)) for name in columns] for metrics in run.history]
    history = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(columns))
    intact = latest_state(folder)
    safe = "there is no older state" if intact is None else f"{intact.name} is intact"
    try:
        write_tensors(path, {**tensors, HISTORY: history}, content, safe=safe)
    except ValueError as error:  # the only values that cannot be written
        raise FloatingPointError(f"After {trainer.done} steps {str(error).rstrip('.')}; {safe}.") from error


def _remove_others(path: Path, keep: int) -> None:
    """Removes states of later steps and all but the newest ``keep``."""
    states = _states(path.parent)
    at = states.index(path) + 1
    for other in (*states[at:], *states[: max(0, at - keep)]):
        other.unlink(missing_ok=True)


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


# -- reading -----------------------------------------------------------------------------------------------------------


@contextmanager
def _intact(path: Path) -> Iterator[TensorFile]:
    """An open state; what is wrong with it is said together with the state to resume from instead."""
    try:
        with open_tensors(path) as file:
            yield file
    except RefusedState as error:
        raise ValueError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        reason = reason.removeprefix(str(path)).lstrip(": ").rstrip(".")
        older = [state for state in _states(path.parent) if state.name < path.name]
        remedy = (
            f"resume from the state before with resume={str(older[-1])!r} (tl-vpd train: --from-state {older[-1]})"
            if older
            else "there is no older one, so start again in another folder"
        )
        raise ValueError(f"{path} is not an intact training state ({reason}): {remedy}.") from error


def _content(file: TensorFile) -> Mapping[str, Any]:
    """What a state says about itself; those of older versions have strings in the metadata."""
    if file.content is not None:
        return file.content
    metadata = file.metadata
    return {
        "config": json.loads(metadata["config"]),
        "fingerprints": json.loads(metadata.get("fingerprints", "{}")),
        "precision": metadata.get("precision", "float32"),
        "how": json.loads(metadata.get("how", "{}")),
    }


def _check_tensors(trainer: Trainer, file: TensorFile) -> None:
    """Refuses a state whose tensors do not fit, and reads each one once, so that a damaged one is noticed before any is used."""
    path, n = file.path, len(trainer.split.attacked)
    for key, entry in entries_of(trainer).items():
        if key not in file.shapes:
            raise RefusedState(f"{path}: {key} is missing.")
        shape = tuple(entry.shape)
        if key in SHARED:
            shape = (n * trainer.world.size, *shape[1:])
        if file.shapes[key] != shape:
            raise RefusedState(
                f"{path}: {key} is {file.shapes[key]}, this run's is {shape}: resume with the batch size, sequence length and "
                "subcomponents that the run was started with."
            )
        if file.dtypes[key] != entry.dtype:
            raise RefusedState(
                f"{path}: {key} is {file.dtypes[key]}, this run's is {entry.dtype}: resume in that dtype."
            )
        file.read(key)
    step = int(file.read("step"))
    if not 0 <= step <= trainer.config.steps:
        raise ValueError(f"its step is {step}")


@torch.no_grad()
def _fill(trainer: Trainer, file: TensorFile) -> None:
    """Copies a file's tensors, one at a time, into this process's part of them."""
    n = len(trainer.split.attacked)
    for key, entry in entries_of(trainer).items():
        stored = file.read(key)
        if key in SHARED:
            stored = stored[trainer.world.rank * n : (trainer.world.rank + 1) * n]
        copy_whole(entry, stored)
    trainer.after_update()
    trainer.sources.updates = int(file.read("sources/updates"))
    if trainer.minimality.frequencies is not None:
        trainer.minimality.frequencies.updates = int(file.read("frequencies/updates"))
    trainer.done = int(file.read("step"))
