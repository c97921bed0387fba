"""The tensors of a state: everything in a trainer that the next step depends on."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_vpd.training.optimizers import moments
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
    stored = {id(p): (optimizer, tensors) for p, optimizer, tensors in moments(trainer.optimizers)}
    for i, (name, p) in enumerate(zip(names, trainer.parameters, strict=True)):
        entries[f"parts/{name}"] = p
        optimizer, tensors = stored[id(p)]
        entries |= {f"{optimizer}/{i}/{key}": tensor for key, tensor in tensors.items()}
    entries.update({f"sources/{key}": tensor for key, tensor in trainer.sources.state_dict().items()})
    if frequencies is not None:
        entries["frequencies/mean"] = frequencies.mean
        entries["frequencies/updates"] = torch.tensor(frequencies.updates)
    entries["step"] = torch.tensor(trainer.done)
    return entries
