"""A checkpoint of any variant as the same few tensors: of the target, V and U by module, and Γ's.

Tensors are mapped from the file, not read: each is read when somebody copies it. Loading executes nothing (``weights_only``).

==========================  ==================================================================================================
variant                     told apart by
==========================  ==================================================================================================
newer                       ``target_model.*``, ``_components.*.{V,U}``, ``ci_fn.*``
older names                 ``patched_model.``, ``_gates.``, ``.original.weight``, ``.components.{V,U}``, top-level ``_ci_fns.``
V and U in the target       ``target_model.<module>.{V,U,linear.weight}``
target kept apart           no ``target_model.*``: it comes from the target's folder
single file                 ``{method, wrappers, ci_fn, C_per_module, cfg, final_metrics}``, Γ in the layout of ``nn.Linear``
==========================  ==================================================================================================
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from tl_vpd.formats.param_decomp.names import COMPONENTS, GLOBAL, LAYERWISE, TARGET, canonical, site_of
from tl_vpd.printing import Printed
from tl_vpd.site import nearest

SINGLE_FILE = {"wrappers", "ci_fn", "C_per_module", "cfg"}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_TRANSFORMER = {
    "_input_projector.W": "embed.weight",
    "_input_projector.b": "embed.bias",
    "_output_head.W": "unembed.weight",
    "_output_head.b": "unembed.bias",
    "attn.q_proj.weight": "q.weight",
    "attn.k_proj.weight": "k.weight",
    "attn.v_proj.weight": "v.weight",
    "attn.out_proj.weight": "o.weight",
    "attn.rope.inv_freq": "inv_freq",
    "mlp.0.W": "mlp_in.weight",
    "mlp.0.b": "mlp_in.bias",
    "mlp.2.W": "mlp_out.weight",
    "mlp.2.b": "mlp_out.bias",
}
"""Keys of the shared transformer (of its blocks without ``_blocks.{i}.``) -> ours; ``W`` is ``[in, out]``."""

_SINGLE_FILE_TRANSFORMER = {
    "proj_in.weight": "embed.weight",
    "proj_in.bias": "embed.bias",
    "proj_out.weight": "unembed.weight",
    "proj_out.bias": "unembed.bias",
    "attn.q_proj.weight": "q.weight",
    "attn.k_proj.weight": "k.weight",
    "attn.v_proj.weight": "v.weight",
    "attn.o_proj.weight": "o.weight",
    "mlp.0.weight": "mlp_in.weight",
    "mlp.0.bias": "mlp_in.bias",
    "mlp.2.weight": "mlp_out.weight",
    "mlp.2.bias": "mlp_out.bias",
}
"""The same for a single file, where every weight is ``[out, in]``."""

_BLOCK = re.compile(r"_?blocks\.(\d+)\.(.*)")


@dataclass
class Checkpoint(Printed):
    """The tensors of a checkpoint, mapped from its file.

    Attributes:
        path: of the file.
        target: of the target, by key without prefix, ``[out, in]``; empty where they are kept apart.
        V: read directions ``[d_in, C]`` by module.
        U: write directions ``[C, d_out]`` by module.
        transformer: Γ's as our shared transformer names them, ``[out, in]``, sites still in the authors' order; and ``inv_freq``.
        mlps: Γ's by module and key, where there is a small MLP per subcomponent.
        settings: the config in a single file (None: the config is in a file beside).
        metrics: the metrics in a single file.
    """

    path: Path
    target: dict[str, Tensor] = field(default_factory=dict)
    V: dict[str, Tensor] = field(default_factory=dict)
    U: dict[str, Tensor] = field(default_factory=dict)
    transformer: dict[str, Tensor] = field(default_factory=dict)
    mlps: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    settings: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """The decomposed modules, in the order in which Γ reads and writes them."""
        return sorted(self.V)

    @property
    def counts(self) -> dict[str, int]:
        """Number of subcomponents C by module, in the same order."""
        return {module: self.V[module].shape[1] for module in self.modules}


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a decomposition's checkpoint.

    Raises:
        ValueError: the file is cut short, holds more than data, or has keys that are unknown, missing or double.
    """
    content = load_tensors(path)
    checkpoint = (_single_file if content.keys() >= SINGLE_FILE else _state_dict)(path, content)
    if not checkpoint.V:
        raise ValueError(f"{path} has no V and U (_components.*): it is not the checkpoint of a decomposition.")
    for module in sorted(checkpoint.V.keys() ^ checkpoint.U.keys()):
        raise ValueError(f"{path} has {'V' if module in checkpoint.V else 'U'} of {module} only: it is damaged.")
    for module, V in checkpoint.V.items():
        U = checkpoint.U[module]
        if site_of(module) is None:
            raise ValueError(
                f"{path} decomposes {module}, which LlamaSimpleMLP, the only target that is read, does not have."
            )
        if V.ndim != 2 or U.ndim != 2 or V.shape[1] != U.shape[0]:
            raise ValueError(
                f"{path}: V of {module} is {tuple(V.shape)} and U {tuple(U.shape)}; [d_in, C] and [C, d_out] are needed."
            )
    return checkpoint


def read_target(path: Path) -> dict[str, Tensor]:
    """The tensors of a target's checkpoint, by key without prefix."""
    return {canonical(key).removeprefix(TARGET): t for key, t in _tensors_only(path, load_tensors(path)).items()}


