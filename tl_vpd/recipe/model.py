"""Which model, by name, and on which device."""

from __future__ import annotations

import os
from typing import Any

import torch
from pydantic import Field

from tl_vpd import bundled
from tl_vpd.adapters.loading import Kind, load_model
from tl_vpd.frozen import Frozen


class ModelRecipe(Frozen):
    """Which model."""

    name: str = "bundled"
    """``bundled``, or a name or local folder that TransformerLens knows."""
    kind: Kind | None = None
    """``hooked_transformer`` or ``bridge`` (None: HookedTransformer where the installed TransformerLens has it)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of ``HookedTransformer.from_pretrained`` (``fold_ln``, ``center_unembed``, ...) or, for a bridge, of
    ``boot_transformers``; ``compatibility_mode: true`` processes a bridge's weights."""
    device: str = "cpu"
    """Under ``torchrun``, ``cuda`` is the device of each process."""

    def load(self) -> Any:
        """The model on its device.

        Raises:
            ValueError: the device is not available, or the bundled model has options.
        """
        device = usable_device(self.device)
        if self.name != "bundled":
            return load_model(self.name, kind=self.kind, device=device, **self.options)
        if self.options:
            raise ValueError(f"model.options ({', '.join(self.options)}): the bundled model takes none.")
        return bundled.model(kind=self.kind, device=device)


def usable_device(device: str) -> str:
    """A device's name; ``cuda`` as the device of this process, where ``torchrun`` started several.

    Raises:
        ValueError: PyTorch knows no such device, or this machine has none.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}: give cpu, cuda, cuda:0, ...") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and PyTorch sees no GPU on this machine: use cpu.")
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device
