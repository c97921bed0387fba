"""Models of every family and class, built offline, every parameter random (biases and norms too).

A *source* is a plain module, transformers' or TransformerLens's native one, with the same weights however often it is built. A
HookedTransformer and a bridge are made from one; HookedTransformers of families that have none are filled on their own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.matrix.families import (
    D_HEAD,
    D_MLP,
    D_MODEL,
    D_VOCAB,
    FAMILIES,
    N_CTX,
    N_HEADS,
    N_LAYERS,
    Family,
    Location,
    locations,
    native_where,
)  # fmt: skip
from tl_vpd.adapters.versions import HookedTransformer, HookedTransformerConfig

Kind = Literal["HookedTransformer", "bridge", "compatible", "native"]
KINDS: tuple[Kind, ...] = ("HookedTransformer", "bridge", "compatible", "native")
PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
UNPROCESSED = dict.fromkeys(PROCESSING, False)

_SIZES: dict[str, Any] = dict(
    n_layers=N_LAYERS, d_model=D_MODEL, n_heads=N_HEADS, d_head=D_HEAD, d_mlp=D_MLP, d_vocab=D_VOCAB, n_ctx=N_CTX
)


class Absent(Exception):
    """This class has no model of this family, or no such flag; the message says why."""


def has_bridge() -> bool:
    """Whether the installed TransformerLens has TransformerBridge."""
    try:
        import transformer_lens.model_bridge  # noqa: F401
    except ImportError:
        return False
    return True


def kinds_here() -> list[Kind]:
    """The model classes of the installed TransformerLens."""
    hooked = HookedTransformer is not None
    return [kind for kind in KINDS if (hooked if kind == "HookedTransformer" else has_bridge())]


def randomise(model: nn.Module, *, around: float = 1.0, seed: int = 0) -> None:
    """Draws every parameter; norms' weights lie around 1 (or ``around``) on a grid that every precision holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            drawn = 0.3 * torch.randn(p.shape, generator=generator)
            if _is_norm(name) and name.rpartition(".")[2] in ("weight", "w"):
                drawn = around + (drawn.clamp(-0.75, 0.75) * 32).round() / 32
            p.copy_(drawn)


def _is_norm(name: str) -> bool:
    owner = name.rpartition(".")[0].rpartition(".")[2]
    return "norm" in owner or owner.startswith("ln") or name.endswith((".ln.w", ".ln.weight"))


def plain(family: Family, kind: Kind, dtype: torch.dtype) -> nn.Module:
    """The family's source: transformers' model, or the native one for ``native``."""
    model = _native(family, dtype) if kind == "native" else _from_transformers(family)
    randomise(model, around=0.0 if family.name == "Gemma-2" else 1.0)
    return model.to(dtype).eval()


def _from_transformers(family: Family) -> nn.Module:
    import transformers

    if family.config is None:
        raise Absent("transformers has no such model")
    name, settings = family.config
    config = getattr(transformers, name)(**settings)
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def native_config(family: Family, dtype: torch.dtype) -> Any:
    """The family's TransformerBridgeConfig."""
    from transformer_lens.config import TransformerBridgeConfig

    if family.native is None:
        raise Absent("boot_native builds no such model")
    return TransformerBridgeConfig(**{**_SIZES, **family.native, "dtype": dtype})


def _native(family: Family, dtype: torch.dtype) -> nn.Module:
    from transformer_lens.model_bridge.sources.native import NativeModel

    return NativeModel(native_config(family, dtype))


def where(family: Family, kind: Kind) -> dict[str, Location]:
    """Where every site's weight is in the family's source."""
    paths = native_where(family) if kind == "native" else family.where
    return locations(paths, kv_heads=family.kv_heads, fused=family.fused)


def build(
    name: str,
    kind: Kind,
    dtype: torch.dtype = torch.float64,
    *,
    processing: Mapping[str, bool] | None = None,
    source: nn.Module | None = None,
) -> Any:
    """A model of a family and class.

    Args:
        name: of the family.
        kind: of model.
        dtype: of its weights.
        processing: which of ``PROCESSING`` are on (None: none; for ``compatible`` what it does by itself, which is all).
        source: the plain module to make it from (None: a fresh one). A bridge rewires it.

    Raises:
        Absent: there is no such model.
    """
    family = FAMILIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            if kind == "HookedTransformer":
                return hooked_transformer(family, dtype, processing, source)
            return bridge(family, kind, dtype, processing, source)
        finally:
            logging.disable(logging.NOTSET)


def hooked_transformer(
    family: Family, dtype: torch.dtype, processing: Mapping[str, bool] | None, source: nn.Module | None
) -> Any:
    """A HookedTransformer with the source's weights, processed."""
    settings = {**_SIZES, **family.hooked, "dtype": dtype, "device": "cpu"}
    on = {**UNPROCESSED, **(processing or {})}
    if settings.get("output_logits_soft_cap"):
        on["center_unembed"] = False  # as ``from_pretrained`` does: a shift is no symmetry of capped logits
    if on["fold_ln"] and settings["normalization_type"] is not None:
        settings["normalization_type"] += "Pre"
    model = HookedTransformer(HookedTransformerConfig(**settings))
    if family.convert is None:
        raw = HookedTransformer(HookedTransformerConfig(**{**settings, **family.hooked}))
        randomise(raw)
        state = raw.state_dict()
    else:
        from transformer_lens.pretrained import weight_conversions

        convert = getattr(weight_conversions, family.convert)
        state = convert(source if source is not None else plain(family, "HookedTransformer", dtype), model.cfg)
        state = {k: v.detach().clone() for k, v in state.items() if isinstance(v, Tensor)}
    model.load_and_process_state_dict(state, **on)
    return model.to(dtype)


def bridge(
    family: Family, kind: Kind, dtype: torch.dtype, processing: Mapping[str, bool] | None, source: nn.Module | None
) -> Any:
    """A TransformerBridge around the source, processed."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    source = plain(family, kind, dtype) if source is None else source
    if kind == "native":
        state = source.state_dict()
        model = TransformerBridge.boot_native(native_config(family, dtype), dtype=dtype)
        with torch.no_grad():
            for name, p in model.original_model.named_parameters():
                p.copy_(state.get(name.replace("._original_component", "").replace(".original_component", ""), 0.0 * p))
        model.eval()
    else:
        config = source.config
        model = build_bridge_from_module(source, type(source).__name__, hf_config=config, tokenizer=None)
    if kind == "compatible":
        model.enable_compatibility_mode(
            disable_warnings=True, **({} if processing is None else {**UNPROCESSED, **processing})
        )
    elif processing is not None and any(processing.values()):
        model.process_weights(**{**UNPROCESSED, **processing})
    model.original_model.to(dtype)  # some versions make the biases of processed weights in float32
    return model


def tokenizer(folder: Path) -> Any:
    """A tokenizer of the models' vocabulary, through a folder: HookedTransformer's KV cache wants one for its attention mask.

    Padding is not token 0, which TransformerLens 2.x puts in the place of every token while it generates.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "<bos>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, D_VOCAB)}}
    inner = Tokenizer(WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="w3",
        padding_side="left",
    )
    made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tokens(shape: tuple[int, int] = (2, 7), seed: int = 0) -> Tensor:
    """Random tokens, none of them a padding, beginning or end token."""
    return torch.randint(3, D_VOCAB, shape, generator=torch.Generator().manual_seed(seed))
