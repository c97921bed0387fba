"""The state of a run on disk, apart from its product: everything that the next step depends on.

A folder ``state/`` with ``step-00001000.safetensors``: V, U, Γ, AdamW's moments, the adversary's sources and moments, the
frequencies' running mean and the step (random numbers follow from seed and step). Written to a temporary file, synced and
renamed; the newest ``keep`` files stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_vpd.fingerprint import TOLERANCE, Fingerprint, compare
from tl_vpd.storage import tensors_of, write_atomically
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.trainer import Trainer

SHARED = ("sources/values", "sources/first", "sources/second")
"""What every process has its own rows of; a state holds them all, in the order of the batch."""


def save_state(trainer: Trainer, folder: Path, *, keep: int = 2) -> Path:
    """Writes the trainer's state; raises OSError (and leaves older states alone) if it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{trainer.done:08d}.safetensors"
    _start_moments(trainer)
    named = _named_tensors(trainer)
    for key in SHARED:
        named[key] = trainer.world.gather_rows(named[key])
    if not trainer.world.first:
        trainer.world.wait()
        return path
    named["step"] = torch.tensor(trainer.done)
    on_cpu = {k: t.detach().cpu().contiguous() for k, t in named.items()}
    fingerprints = {name: f.model_dump() for name, f in trainer.decomposition.fingerprints.items()}
    metadata = {"config": trainer.config.model_dump_json(), "fingerprints": json.dumps(fingerprints)}
    write_atomically(path, lambda p: save_file(on_cpu, p, metadata=metadata))
    for old in _states(folder)[:-keep]:
        old.unlink()
    trainer.world.wait()
    return path


def latest_state(folder: Path) -> Path | None:
    """The newest state in a folder, if there is one."""
    found = _states(folder)
    return found[-1] if found else None


def load_state(trainer: Trainer, path: Path) -> None:
    """Restores a state in place.

    Raises:
        ValueError: the file is damaged, or the run it belongs to had another config or other target weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            saved = _with_defaults(json.loads(file.metadata()["config"]))
            fingerprints = json.loads(file.metadata().get("fingerprints", "{}"))
            stored = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no intact training state ({error}); delete it to resume from an older one."
        ) from error
    now = json.loads(trainer.config.model_dump_json())
    changed = [k for k in now if saved.get(k) != now[k]]
    if changed:
        raise ValueError(
            f"{path} was written with another config ({', '.join(f'{k}: {saved.get(k)} then, {now[k]} now' for k in changed)}). "
            "Resume with the config the run was started with, or choose another folder."
        )
    _check_target(trainer, path, {name: Fingerprint(**f) for name, f in fingerprints.items()})
    _start_moments(trainer)
    for key in SHARED:
        n = len(trainer.shares.attacked)
        if key in stored:
            stored[key] = stored[key][trainer.world.rank * n : (trainer.world.rank + 1) * n]
    with torch.no_grad():
        for key, target in _named_tensors(trainer).items():
            if key not in stored or stored[key].shape != target.shape:
                raise ValueError(
                    f"{path}: {key} is missing or has another shape than this run's {tuple(target.shape)}."
                )
            if not key.startswith("sources/"):
                target.copy_(stored[key])
    trainer.sources.load_state_dict({k.split("/")[1]: t for k, t in stored.items() if k.startswith("sources/")})
    if trainer.frequencies is not None:
        trainer.frequencies.updates = int(stored["frequencies/updates"])
    trainer.done = int(stored["step"])


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the defaults of settings that were added after it was written."""
    return VPDConfig(**saved).model_dump(mode="json")


def _check_target(trainer: Trainer, path: Path, stored: dict[str, Fingerprint]) -> None:
    wrong = compare(stored, {name: trainer.weights[name] for name in stored if name in trainer.weights})
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name])
        raise ValueError(
            f"{path} is of other weights than this model's: {len(wrong)} sites differ, {worst} by {wrong[worst]:.3g} "
            f"(allowed {TOLERANCE}). Resume with the model the run was started with, or choose another folder."
        )


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


def _named_tensors(trainer: Trainer) -> dict[str, Tensor]:
    named = {f"parts/{k}": t for k, t in tensors_of(trainer.decomposition).items()}
    for i, (_, moments) in enumerate(_moments(trainer)):
        named.update({f"adamw/{i}/{k}": t for k, t in moments.items()})
    named.update({f"sources/{k}": t for k, t in trainer.sources.state_dict().items()})
    if trainer.frequencies is not None:
        named["frequencies/mean"] = trainer.frequencies.mean
        named["frequencies/updates"] = torch.tensor(trainer.frequencies.updates)
    return named


def _moments(trainer: Trainer) -> list[tuple[Tensor, dict[str, Tensor]]]:
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return [(p, trainer.optimizer.state[p]) for p in parameters if p in trainer.optimizer.state]


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
