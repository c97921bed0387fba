"""The tensors of a state: everything in a trainer that the next step depends on."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_vpd.training.trainer import Trainer

SHARED = ("sources/values", "sources/first", "sources/second")
"""Tensors of which every process has its rows; a state has all rows, in the order of the batch."""


def entries_of(trainer: Trainer) -> dict[str, Tensor]:
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


def start_moments(trainer: Trainer) -> None:
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