def load_tensors(path: Path) -> dict[str, Any]:
    """The content of a file of ``torch.save``, its tensors mapped from it; executes nothing.

    Raises:
        ValueError: it is cut short, not such a file, or holds more than tensors and plain data.
    """
    if not is_zipfile(path):
        raise ValueError(
            f"{path} is not a whole file of torch.save (of {path.stat().st_size} bytes): is it half a download? Get it again."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of {unknown[1]}" if unknown else "more than data"
        raise ValueError(
            f"{path} holds {what}: only tensors and plain data are read, since other objects run code."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, OSError) as error:
        reason = str(error).strip().splitlines()[0].split(".")[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is damaged ({reason}): get it again.") from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds a {type(content).__name__} where tensors by name are needed.")
    return dict(content)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same numbers; without reading them where they are the same part of a file."""
    if a.shape == b.shape and a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype:
        return True
    return a.shape == b.shape and torch.equal(a, b.to(a.dtype))


def _state_dict(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    checkpoint = Checkpoint(path)
    names: dict[str, str] = {}
    for stored, tensor in _tensors_only(path, content).items():
        key = canonical(stored)
        if key in names:
            if not same(content[names[key]], tensor):
                raise ValueError(
                    f"{path} has {key} twice with different numbers ({names[key]} and {stored}): it is damaged."
                )
            continue
        names[key] = stored
        if key.startswith(TARGET):
            checkpoint.target[key.removeprefix(TARGET)] = tensor
        elif key.startswith(COMPONENTS) and key.endswith((".V", ".U")):
            side = checkpoint.V if key.endswith(".V") else checkpoint.U
            side[key.removeprefix(COMPONENTS)[:-2]] = tensor
        elif key.startswith(GLOBAL):
            name, transposed = _transformer_name(path, stored, key.removeprefix(GLOBAL), _TRANSFORMER)
            _add(path, checkpoint.transformer, name, tensor.T if transposed else tensor)
        elif key.startswith(LAYERWISE) and ".layers." in key:
            module, _, rest = key.removeprefix(LAYERWISE).partition(".layers.")
            checkpoint.mlps.setdefault(module, {})[rest] = tensor
        else:
            raise _unknown(path, stored)
    return checkpoint


def _single_file(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    extra = content.keys() - SINGLE_FILE - {"method", "final_metrics"}
    if extra:
        raise _unknown(path, min(extra))
    checkpoint = Checkpoint(path, settings=_plain(path, "cfg", content["cfg"]))
    checkpoint.settings["C_per_module"] = _plain(path, "C_per_module", content["C_per_module"])  # type: ignore[index]
    checkpoint.metrics = _plain(path, "final_metrics", content.get("final_metrics") or {})
    for module, pair in _plain(path, "wrappers", content["wrappers"]).items():
        for name, tensor in _tensors_only(path, _plain(path, f"wrappers of {module}", pair)).items():
            if name == "W_target":
                checkpoint.target[f"{module}.weight"] = tensor
            elif name in ("V", "U"):
                (checkpoint.V if name == "V" else checkpoint.U)[module] = tensor
            else:
                raise _unknown(path, f"wrappers.{module}.{name}")
    for stored, tensor in _tensors_only(path, _plain(path, "ci_fn", content["ci_fn"])).items():
        name, _ = _transformer_name(path, stored, stored, _SINGLE_FILE_TRANSFORMER)
        _add(path, checkpoint.transformer, name, tensor)
    return checkpoint


def _transformer_name(path: Path, stored: str, key: str, names: Mapping[str, str]) -> tuple[str, bool]:
    """Our name of a key of the shared transformer, and whether it is stored the other way round."""
    block = _BLOCK.fullmatch(key)
    short = block[2] if block else key
    if short not in names or (block is None) != (names[short].split(".")[0] in ("embed", "unembed")):
        raise _unknown(path, stored)
    return (f"blocks.{block[1]}." if block else "") + names[short], short.endswith(".W")


def _add(path: Path, tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in tensors and not same(tensors[name], tensor):
        raise ValueError(f"{path} has Γ's {name} twice with different numbers: it is damaged.")
    tensors[name] = tensor


def _tensors_only(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {key} is a {type(value).__name__}, and a tensor is needed: it is not a run's checkpoint."
            )
        if value.layout != torch.strided or value.is_meta:
            kind = "has no data" if value.is_meta else f"is stored as {value.layout}"
            raise ValueError(f"{path}: {key} {kind}, and plain tensors are needed: save the run's whole weights.")
        if value.dtype not in FLOATS:
            raise ValueError(
                f"{path}: {key} is {value.dtype}, and floating-point weights are needed: get the unquantised file."
            )
    low = sorted({str(v.dtype) for v in content.values() if v.dtype in (torch.float16, torch.bfloat16)})
    if low:
        warnings.warn(f"{path} stores {' and '.join(low)}: what is read is no more exact than that.", stacklevel=2)
    return dict(content)


def _plain(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: {name} is a {type(value).__name__} where names with values are needed.")
    return dict(value)


def _unknown(path: Path, key: str) -> ValueError:
    known = (*_TRANSFORMER, *_SINGLE_FILE_TRANSFORMER)
    return ValueError(f"{path} has the key {key!r}, which no format that is read has{nearest(key, known)}.")
