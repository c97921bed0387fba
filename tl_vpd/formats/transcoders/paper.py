"""The transcoders that the authors compared VPD with: ``config.json`` and ``encoder.pt``.

Per-layer ones are a folder per layer, whose config does not say which; cross-layer ones are one folder. Batch top-k transcoders
come without thresholds (the authors select over the batch at hand): ``calibrate`` them on tokens before use. Loading executes
nothing.

    >>> plt = load_paper_transcoders({0: "tc_k16_layer0", 1: "tc_k16_layer1"})           # doctest: +SKIP
    >>> plt = baselines.calibrate(plt, model, tokens, plt.record["k"])                   # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_vpd.baselines.transcoders import Transcoder, Transcoders
from tl_vpd.checks import integer, path_of, shown
from tl_vpd.files.json_files import read_json

CONFIG, WEIGHTS = "config.json", "encoder.pt"
TYPES = ("vanilla", "batchtopk", "jumprelu")


def load_paper_transcoders(
    folders: str | os.PathLike[str] | Mapping[int, str | os.PathLike[str]],
) -> Transcoders:
    """Reads cross-layer transcoders from a folder, or per-layer ones from a folder for each layer.

    Args:
        folders: of ``config.json`` and ``encoder.pt``.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: ``folders`` is something else.
        ValueError: a setting is another one, or a file is damaged.
    """
    if isinstance(folders, Mapping):
        if not folders:
            raise ValueError("folders={}: give a folder for each layer.")
        by_layer, record = {}, {}
        for key, entry in folders.items():
            layer = integer("layer", key, minimum=0)
            config, tensors = _files(path_of(f"folders[{layer}]", entry))
            by_layer[layer] = _transcoder(config, tensors, "", str(entry))
            record = _record(config)
        return Transcoders(by_layer, record=record)
    folder = path_of("folders", folders)
    config, tensors = _files(folder)
    layers = config.get("layers")
    if isinstance(layers, str):
        try:
            layers = json.loads(layers)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: layers={shown(layers)} is not a list.") from error
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{folder} is of one layer, which its config does not name: give {{layer: folder}}.")
    by_layer = {
        integer("layer", layer, minimum=0): _transcoder(config, tensors, f".{i}", str(folder))
        for i, layer in enumerate(layers)
    }
    return Transcoders(by_layer, cross_layer=True, record=_record(config))


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of a folder."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("encoder_type") not in TYPES:
        kind = config.get("encoder_type") if isinstance(config, dict) else config
        raise ValueError(f"{folder / CONFIG}: encoder_type is {shown(kind)}; {', '.join(TYPES)} are read.")
    for setting in ("input_unit_norm", "skip_connection", "train_post_encoder"):
        if config.get(setting):
            raise ValueError(f"{folder / CONFIG}: {setting} is on, which is not read.")
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is not a file of tensors: {' '.join(str(error).split())[:200].rstrip('.')}."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} does not hold tensors by name.")
    return config, tensors


def _transcoder(config: dict[str, Any], tensors: dict[str, Tensor], suffix: str, what: str) -> Transcoder:
    """One layer's tensors; ``suffix``: of their names in a cross-layer file."""
    missing = [f"{n}{suffix}" for n in ("W_enc", "b_enc", "W_dec", "b_dec") if f"{n}{suffix}" not in tensors]
    if missing:
        raise ValueError(f"{what} lacks the tensor {missing[0]}.")
    W_enc, b_enc, W_dec, b_dec = (tensors[f"{n}{suffix}"] for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    if config.get("pre_enc_bias"):
        b_enc = b_enc - b_dec @ W_enc
    if config["encoder_type"] == "jumprelu":
        name = f"jumprelu_log_thresholds{suffix}" if suffix else "jumprelu.log_threshold"
        if name not in tensors:
            raise ValueError(f"{what} lacks the tensor {name}.")
        threshold = tensors[name].exp()
    else:
        fill = float("nan") if config["encoder_type"] == "batchtopk" else 0.0
        threshold = torch.full_like(b_enc, fill)
    return Transcoder(W_enc, b_enc, W_dec if suffix else W_dec[None], b_dec, threshold)


def _record(config: dict[str, Any]) -> dict[str, Any]:
    """What is known of the training."""
    kept = {"k": config.get("top_k"), "tokens": config.get("num_tokens"), "seed": config.get("seed")}
    return {name: value for name, value in kept.items() if value is not None}
