"""One architecture, as sizes and weights: pre-norm, RMSNorm with scale, rotary positions over whole heads, an MLP of tanh-GELU
without a gate, no biases, one matrix for embedding and unembedding. Hugging Face calls it Arcee, and can store it.

Weights have TransformerLens's names and orientation, heads flattened: the sites', ``embed.W_E`` ``[vocab, d_model]``, and the
norms' ``blocks.{i}.ln1.w``, ``blocks.{i}.ln2.w``, ``ln_final.w``.

    >>> write_arcee(shape, weights, folder, tokenizer)                          # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from tl_vpd.adapters.lookup import adapt
from tl_vpd.adapters.versions import is_hooked_transformer
from tl_vpd.files.atomic import write_file
from tl_vpd.files.json_files import read_json, write_json

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
_LINEAR = {
    "attn.W_Q": "self_attn.q_proj",
    "attn.W_K": "self_attn.k_proj",
    "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj",
    "mlp.W_in": "mlp.up_proj",
    "mlp.W_out": "mlp.down_proj",
}
_NORMS = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
_SIZES = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_mlp": "intermediate_size",
    "d_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "eps": "rms_norm_eps",
    "rotary_base": "rope_theta",
}
"""The fields of a shape by their keys in the config."""


@dataclass(frozen=True)
class ArceeShape:
    """The sizes of a model of this architecture; ``n_ctx`` is its longest prompt."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    eps: float
    rotary_base: float

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Every weight's name and shape."""
        d, kv = self.d_model, self.n_kv_heads * self.d_head
        sizes = {"W_Q": (d, d), "W_K": (d, kv), "W_V": (d, kv), "W_O": (d, d)}
        sizes |= {"W_in": (d, self.d_mlp), "W_out": (self.d_mlp, d)}
        shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (self.d_vocab, d)}
        for i in range(self.n_layers):
            shapes |= {f"blocks.{i}.{norm}.w": (d,) for norm in _NORMS}
            shapes |= {f"blocks.{i}.{name}": sizes[name.split(".")[1]] for name in _LINEAR}
        return {**shapes, "ln_final.w": (d,)}


def write_arcee(shape: ArceeShape, weights: Mapping[str, Tensor], folder: Path, tokenizer: Any | None) -> None:
    """Writes the folder that transformers (and TransformerBridge) loads: config, weights, and the tokenizer if there is one."""
    config = {
        "architectures": ["ArceeForCausalLM"],
        "model_type": "arcee",
        "hidden_act": "gelu_new",
        **{key: getattr(shape, field) for field, key in _SIZES.items()},
        "head_dim": shape.d_head,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),
        "eos_token_id": getattr(tokenizer, "eos_token_id", None),
        "pad_token_id": None,
    }
    write_json(folder / CONFIG, config)
    tensors = {}
    for name in shape.weights():
        W = weights[name]
        tensors[hugging_face_name(name)] = (W.T if _is_linear(name) else W).contiguous()
    write_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def is_arcee(folder: Path) -> bool:
    """Whether a folder is one of ``write_arcee``: transformers' Arcee with tanh-GELU."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind == "arcee" and config.get("hidden_act") == "gelu_new" and (folder / WEIGHTS).is_file()


def arcee_of(model: Any) -> tuple[ArceeShape, dict[str, Float[Tensor, "..."]]]:
    """The sizes and weights of a model as if it were of this architecture: whether it is, its output must show. Raises ValueError
    where a weight is missing or has another shape.
    """
    adapter, cfg, hooked = adapt(model), model.cfg, is_hooked_transformer(model)
    shape = ArceeShape(
        **{field: getattr(cfg, field) for field in ("n_layers", "d_model", "n_heads", "d_vocab", "n_ctx", "eps")},
        n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_mlp=cfg.d_mlp or 0,
        rotary_base=float(getattr(cfg, "rotary_base", 10_000) if hooked else rotary_base_of(model)),
    )
    weights: dict[str, Tensor] = {}
    for name, size in shape.weights().items():
        if name in adapter.sites:
            tensor: Tensor | None = adapter.weight(name)
        else:
            owner = name.rpartition(".")[0]
            path = name if hooked else f"{owner}.original_component.weight"
            tensor = reduce(lambda module, part: getattr(module, part, None), path.split("."), model)
        if tensor is None or tuple(tensor.shape) != size:
            came = "is missing" if tensor is None else f"is {tuple(tensor.shape)}"
            raise ValueError(
                f"{name} {came}, and a LlamaSimpleMLP has one of {size}: only models of that architecture can be written."
            )
        weights[name] = tensor.detach()
    return shape, weights


def rotary_base_of(bridge: Any) -> float:
    """The base of a bridge's rotary positions, from transformers' config."""
    config = bridge.original_model.config
    base: Any = (getattr(config, "rope_parameters", None) or {}).get("rope_theta") or getattr(
        config, "rope_theta", 10_000
    )
    return float(base)


def shape_of_config(config: Mapping[str, Any]) -> ArceeShape:
    """The sizes that a folder's config says."""
    return ArceeShape(**{field: config[key] for field, key in _SIZES.items()})


def hugging_face_name(name: str) -> str:
    """A weight's key in the folder."""
    if name in ("embed.W_E", "ln_final.w"):
        return {"embed.W_E": "model.embed_tokens.weight", "ln_final.w": "model.norm.weight"}[name]
    _, layer, rest = name.split(".", 2)
    module = _LINEAR[rest] if _is_linear(name) else _NORMS[rest.removesuffix(".w")]
    return f"model.layers.{layer}.{module}.weight"


def _is_linear(name: str) -> bool:
    return name.split(".", 2)[-1] in _LINEAR
