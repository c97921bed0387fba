"""Weights of a model of transformers under TransformerLens's names, read and written; nothing is run.

Each family says where a block's products and norms are. A fused weight holds several sites: all of q, then k, then v
(``blocks``), or q, k and v head by head (``heads``); a fused gate comes before W_in.

    >>> PlainWeights(hugging_face_model).weight("blocks.1.attn.W_Q")          # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_vpd.adapters.linears import is_conv1d, oriented, why_not
from tl_vpd.adapters.taps import Unsupported
from tl_vpd.site import SHORT, nearest


@dataclass(frozen=True)
class Family:
    """Where the weights of an architecture are.

    Attributes:
        block: the path of a block, with ``{i}``.
        products: paths in it by short name; ``qkv`` and ``gate_in`` are fused.
        norms: paths in it of what ``attn`` and ``mlp`` read through.
        fused: the order in ``qkv``.
        offset: what norms add to their weight.
    """

    block: str
    products: Mapping[str, str]
    norms: tuple[str, str]
    fused: Literal["blocks", "heads"] = "blocks"
    offset: float = 0.0


def _attention(path: str, o: str = "o_proj") -> dict[str, str]:
    return {**{s: f"{path}.{s}_proj" for s in ("q", "k", "v")}, "o": f"{path}.{o}"}


_MLP = {"in": "mlp.up_proj", "out": "mlp.down_proj"}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LLAMA = Family("model.layers.{i}", {**_attention("self_attn"), **_MLP, "gate": "mlp.gate_proj"}, _NORMS)
_NEOX = {"in": "mlp.dense_h_to_4h", "out": "mlp.dense_4h_to_h"}
_GPT2 = {"qkv": "attn.c_attn", "o": "attn.c_proj", "in": "mlp.c_fc", "out": "mlp.c_proj"}
_GPTJ = {**_attention("attn", "out_proj"), "in": "mlp.fc_in", "out": "mlp.fc_out"}
_PHI3 = {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate_in": "mlp.gate_up_proj", "out": "mlp.down_proj"}
_OPT = {**_attention("self_attn", "out_proj"), "in": "fc1", "out": "fc2"}
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gemma2": Family(_LLAMA.block, _LLAMA.products, ("input_layernorm", "pre_feedforward_layernorm"), offset=1.0),
    "arcee": Family("model.layers.{i}", {**_attention("self_attn"), **_MLP}, _NORMS),
    "phi3": Family("model.layers.{i}", _PHI3, _NORMS),
    "gpt2": Family("transformer.h.{i}", _GPT2, ("ln_1", "ln_2")),
    "gptj": Family("transformer.h.{i}", _GPTJ, ("ln_1", "ln_1")),
    "opt": Family("model.decoder.layers.{i}", _OPT, ("self_attn_layer_norm", "final_layer_norm")),
    "gpt_neox": Family(
        "gpt_neox.layers.{i}", {"qkv": "attention.query_key_value", "o": "attention.dense", **_NEOX}, _NORMS, "heads"
    ),
    "bloom": Family(
        "transformer.h.{i}",
        {"qkv": "self_attention.query_key_value", "o": "self_attention.dense", **_NEOX},
        _NORMS,
        "heads",
    ),
}
"""By ``config.model_type``."""


@dataclass(frozen=True)
class Place:
    """Where a site is: a module, and the outputs of it that are the site's (None: all)."""

    module: Any
    outputs: Int[Tensor, " d_out"] | None = field(default=None, repr=False)


