"""Transcoders of a model's MLPs, per-layer or cross-layer, as they are used and stored.

    a_l = z H(z − θ_l),   z = x_l W_enc,l + b_enc,l                     x_l: the input of layer l's MLP
    ŷ_j = b_dec,j + Σ_{l ≤ j} a_l W_dec,l→j (+ x_j W_skip,j)            in the place of its output; per-layer: l = j alone

Source: transcoders (Dunefsky et al. 2024, arXiv 2406.11944), cross-layer ones (Lindsey et al. 2024), a skip connection (Paulo et
al. 2025, arXiv 2501.18823). An SAE of an MLP's output is the same with x_l that output itself (``reads="mlp_out"``).

    >>> transcoders = train_transcoders(model, tokens, TranscoderConfig(n_latents=768))      # doctest: +SKIP
    >>> transcoders.save("plt"); Transcoders.load("plt").encode(0, x)                        # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.baselines.transcoders.activations import jump_relu
from tl_vpd.checks import check_finite, choice, device_of, flag, instance, integer, path_of, shown
from tl_vpd.files.atomic import make_folder
from tl_vpd.files.tensor_file import open_tensors, write_tensors

Reads = Literal["mlp_in", "mlp_out"]
FILE = "transcoders.safetensors"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
"""The tensors of a layer; ``W_skip`` may be missing."""


class Transcoder(nn.Module):
    """One layer's encoder, and the decoders of its latents.

    Args:
        W_enc: ``[d_in, n]``.
        b_enc: ``[n]``.
        W_dec: ``[targets, n, d_out]``: to the layer's own MLP, then to each later one's (per-layer: one target).
        b_dec: ``[d_out]``: added to the output of the layer's own MLP.
        threshold: ``[n]``: a latent is active above it (0: a ReLU; NaN: not known, see ``calibrated``).
        W_skip: ``[d_in, d_out]`` (None: no skip connection).

    Raises:
        TypeError: a tensor is something else.
        ValueError: a shape does not fit, or an entry is not finite.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: nn.Parameter
    W_skip: nn.Parameter | None

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        W_skip: Tensor | None = None,
    ) -> None:
        super().__init__()
        values = dict(zip(NAMES, (W_enc, b_enc, W_dec, b_dec, threshold, W_skip), strict=True))
        for name, tensor in values.items():
            if not isinstance(tensor, Tensor) and (name != "W_skip" or tensor is not None):
                raise TypeError(f"{name} is a {type(tensor).__name__}: give a tensor.")
        if W_enc.ndim != 2 or W_dec.ndim != 3:
            raise ValueError(
                f"W_enc is {tuple(W_enc.shape)} and W_dec {tuple(W_dec.shape)}: give [d_in, n] and [targets, n, d_out]."
            )
        (d_in, n), d_out = W_enc.shape, W_dec.shape[-1]
        shapes = {"b_enc": (n,), "b_dec": (d_out,), "threshold": (n,), "W_skip": (d_in, d_out)}
        shapes |= {"W_enc": (d_in, n), "W_dec": (len(W_dec), n, d_out)}
        for name, tensor in values.items():
            if tensor is None:
                self.register_parameter(name, None)
                continue
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} is {tuple(tensor.shape)}: {shapes[name]} fits W_enc and W_dec.")
            check_finite(name, tensor.nan_to_num(0.0) if name == "threshold" else tensor)
            clamped = tensor.clamp(min=0) if name == "threshold" else tensor
            setattr(self, name, nn.Parameter(clamped.detach().clone(), requires_grad=False))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(d_in, latents, d_out)."""
        return self.W_enc.shape[0], self.W_enc.shape[1], self.W_dec.shape[2]

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n"]:
        """``x W_enc + b_enc``."""
        return x @ self.W_enc + self.b_enc


class Transcoders(nn.Module):
    """Transcoders of several layers' MLPs.

    Args:
        by_layer: each layer's.
        cross_layer: whether latents write to later layers too.
        reads: what encoders read: their MLP's input, or (SAEs) its output.
        record: where they come from; ``train_transcoders`` writes ``config``, ``flops``, ``seconds`` and ``tokens``.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there are no layers, or a layer has another number of decoders than it has targets.
    """

    def __init__(
        self,
        by_layer: Mapping[int, Transcoder],
        *,
        cross_layer: bool = False,
        reads: Reads | str = "mlp_in",
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(by_layer, Mapping) or not by_layer:
            raise TypeError(f"by_layer={shown(by_layer)}: give at least one Transcoder by its layer.")
        self.layers = sorted(integer("a key of by_layer", layer, minimum=0) for layer in by_layer)
        self.cross_layer, self.reads = flag("cross_layer", cross_layer), choice("reads", reads, ("mlp_in", "mlp_out"))
        if record is not None and not isinstance(record, Mapping):
            raise TypeError(f"record={shown(record)} is a {type(record).__name__}: give data by name.")
        self.record = dict(record or {})
        self.transcoders = nn.ModuleDict()
        for layer in self.layers:
            one = instance(f"by_layer[{layer}]", by_layer[layer], Transcoder)
            if len(one.W_dec) != len(self.targets(layer)):
                raise ValueError(
                    f"Layer {layer} has {len(one.W_dec)} decoders, and its latents write to "
                    f"{len(self.targets(layer))} layers ({self.targets(layer)}): give one for each."
                )
            self.transcoders[str(layer)] = one

    def __getitem__(self, layer: int) -> Transcoder:
        """One layer's; raises KeyError where it has none."""
        if layer not in self.layers:
            raise KeyError(f"Layer {shown(layer)} has no transcoder: the layers are {self.layers}.")
        return self.transcoders[str(layer)]  # type: ignore[return-value]

    def targets(self, layer: int) -> list[int]:
        """The layers that a layer's latents write to."""
        return [j for j in self.layers if j >= layer] if self.cross_layer else [layer]

    def sources(self, layer: int) -> list[int]:
        """The layers whose latents write to a layer."""
        return [i for i in self.layers if i <= layer] if self.cross_layer else [layer]

    @property
    def n_latents(self) -> dict[int, int]:
        """Latents by layer."""
        return {layer: self[layer].sizes[1] for layer in self.layers}

    @property
    def calibrated(self) -> bool:
        """Whether every threshold is known (those of batch top-k transcoders of others are not: ``calibrate``)."""
        return not any(bool(self[layer].threshold.isnan().any()) for layer in self.layers)

    def encode(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n"]:
        """A layer's latents, by their thresholds.

        Raises:
            KeyError: the layer has no transcoder.
            ValueError: its thresholds are not known.
        """
        one = self[layer]
        if bool(one.threshold.isnan().any()):
            raise ValueError("These batch top-k transcoders came without thresholds: call calibrate(transcoders, ...).")
        return jump_relu(one.pre_acts(x), one.threshold)

    def decode(
        self, layer: int, acts: Mapping[int, Float[Tensor, "*batch _"]], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """The output of a layer's MLP, from the latents of every layer that writes to it.

        Args:
            layer: whose MLP.
            acts: latents by layer.
            x: what the layer's encoder reads, for the skip connection.
        """
        one = self[layer]
        y = one.b_dec if one.W_skip is None else x @ one.W_skip + one.b_dec
        for source in self.sources(layer):
            y = y + acts[source] @ self[source].W_dec[self.targets(source).index(layer)]
        return y

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``transcoders.safetensors``, whole or not at all, with checksums; returns the folder.

        Raises:
            OSError: it cannot be written.
            ValueError: thresholds are not known, or the record is not data.
        """
        folder = path_of("folder", folder)
        if not self.calibrated:
            raise ValueError("The thresholds are not known (NaN): calibrate the transcoders before they are saved.")
        make_folder(folder)
        tensors = {f"{layer}/{name}": t for layer in self.layers for name, t in self[layer].named_parameters()}
        content = {"cross_layer": self.cross_layer, "reads": self.reads, "layers": self.layers, "record": self.record}
        write_tensors(folder / FILE, tensors, {"transcoders": content})
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Transcoders:
        """Reads what ``save`` wrote.

        Args:
            folder: of the file.
            device: where they go.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or something else.
        """
        path, device = path_of("folder", folder) / FILE, device_of(device)
        with open_tensors(path) as file:
            content = file.content.get("transcoders") if isinstance(file.content, dict) else None
            if content is None:
                raise ValueError(f"{path} does not hold transcoders that Transcoders.save wrote.")
            layers = {
                layer: Transcoder(**{n: file.read(f"{layer}/{n}") for n in NAMES if f"{layer}/{n}" in file.shapes})
                for layer in content.pop("layers")
            }
        return cls(layers, **content).to(device)
