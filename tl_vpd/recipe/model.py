"""Which model, by name, and on which device.

A recipe runs no code but this package's and its libraries': the options of a model are plain values from a list, and code that
comes with a model (``trust_remote_code``) runs only where the caller says so, not the recipe.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from pydantic import Field, field_validator

from tl_vpd import bundled
from tl_vpd.adapters.loading import Kind, load_model
from tl_vpd.checks import choice, device_of, shown
from tl_vpd.frozen import Frozen

OPTIONS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "refactor_factored_attn_matrices",
    "fold_value_biases",
    "compatibility_mode",
    "dtype",
    "n_ctx",
    "first_n_layers",
    "default_prepend_bos",
    "default_padding_side",
    "checkpoint_index",
    "checkpoint_value",
    "checkpoint_label",
    "revision",
    "cache_dir",
    "local_files_only",
)
"""What a recipe may say about a model. Others could make it run code, such as ``trust_remote_code`` and, with kernels from the
Hub, ``attn_implementation``."""


class ModelRecipe(Frozen):
    """Which model."""

    name: str = "bundled"
    """``bundled``, or a name that TransformerLens knows, or a folder as transformers saves it."""
    kind: Kind | None = None
    """``hooked_transformer`` or ``bridge`` (None: HookedTransformer where the installed TransformerLens has it; a bridge
    for a folder)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments (those of ``OPTIONS``) of ``HookedTransformer.from_pretrained`` or, for a bridge, of
    ``boot_transformers``; ``compatibility_mode: true`` processes a bridge's weights."""
    device: str = "cpu"
    """Under ``torchrun``, ``cuda`` is the device of each process."""

    @field_validator("options")
    @classmethod
    def _plain_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, value in options.items():
            if name == "trust_remote_code":
                raise ValueError(
                    "a recipe cannot let a model's own code run: leave trust_remote_code out, and pass --trust-remote-code on "
                    "the command line if you trust it."
                )
            if name not in OPTIONS:
                raise ValueError(f"{name!r} is not an option of a recipe: its options are {', '.join(OPTIONS)}.")
            if not isinstance(value, str | int | float | bool | None):
                raise ValueError(f"{name}={shown(value)} is a {type(value).__name__}: give a plain value.")
        if "dtype" in options:
            choice("dtype", options["dtype"], ("float32", "float64", "bfloat16", "float16"))
        return options

    def load(self, *, trust_remote_code: bool = False) -> Any:
        """The model on its device. Raises ValueError where the device is not available, the bundled model has options, or the
        model comes with code and ``trust_remote_code`` is off.
        """
        device = usable_device(self.device)
        if self.name != "bundled":
            options = dict(self.options)
            if "dtype" in options:
                options["dtype"] = getattr(torch, options["dtype"])
            if trust_remote_code:
                options["trust_remote_code"] = True
            with nullcontext() if trust_remote_code else _no_code_of(self.name):
                return load_model(self.name, kind=self.kind, device=device, **options)
        if self.options:
            raise ValueError(f"model.options ({', '.join(self.options)}): the bundled model takes none.")
        return bundled.model(kind=self.kind, device=device)


@contextmanager
def _no_code_of(name: str) -> Iterator[None]:
    """Refuses what transformers would import from a model's files; for some names TransformerLens lets it unasked."""

    refusal = (
        f"The model {name!r} comes with code that would run: pass --trust-remote-code on the command line (or "
        "load(trust_remote_code=True)) if you trust it."
    )
    module = "transformers.dynamic_module_utils"
    with (
        mock.patch(f"{module}.get_cached_module_file", side_effect=ValueError(refusal)),
        mock.patch(f"{module}.TIME_OUT_REMOTE_CODE", 0),  # nobody is asked
    ):
        try:
            yield
        except ValueError as error:
            raise ValueError(refusal) if "trust_remote_code" in str(error) else error from error


def usable_device(device: str) -> str:
    """A device's name; ``cuda`` as the device of this process, where ``torchrun`` started several. Raises ValueError where this
    machine has no such device.
    """
    rank = os.environ.get("LOCAL_RANK")
    name = f"cuda:{rank}" if isinstance(device, str) and device == "cuda" and rank is not None else device
    device_of(name)
    return name
