"""A model whose MLPs are replaced by transcoders in a forward pass.

    >>> with ReplacedModel(model) as replaced:                                   # doctest: +SKIP
    ...     clean = replaced.clean(tokens)
    ...     replaced.error_propagating(transcoders, tokens)                      # every encoder reads the replaced stream
    ...     outputs = clean_outputs(transcoders, clean)                          # every encoder reads the target's stream
    ...     replaced.with_outputs(tokens, outputs), replaced.with_outputs(tokens, {0: outputs[0]})

An MLP's input is that of its ``W_in``, its output that of its ``W_out``: after the norm, before a norm that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.adapters.changes import Change, Later, enter
from tl_vpd.baselines.transcoders.transcoders import Transcoders
from tl_vpd.checks import integer, sequence
from tl_vpd.forward.attachments import attached_to
from tl_vpd.forward.site_taps import SitePass, SiteTaps

Encode = Callable[[int, Tensor], Tensor]
"""(layer, what its encoder reads) -> latents."""
Replace = Callable[[int, Tensor, Tensor], Tensor | None]
"""(layer, input, output of its MLP) -> another output (None: the model's stays)."""


@dataclass(frozen=True)
class Clean:
    """A pass of the target: its output, and every MLP's input and output by layer."""

    output: Float[Tensor, "batch ..."]
    inputs: dict[int, Float[Tensor, "batch pos d_in"]]
    outputs: dict[int, Float[Tensor, "batch pos d_out"]]


class ReplacedModel:
    """A context manager: inside, the model is tapped, frozen and without users' hooks.

    Args:
        model: the target.
        layers: whose MLPs may be replaced (None: all).

    Raises:
        TypeError: no adapter knows the model's class.
        ValueError: a layer has no MLP that can be replaced.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        self.model, self.adapter = model, adapt(model)
        if layers is not None:
            layers = [integer(f"layers[{i}]", layer, minimum=0) for i, layer in enumerate(sequence("layers", layers))]
        found: dict[int, dict[str, str]] = {}
        for name, site in self.adapter.sites.items():
            if site.layer is not None and site.short in ("in", "out"):
                found.setdefault(site.layer, {})[site.short] = name
        mlps = {layer: (names["in"], names["out"]) for layer, names in sorted(found.items()) if len(names) == 2}
        missing = [layer for layer in (mlps if layers is None else layers) if layer not in mlps]
        if layers is not None and (not layers or len(set(layers)) < len(layers)):
            raise ValueError(f"layers={layers}: give each layer once, and at least one.")
        if missing or not mlps:
            which = f"no MLP in layer {missing[0]} of layers={layers}" if missing else "no MLP"
            raise ValueError(
                f"This {type(model).__name__} has {which} that a transcoder can replace: the layers are {list(mlps)}."
            )
        self.mlps = {layer: mlps[layer] for layer in sorted(mlps if layers is None else layers)}
        self.taps = SiteTaps(self.adapter, [name for names in self.mlps.values() for name in names])
        self._change = Change(self._put_on)

    def __enter__(self) -> ReplacedModel:
        self._change.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._change.undo()

    def _put_on(self, undo: Later) -> None:
        enter(undo, self.taps.on())

    def sizes(self) -> dict[int, tuple[int, int]]:
        """(d_in, d_out) of every MLP by layer."""
        sites = self.adapter.sites
        return {layer: (sites[one].d_in, sites[two].d_out) for layer, (one, two) in self.mlps.items()}

    def check(self, transcoders: Transcoders) -> None:
        """Raises ValueError unless transcoders fit the model's MLPs, dtype and device."""
        if transcoders.record.get("input_hook") == "ln2.hook_normalized" and not self.adapter.processing().get(
            "fold_ln"
        ):
            raise ValueError(
                "These transcoders read ln2.hook_normalized, which is the MLP's input where the norm is folded into it alone: "
                "load the model with fold_ln=True."
            )
        W = transcoders[transcoders.layers[0]].W_enc
        if (W.dtype, W.device) != (self.adapter.dtype, self.adapter.device):
            raise ValueError(
                f"The transcoders are in {W.dtype} on {W.device}, the model in {self.adapter.dtype} on {self.adapter.device}: "
                "use transcoders.to(...)."
            )
        for layer in transcoders.layers:
            d_in, _, d_out = transcoders[layer].sizes
            wanted = self.sizes().get(layer)
            wanted = (wanted[1], wanted[1]) if wanted is not None and transcoders.reads == "mlp_out" else wanted
            if wanted != (d_in, d_out):
                fits = "has no MLP" if wanted is None else f"is {wanted[0]} -> {wanted[1]}"
                raise ValueError(
                    f"The transcoder of layer {layer} is {d_in} -> {d_out}, and this model's layer {fits}: they are of "
                    "another model."
                )

    def run(
        self, tokens: Shaped[Tensor, "batch ..."], replace: Replace, token_mask: Bool[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch ..."]:
        """The model's output with MLPs replaced.

        Args:
            tokens: ``[batch, pos]``.
            replace: gives an MLP's output.
            token_mask: False at padding (None: no padding).
        """
        inputs: dict[int, Tensor] = {}
        at = {name: (layer, i) for layer, names in self.mlps.items() for i, name in enumerate(names)}

        def function(name: str, x: Tensor, y: Tensor) -> Tensor | None:
            layer, last = at[name]
            if not last:
                inputs[layer] = x
                return None
            return replace(layer, inputs[layer], y)

        run = SitePass(function)
        attached = attached_to(self.model)
        with nullcontext() if attached is None else attached.paused(), self.taps.during(run):
            output = self.adapter.run(tokens, token_mask)
        self.taps.check_each_once(run)
        return output

    @torch.no_grad()
    def clean(self, tokens: Shaped[Tensor, "batch ..."], token_mask: Bool[Tensor, "batch pos"] | None = None) -> Clean:
        """A pass of the target."""
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}

        def note(layer: int, x: Tensor, y: Tensor) -> None:
            inputs[layer], outputs[layer] = x, y

        return Clean(self.run(tokens, note, token_mask), inputs, outputs)

    def error_propagating(
        self,
        transcoders: Transcoders,
        tokens: Shaped[Tensor, "batch ..."],
        token_mask: Bool[Tensor, "batch pos"] | None = None,
        *,
        encode: Encode | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """The output with every MLP replaced, each encoder reading the residual stream as the ones before it left it.

        Args:
            transcoders: of the MLPs.
            tokens: ``[batch, pos]``.
            token_mask: False at padding (None: no padding).
            encode: gives latents (None: ``transcoders.encode``).

        Raises:
            ValueError: the transcoders do not fit the model.
        """
        self.check(transcoders)
        acts: dict[int, Tensor] = {}

        def replace(layer: int, x: Tensor, y: Tensor) -> Tensor | None:
            if layer not in transcoders.layers:
                return None
            x = y if transcoders.reads == "mlp_out" else x
            acts[layer] = (encode or transcoders.encode)(layer, x)
            return transcoders.decode(layer, acts, x).view_as(y)

        return self.run(tokens, replace, token_mask)

    def with_outputs(
        self,
        tokens: Shaped[Tensor, "batch ..."],
        outputs: Mapping[int, Float[Tensor, "batch pos d_out"]],
        token_mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """The output with these MLP outputs in the place of the model's; the other layers stay."""
        return self.run(tokens, lambda layer, x, y: outputs.get(layer), token_mask)


def read_by(transcoders: Transcoders, clean: Clean) -> dict[int, Float[Tensor, "batch pos d_in"]]:
    """What encoders read in the target's own pass."""
    every = clean.outputs if transcoders.reads == "mlp_out" else clean.inputs
    return {layer: every[layer] for layer in transcoders.layers}


def clean_outputs(
    transcoders: Transcoders, clean: Clean, *, encode: Encode | None = None
) -> dict[int, Float[Tensor, "batch pos d_out"]]:
    """Every MLP's output by the transcoders, each encoder reading the target's own residual stream.

    Args:
        transcoders: of the MLPs.
        clean: a pass of the target.
        encode: gives latents (None: ``transcoders.encode``).
    """
    inputs = read_by(transcoders, clean)
    acts = {layer: (encode or transcoders.encode)(layer, x) for layer, x in inputs.items()}
    return {layer: transcoders.decode(layer, acts, x) for layer, x in inputs.items()}
