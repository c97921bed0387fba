"""Transcoders and SAEs in the folders of SAELens: ``cfg.json`` and ``sae_weights.safetensors``, one folder per layer.

Read: the architectures ``transcoder``, ``skip_transcoder``, ``jumprelu_transcoder`` and ``jumprelu_skip_transcoder`` of an MLP's
input and output, and SAEs ``standard`` and ``jumprelu`` of ``hook_mlp_out`` (SAELens stores batch top-k as JumpReLU). Written:
JumpReLU, which is what per-layer transcoders and SAEs are once trained. SAELens has no cross-layer transcoders.

    >>> save_saelens(plt, "plt-saelens")                                                 # doctest: +SKIP
    >>> load_saelens(["plt-saelens/blocks.0", "plt-saelens/blocks.1"])                   # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_vpd.baselines.transcoders import Transcoder, Transcoders
from tl_vpd.checks import instance, path_of, sequence, shown
from tl_vpd.files.atomic import make_folder
from tl_vpd.files.json_files import read_json, write_json
from tl_vpd.files.tensor_file import open_tensors, write_tensors
from tl_vpd.formats.transcoders.hooks import check_input, check_output, layer_of

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.0.0"
"""Of SAELens, whose layout of ``cfg.json`` is written: without it, SAELens takes the file for one of version 5."""
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
SAES = ("standard", "jumprelu")


def save_saelens(transcoders: Transcoders, folder: str | os.PathLike[str]) -> Path:
    """Writes ``blocks.{i}`` for each layer, as ``SAE.load_from_disk`` reads it; returns the folder.

    Args:
        transcoders: per-layer ones, or SAEs.
        folder: made if needed.

    Raises:
        OSError: it cannot be written.
        ValueError: they are cross-layer, or not calibrated; an SAE has a skip connection.
    """
    instance("transcoders", transcoders, Transcoders)
    folder, sae = path_of("folder", folder), transcoders.reads == "mlp_out"
    if transcoders.cross_layer and len(transcoders.layers) > 1:
        raise ValueError(
            "SAELens has no cross-layer transcoders: write per-layer ones, or save_circuit_tracer_transcoders(...)."
        )
    if not transcoders.calibrated:
        raise ValueError("The thresholds are not known (NaN): calibrate the transcoders before they are written.")
    for layer in transcoders.layers:
        one = transcoders[layer]
        if sae and one.W_skip is not None:
            raise ValueError(f"Layer {layer} is an SAE with a skip connection, which SAELens does not have.")
        d_in, n, d_out = one.sizes
        architecture = "jumprelu" if sae else f"jumprelu_{'' if one.W_skip is None else 'skip_'}transcoder"
        tensors: dict[str, Tensor] = {name: getattr(one, name) for name in ("W_enc", "b_enc", "b_dec", "threshold")}
        tensors["W_dec"] = one.W_dec[0]
        if one.W_skip is not None:
            tensors["W_skip"] = one.W_skip.T
        config: dict[str, Any] = {
            "architecture": architecture,
            "d_in": d_in,
            "d_sae": n,
            "dtype": str(one.W_enc.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "hook_name": f"blocks.{layer}.{'hook_mlp_out' if sae else 'mlp.hook_in'}",
                "sae_lens_version": VERSION,
            },
        }
        if not sae:
            config |= {"d_out": d_out}
            config["metadata"]["hook_name_out"] = f"blocks.{layer}.mlp.hook_out"
        make_folder(folder / f"blocks.{layer}")
        write_tensors(folder / f"blocks.{layer}" / WEIGHTS, tensors, {"layer": layer})
        write_json(folder / f"blocks.{layer}" / CONFIG, config)
    return folder


def load_saelens(folders: Sequence[str | os.PathLike[str]]) -> Transcoders:
    """Reads folders of SAELens, one per layer; the layers come from the names of their hooks.

    Args:
        folders: of ``cfg.json`` and ``sae_weights.safetensors``.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: the folders are not in a list.
        ValueError: an architecture, setting or hook is another one, or a file is damaged.
    """
    by_layer: dict[int, Transcoder] = {}
    reads: set[str] = set()
    record: dict[str, str] = {}
    for i, entry in enumerate(sequence("folders", folders)):
        folder = path_of(f"folders[{i}]", entry)
        config = read_json(folder / CONFIG)
        if not isinstance(config, dict):
            raise ValueError(f"{folder / CONFIG} is not a config of SAELens.")
        layer, noted = _layer(config, str(folder / CONFIG))
        if layer in by_layer:
            raise ValueError(f"{folder} is of layer {layer}, as another folder is: give one for each layer.")
        by_layer[layer] = _transcoder(folder, config)
        reads.add("mlp_out" if config["architecture"] in SAES else "mlp_in")
        record |= noted
    if len(reads) != 1:
        raise ValueError(f"{len(by_layer)} folders hold {len(reads)} kinds: give transcoders alone, or SAEs alone.")
    return Transcoders(by_layer, reads=reads.pop(), record=record)


def _layer(config: dict[str, Any], what: str) -> tuple[int, dict[str, str]]:
    """The layer of a config, and what its encoder reads, after a look at its settings."""
    architecture = config.get("architecture")
    if architecture not in (*TRANSCODERS, *SAES):
        known = ", ".join((*TRANSCODERS, *SAES))
        raise ValueError(f"{what}: the architecture {shown(architecture)} is not read; known are {known}.")
    for setting in ("normalize_activations", "reshape_activations"):
        if config.get(setting, "none") != "none":
            raise ValueError(f"{what}: {setting}={shown(config[setting])} is not read: fold it into the weights first.")
    metadata = config.get("metadata") or {}
    layer, hook = layer_of(metadata.get("hook_name", config.get("hook_name")), what)
    if architecture in SAES:
        check_output(hook, what)
        return layer, {}
    if (out := metadata.get("hook_name_out", config.get("hook_name_out"))) is not None:
        target, written = layer_of(out, what)
        check_output(written, what)
        if target != layer:
            raise ValueError(f"{what} reads layer {layer} and writes to layer {target}: only one layer is replaced.")
    return layer, check_input(hook, what)


def _transcoder(folder: Path, config: dict[str, Any]) -> Transcoder:
    """The tensors of a folder as a transcoder; ``b_dec`` that is taken off an SAE's input is folded into ``b_enc``."""
    with open_tensors(folder / WEIGHTS) as file:
        missing = sorted({"W_enc", "b_enc", "W_dec", "b_dec"} - file.shapes.keys())
        if missing:
            raise ValueError(f"{file.path} lacks {', '.join(missing)}.")
        tensors = {name: file.read(name) for name in file.shapes}
    b_enc, W_enc = tensors["b_enc"], tensors["W_enc"]
    if config["architecture"] in SAES and config.get("apply_b_dec_to_input", True):
        b_enc = b_enc - tensors["b_dec"] @ W_enc
    jumps = config["architecture"].startswith("jumprelu")
    if jumps and "threshold" not in tensors:
        raise ValueError(f"{folder / WEIGHTS} is JumpReLU's and lacks its threshold.")
    threshold = tensors["threshold"] if jumps else b_enc.new_zeros(b_enc.shape)
    skip = tensors["W_skip"].T if "skip" in config["architecture"] else None
    return Transcoder(W_enc, b_enc, tensors["W_dec"][None], tensors["b_dec"], threshold, skip)
