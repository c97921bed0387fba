"""Transcoders in the folders of circuit-tracer: ``config.yaml`` beside safetensors.

=======================  ============================================================================================
``model_kind``           files
=======================  ============================================================================================
transcoder_set           ``layer_{i}.safetensors``: W_enc, W_dec ``[n, d]``, b_enc, b_dec, threshold, W_skip ``[out, in]``
cross_layer_transcoder   ``W_enc_{i}.safetensors``: W_enc_{i}, b_enc_{i}, b_dec_{i}, threshold_{i};
                         ``W_dec_{i}.safetensors``: W_dec_{i} ``[n, layers − i, d]``
=======================  ============================================================================================

Without a threshold the activation is a ReLU. Cross-layer skip connections are not in the format.

    >>> save_circuit_tracer_transcoders(clt, "clt", model_name="my-model")                     # doctest: +SKIP
    >>> load_circuit_tracer_transcoders("clt")                                                 # doctest: +SKIP
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tl_vpd.baselines.transcoders import Transcoder, Transcoders
from tl_vpd.checks import instance, path_of, shown, text_of
from tl_vpd.files.atomic import make_folder, write_text
from tl_vpd.files.tensor_file import TensorFile, open_tensors, write_tensors
from tl_vpd.formats.transcoders.hooks import check_input, check_output

CONFIG = "config.yaml"
SET, CROSS = "transcoder_set", "cross_layer_transcoder"
THRESHOLD = "activation_function.threshold"


def save_circuit_tracer_transcoders(
    transcoders: Transcoders, folder: str | os.PathLike[str], *, model_name: str, scan: str | None = None
) -> Path:
    """Writes a folder that circuit-tracer loads; returns it.

    Args:
        transcoders: of all layers, with as many latents each.
        folder: made if needed.
        model_name: of the target, as TransformerLens knows it.
        scan: of the features' pages (None: as the model).

    Raises:
        OSError: it cannot be written.
        ValueError: the format does not have these transcoders.
    """
    instance("transcoders", transcoders, Transcoders)
    folder, model_name = path_of("folder", folder), text_of("model_name", model_name)
    scan = model_name if scan is None else text_of("scan", scan)
    _check_writable(transcoders)
    make_folder(folder)
    for i in transcoders.layers:
        one = transcoders[i]
        if transcoders.cross_layer:
            encoder = {f"W_enc_{i}": one.W_enc.T, f"b_enc_{i}": one.b_enc, f"b_dec_{i}": one.b_dec}
            encoder[f"threshold_{i}"] = one.threshold
            write_tensors(folder / f"W_enc_{i}.safetensors", encoder, {"layer": i})
            write_tensors(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": one.W_dec.transpose(0, 1)}, {"layer": i})
            continue
        tensors = {"W_enc": one.W_enc.T, "b_enc": one.b_enc, "b_dec": one.b_dec, THRESHOLD: one.threshold}
        tensors["W_dec"] = one.W_dec[0]
        if one.W_skip is not None:
            tensors["W_skip"] = one.W_skip.T
        write_tensors(folder / f"layer_{i}.safetensors", tensors, {"layer": i})
    config = {
        "model_name": model_name,
        "model_kind": CROSS if transcoders.cross_layer else SET,
        "feature_input_hook": transcoders.record.get("input_hook", "mlp.hook_in"),
        "feature_output_hook": "mlp.hook_out",
        "scan": scan,
    }
    write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    return folder


def load_circuit_tracer_transcoders(folder: str | os.PathLike[str]) -> Transcoders:
    """Reads a folder of circuit-tracer.

    Args:
        folder: of ``config.yaml`` and the safetensors.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is another kind, reads or writes other hooks, has another activation, or a file is damaged.
    """
    folder = path_of("folder", folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}: give the folder of a transcoder set or of cross-layer transcoders."
        )
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG} is not YAML: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(config, dict) or config.get("model_kind") not in (SET, CROSS):
        kind = config.get("model_kind") if isinstance(config, dict) else config
        raise ValueError(f"{folder / CONFIG}: model_kind is {shown(kind)}; {SET} and {CROSS} are read.")
    what = str(folder / CONFIG)
    record = check_input(config.get("feature_input_hook"), what)
    check_output(config.get("feature_output_hook"), what)
    if config.get("activation", "relu") != "relu":
        raise ValueError(f"{what}: activation={shown(config['activation'])} is not read; relu and thresholds are.")
    by_layer = _cross_layer(folder) if config["model_kind"] == CROSS else _set(folder, config)
    return Transcoders(by_layer, cross_layer=config["model_kind"] == CROSS, record=record)


def _check_writable(transcoders: Transcoders) -> None:
    sizes = {transcoders[layer].sizes for layer in transcoders.layers}
    why = None
    if transcoders.reads != "mlp_in":
        why = "SAEs are not in the format"
    elif not transcoders.calibrated:
        why = "the thresholds are not known (NaN): calibrate the transcoders first"
    elif transcoders.layers != list(range(len(transcoders.layers))):
        why = f"every layer from 0 on must be there, and these are of {transcoders.layers}"
    elif len(sizes) > 1:
        why = f"all layers must have the same sizes, and these are {sorted(sizes)}"
    elif transcoders.cross_layer and any(transcoders[layer].W_skip is not None for layer in transcoders.layers):
        why = "cross-layer transcoders have no skip connection there"
    if why is not None:
        raise ValueError(f"circuit-tracer cannot load these transcoders: {why}.")


def _set(folder: Path, config: dict[str, Any]) -> dict[int, Transcoder]:
    """Per-layer transcoders."""
    paths = config.get("transcoders") or sorted(folder.glob("layer_*.safetensors"))
    if any(str(path).startswith("hf://") for path in paths):
        raise ValueError(f"{folder / CONFIG} names files on the Hub: download them and name their paths.")
    if not config.get("transcoders"):
        paths = [folder / f"layer_{i}.safetensors" for i in range(len(paths))]
    by_layer = {}
    for i, path in enumerate(paths):
        with open_tensors(folder / path) as file:
            W_enc, b_enc, W_dec, b_dec = (_read(file, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
            threshold = file.read(THRESHOLD) if THRESHOLD in file.shapes else torch.zeros_like(b_enc)
            skip = file.read("W_skip").T if "W_skip" in file.shapes else None
        by_layer[i] = Transcoder(W_enc.T, b_enc, W_dec[None], b_dec, threshold, skip)
    return by_layer


def _cross_layer(folder: Path) -> dict[int, Transcoder]:
    """Cross-layer transcoders."""
    by_layer = {}
    for i in range(len(list(folder.glob("W_enc_*.safetensors")))):
        with open_tensors(folder / f"W_enc_{i}.safetensors") as file:
            W_enc, b_enc, b_dec = (_read(file, f"{name}_{i}") for name in ("W_enc", "b_enc", "b_dec"))
            threshold = file.read(f"threshold_{i}") if f"threshold_{i}" in file.shapes else torch.zeros_like(b_enc)
        with open_tensors(folder / f"W_dec_{i}.safetensors") as file:
            W_dec = _read(file, f"W_dec_{i}")
        by_layer[i] = Transcoder(W_enc.T, b_enc, W_dec.transpose(0, 1), b_dec, threshold)
    return by_layer


def _read(file: TensorFile, name: str) -> Tensor:
    if name not in file.shapes:
        raise ValueError(f"{file.path} lacks {name}: it is not a transcoder of circuit-tracer.")
    return file.read(name)
