"""Models of TransformerLens, of either class, from a folder of ``arcee.write_arcee``.

>>> model = load_arcee(folder, kind="bridge")                               # doctest: +SKIP
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from tl_vpd.adapters.arcee import CONFIG, TOKENIZER, WEIGHTS, hugging_face_name, rotary_base_of, shape_of_config
from tl_vpd.adapters.lookup import adapt
from tl_vpd.adapters.quiet import quiet_transformers
from tl_vpd.adapters.versions import HookedTransformer, HookedTransformerConfig, transformer_bridge
from tl_vpd.files.json_files import read_json

Kind = Literal["hooked_transformer", "bridge"]
_SHARED = ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "eps")
"""What HookedTransformerConfig calls as ``ArceeShape`` does."""


def load_arcee(
    folder: Path, *, kind: Kind, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A folder of ``write_arcee`` as a model of TransformerLens; without a tokenizer in it, the model has none."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        if kind == "bridge":
            return _bridge(folder, device, dtype)
        return _hooked_transformer(folder, device, dtype)


def _bridge(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Any:
    with tempfile.TemporaryDirectory() as beside:
        place, with_tokenizer = folder, (folder / TOKENIZER).is_file()
        if not with_tokenizer:  # TransformerBridge does not boot without one
            place = Path(beside)
            for name in (CONFIG, WEIGHTS):
                (place / name).symlink_to((folder / name).resolve())
            _numbers_as_words(int(read_json(folder / CONFIG)["vocab_size"])).save_pretrained(place)
        bridge: Any = transformer_bridge().boot_transformers(str(place), device=str(device), dtype=dtype)
    bridge.cfg.default_prepend_bos = False
    bridge.cfg.rotary_base = int(rotary_base_of(bridge))  # which TransformerBridge leaves at its default
    if not with_tokenizer:
        bridge.tokenizer = None
    return bridge


def _hooked_transformer(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Any:
    if HookedTransformer is None:
        raise ImportError(
            "This TransformerLens has no HookedTransformer: use model_class='TransformerBridge', or install 3.x."
        )
    from transformers import AutoTokenizer

    shape = shape_of_config(read_json(folder / CONFIG))
    cfg = HookedTransformerConfig(
        **{name: getattr(shape, name) for name in _SHARED},
        n_key_value_heads=None if shape.n_kv_heads == shape.n_heads else shape.n_kv_heads,
        act_fn="gelu_new",
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=shape.d_head,
        rotary_base=int(shape.rotary_base),
        default_prepend_bos=False,
        init_weights=False,
        seed=None,
        dtype=dtype,
        device=str(device),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / TOKENIZER).is_file() else None
    model = HookedTransformer(cfg, tokenizer=tokenizer, move_to_device=False).to(device, print_details=False)
    stored, adapter = load_file(folder / WEIGHTS), adapt(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2].lstrip("_").startswith("b_"):
                parameter.zero_()
        model.unembed.W_U.copy_(stored[hugging_face_name("embed.W_E")].T)
        for name in shape.weights():
            tensor = stored.pop(hugging_face_name(name))
            if name in adapter.sites:
                adapter.set_weight(name, tensor.T)
            else:
                model.get_parameter(name).copy_(tensor)
    return model


def _numbers_as_words(n: int) -> Any:
    """A tokenizer whose words are the numbers of its tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(n)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0")
