"""The state of a run on disk: everything that the next step depends on.

A folder ``state/`` with ``step-00001000.safetensors``: V, U, Γ, AdamW's moments, the adversary's sources and moments, the
frequencies' running mean and the step (random numbers, schedules and the place in the data follow from seed and step). Written
to a temporary file, synced and renamed; the newest ``keep`` files stay.

A state has whole tensors, whatever the sharding and the number of processes that wrote it, so that a run may continue with
others.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_vpd.components.fingerprint import Fingerprint
from tl_vpd.components.storage import write_atomically
from tl_vpd.training.distributed.sharding import copy_whole, whole
from tl_vpd.training.state_checks import RefusedState, check_config, check_precision, check_target
from tl_vpd.training.trainer import Trainer

log = logging.getLogger(__name__)
SHARED = ("sources/values", "sources/first", "sources/second")
"""Tensors of which every process has its rows; a state has all rows, in the order of the batch."""


def save_state(trainer: Trainer, folder: Path, *, keep: int = 2) -> Path:
    """Writes the trainer's state; every process must call it, and the first writes.

    Args:
        trainer: of the run.
        folder: of states.
        keep: the newest states that stay.

    Raises:
        ValueError: ``keep`` is below 1.
        OSError: it cannot be written; older states are left alone, and all processes raise.
    """
    if keep < 1:
        raise ValueError(f"keep_states is {keep}: at least one state must stay.")
    path = folder / f"step-{trainer.done:08d}.safetensors"
    tensors = _gathered(trainer)
    failure: OSError | None = None
    if trainer.world.first:
        try:
            _write(trainer, path, tensors, keep)
        except OSError as error:
            failure = error
    if trainer.world.add(torch.tensor(float(failure is not None), device=trainer.decomposition.device)) > 0:
        raise failure or OSError(f"The first process could not write {path}; its message says why.")
    return path


def _gathered(trainer: Trainer) -> dict[str, Tensor]:
    """The whole state on the CPU, tensor by tensor; only the first process stores it."""
    _start_moments(trainer)
    tensors: dict[str, Tensor] = {}
    for key, entry in _entries(trainer).items():
        tensor = trainer.world.gather_rows(entry) if key in SHARED else whole(entry)
        if trainer.world.first:
            tensors[key] = tensor.cpu().contiguous()
    return tensors


def _write(trainer: Trainer, path: Path, tensors: dict[str, Tensor], keep: int) -> None:
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
        unfinished.unlink()
    fingerprints = {name: f.model_dump() for name, f in trainer.decomposition.fingerprints.items()}
    metadata = {
        "config": trainer.config.model_dump_json(),
        "fingerprints": json.dumps(fingerprints),
        "precision": trainer.engine.precision,
        "how": json.dumps(trainer.how),
    }
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with _full_disk_named(folder, size):
        write_atomically(path, lambda p: save_file(tensors, p, metadata=metadata))
        _sync(folder)
    for old in _states(folder)[:-keep]:
        old.unlink()


@contextmanager
def _full_disk_named(folder: Path, size: int) -> Iterator[None]:
    """Turns the safetensors library's error into an OSError that names the full folder and the newest intact state."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        text = str(error)
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "quota exceeded" in text
        if not full:
            raise OSError(number or errno.EIO, f"No state could be written to {folder}: {text}") from error
        intact = [path.name for path in _states(folder)]
        remedy = f"{intact[-1]} is intact, so make room and resume" if intact else "make room and start again"
        raise OSError(
            errno.ENOSPC,
            f"No space left on the disk of {folder} for a state of {size / 1e6:.1f} MB: {remedy}",
        ) from error


def _sync(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest_state(folder: Path) -> Path | None:
    """The newest state in a folder, if there is one."""
    states = _states(folder)
    return states[-1] if states else None


def load_state(trainer: Trainer, path: Path) -> None:
    """Restores a state in place; the number of processes and the sharding may differ from those that wrote it.

    Where the run is carried out in another way than before, so that it continues to rounding and not bit for bit, a warning says
    in which.

    Args:
        trainer: of the run, of the same config, precision and target.
        path: of the state.

    Raises:
        ValueError: the file is damaged, or the run it belongs to had another config, precision or other target weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads(file.metadata()["config"])
            fingerprints = json.loads(file.metadata().get("fingerprints", "{}"))
            check_config(trainer.config, path, saved)
            check_precision(trainer.engine.precision, path, file.metadata().get("precision", "float32"))
            check_target(trainer.weights, path, {name: Fingerprint(**f) for name, f in fingerprints.items()})
            how = json.loads(file.metadata().get("how", "{}"))
            _start_moments(trainer)
            _fill(trainer, path, file)
    except RefusedState as error:
        raise ValueError(str(error)) from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not an intact training state ({error}); delete it to resume from an older one."
        ) from error
    changed = [
        f"{k}={how[k]!r} then, {trainer.how[k]!r} now" for k in how if k in trainer.how and how[k] != trainer.how[k]
    ]
    if changed:
        log.warning("%s: the run continues, the same to rounding, not bit for bit (%s)", path, "; ".join(changed))


@torch.no_grad()
def _fill(trainer: Trainer, path: Path, file: Any) -> None:
    """Copies a file's tensors, one at a time, into this process's part of them."""
    keys = set(file.keys())
    for key, entry in _entries(trainer).items():
        if key not in keys:
            raise RefusedState(f"{path}: {key} is missing.")
        stored = file.get_tensor(key)
        if key in SHARED:
            n = len(trainer.split.attacked)
            stored = stored[trainer.world.rank * n : (trainer.world.rank + 1) * n]
        if stored.shape != entry.shape:
            raise RefusedState(
                f"{path}: {key} is {tuple(stored.shape)}, this run's is {tuple(entry.shape)}: resume with the batch size, "
                "sequence length and subcomponents that the run was started with."
            )
        copy_whole(entry, stored)
    trainer.after_update()
    trainer.sources.updates = int(file.get_tensor("sources/updates"))
    if trainer.minimality.frequencies is not None:
        trainer.minimality.frequencies.updates = int(file.get_tensor("frequencies/updates"))
    trainer.done = int(file.get_tensor("step"))


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


def _entries(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that the next step depends on, by its key in the file."""
    decomposition, frequencies = trainer.decomposition, trainer.minimality.frequencies
    names = [f"{kind}/{site}" for kind in ("V", "U") for site in decomposition.sites]
    names = [name for name in names if name not in trainer.ties.followers]
    names += [f"gamma/{name}" for name, _ in decomposition.gamma.named_parameters()]
    entries: dict[str, Tensor] = {}
    for i, (name, p) in enumerate(zip(names, trainer.parameters, strict=True)):
        moments = trainer.optimizer.state[p]
        entries[f"parts/{name}"] = p
        for key in ("step", "exp_avg", "exp_avg_sq"):
            entries[f"adamw/{i}/{key}"] = moments[key]
    entries.update({f"sources/{key}": tensor for key, tensor in trainer.sources.state_dict().items()})
    if frequencies is not None:
        entries["frequencies/mean"] = frequencies.mean
        entries["frequencies/updates"] = torch.tensor(frequencies.updates)
    entries["step"] = torch.tensor(trainer.done)
    return entries


def _start_moments(trainer: Trainer) -> None:
    """Gives AdamW the zero moments that it otherwise makes at the first step, so that every state has the same tensors."""
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            if trainer.optimizer.state.get(p):
                continue
            trainer.optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