class PlainWeights:
    """The weights of a model of transformers; raises Unsupported where its family is not known, or a weight is quantised."""

    def __init__(self, model: Any) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in FAMILIES:
            raise Unsupported(
                f"A {type(model).__name__} (model_type={kind!r}) has no weights that are known under TransformerLens's names; "
                f"known are {', '.join(FAMILIES)}."
            )
        self.model, self.family, self.config = model, FAMILIES[kind], model.config
        self.places: dict[str, Place] = {}
        for layer in range(int(self.config.num_hidden_layers)):
            self._find(layer)

    def _find(self, layer: int) -> None:
        block = self.model.get_submodule(self.family.block.format(i=layer))
        weights = {short: weight for weight, short in SHORT.items()}
        for short, path in self.family.products.items():
            module = block.get_submodule(path)
            if (reason := why_not(module)) is not None:
                raise Unsupported(f"{self.family.block.format(i=layer)}.{path}: {reason}.")
            fused = short in ("qkv", "gate_in")
            for s, columns in (self._fused(short, oriented(module).shape[1]) if fused else {short: None}).items():
                owner = "mlp" if s in ("gate", "in", "out") else "attn"
                self.places[f"blocks.{layer}.{owner}.{weights[s]}"] = Place(module, columns)

    def _fused(self, short: str, width: int) -> Mapping[str, Tensor | None]:
        if short == "gate_in":
            return dict(zip(("gate", "in"), torch.arange(width).chunk(2), strict=True))
        heads, kv_heads = self.heads
        d_head = width // (heads + 2 * kv_heads)
        if self.family.fused == "heads":  # (head, q | k | v, d_head)
            by_head = torch.arange(width).view(heads, 3, d_head)
            return {s: by_head[:, at].flatten() for at, s in enumerate("qkv")}
        sizes = [heads * d_head, kv_heads * d_head, kv_heads * d_head]
        return dict(zip("qkv", torch.arange(width).split(sizes), strict=True))

    @property
    def heads(self) -> tuple[int, int]:
        """The numbers of query heads and of key/value heads."""
        heads = int(self.config.num_attention_heads)
        return heads, int(getattr(self.config, "num_key_value_heads", None) or heads)

    def place(self, name: str) -> Place:
        """Where a site is; raises ValueError if the model has no such site, or its weight is used elsewhere too."""
        if name not in self.places:
            raise ValueError(f"This {type(self.model).__name__} has no {name}{nearest(name, self.places)}.")
        weight = self.places[name].module.weight
        users = [path for path, p in self.model.named_parameters(remove_duplicate=False) if p is weight]
        if len(users) > 1:
            raise ValueError(
                f"{name} is {' and '.join(users)}, one tensor: an edit of it would change both; give each its copy."
            )
        return self.places[name]

    def weight(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """A site's weight (detached)."""
        place = self.place(name)
        W = oriented(place.module)
        return W if place.outputs is None else W[:, place.outputs.to(W.device)]

    @torch.no_grad()
    def set_weight(self, name: str, W: Float[Tensor, "d_in d_out"]) -> None:
        """Writes a site's weight, in place."""
        place = self.place(name)
        _write(
            place.module.weight,
            W if is_conv1d(place.module) else W.T,
            place.outputs,
            1 if is_conv1d(place.module) else 0,
        )

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        """A site's bias (None: it has none)."""
        place = self.place(name)
        bias = getattr(place.module, "bias", None)
        if bias is None:
            return None
        return bias.detach() if place.outputs is None else bias.detach()[place.outputs.to(bias.device)]

    @torch.no_grad()
    def set_bias(self, name: str, bias: Float[Tensor, " d_out"]) -> None:
        """Writes a site's bias, in place."""
        place = self.place(name)
        _write(place.module.bias, bias, place.outputs, 0)

    def norm(self, name: str) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_in"] | None]:
        """The scale and the bias of the norm that a reading site (Q, K, V, in, gate) reads through."""
        _, layer, owner, _ = name.split(".")
        block = self.model.get_submodule(self.family.block.format(i=layer))
        module: Any = block.get_submodule(self.family.norms[owner == "mlp"])
        bias = getattr(module, "bias", None)
        return module.weight.detach() + self.family.offset, None if bias is None else bias.detach()


def _write(parameter: nn.Parameter, values: Tensor, outputs: Tensor | None, axis: int) -> None:
    if outputs is None:
        parameter.copy_(values)
    else:
        parameter.index_copy_(axis, outputs.to(parameter.device), values.to(parameter))
