"""Models by name or folder, as the class that the installed TransformerLens has: HookedTransformer up to 3.x, else
TransformerBridge, which alone reads folders.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from tl_vpd.adapters.arcee import is_arcee
from tl_vpd.adapters.building import Kind, load_arcee
from tl_vpd.adapters.versions import HookedTransformer, transformer_bridge
from tl_vpd.checks import choice, device_of, shown


def default_kind() -> Kind:
    """``hooked_transformer`` where the installed TransformerLens has it."""
    return "bridge" if HookedTransformer is None else "hooked_transformer"


def load_model(
    name: str,
    *,
    kind: Kind | None = None,
    device: str | torch.device = "cpu",
    compatibility_mode: bool = False,
    **options: Any,
) -> nn.Module:
    """A model by a name or folder that TransformerLens knows.

    Args:
        name: of a model, or a folder (of an imported model too).
        kind: ``hooked_transformer`` or ``bridge`` (None: what the installed TransformerLens has; a bridge for a folder).
        device: where the model goes.
        compatibility_mode: of a bridge: process its weights as HookedTransformer does.
        options: of ``HookedTransformer.from_pretrained`` or ``TransformerBridge.boot_transformers``.

    Raises:
        TypeError: the name is not a text.
        NotADirectoryError: it is a file.
        ValueError: there is no such model, kind or device, or an option does not go with the kind.
        ImportError: the installed TransformerLens has no such class.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"The model's name is a {type(name).__name__}: give the name of a model, or of a folder.")
    name, device = os.fspath(name), device_of(device)
    if Path(name).is_file():
        raise NotADirectoryError(f"{name} is a file: give the folder that it is in, or the name of a model.")
    asked, kind = kind, default_kind() if kind is None else kind
    choice("kind", kind, get_args(Kind))
    if is_arcee(Path(name)):  # HookedTransformer.from_pretrained does not know this architecture
        dtype = options.pop("dtype", torch.float32)
        if options or compatibility_mode:
            raise ValueError(f"{name} is an imported model, which takes dtype and none of the other options.")
        return load_arcee(Path(name), kind=kind, device=device, dtype=dtype)
    if kind == "bridge":
        return _bridge(name, device, compatibility_mode, options)
    if HookedTransformer is None:
        raise ImportError("This TransformerLens has no HookedTransformer: use kind='bridge', or install 3.x.")
    if compatibility_mode:
        raise ValueError("compatibility_mode belongs to kind='bridge'; a HookedTransformer has fold_ln and so on.")
    if _is_known(name):
        return HookedTransformer.from_pretrained(name, device=str(device), **options)
    if not Path(name).is_dir():
        raise ValueError(
            f"{shown(name)} is neither a folder nor a model that TransformerLens's HookedTransformer knows: give another name, "
            "or use kind='bridge'."
        )
    if asked is not None:
        raise ValueError(
            f"{shown(name)} is a folder, which HookedTransformer.from_pretrained does not read: use kind='bridge'."
        )
    return _bridge(name, device, compatibility_mode, options)


def _is_known(name: str) -> bool:
    """Whether ``HookedTransformer.from_pretrained`` knows a model of this name."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        get_official_model_name(name)
    except ValueError:
        return False
    return True


def _bridge(name: str, device: torch.device, compatibility_mode: bool, options: dict[str, Any]) -> Any:
    bridge = transformer_bridge().boot_transformers(name, device=str(device), **options)
    if compatibility_mode:
        bridge.enable_compatibility_mode()
    return bridge


def converted_neox_weights(source: Any, cfg: Any) -> dict[str, torch.Tensor]:
    """A GPT-NeoX of transformers as the state of a HookedTransformer of the same shape."""
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights

    return convert_neox_weights(source, cfg)
