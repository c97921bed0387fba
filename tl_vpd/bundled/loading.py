"""The model and decomposition that ship: a two-layer GPT-NeoX of the standard library's source, decomposed.

    >>> model = bundled.model()                      # doctest: +SKIP
    >>> vpd = bundled.decomposition()                # doctest: +SKIP
    >>> tokens = bundled.tokens("validation")        # doctest: +SKIP

The model is a HookedTransformer where the installed TransformerLens has one, else a TransformerBridge; the decomposition fits
both. The weights are stored in the layout of transformers and loaded without any processing (no folded norms, no centring).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from safetensors.numpy import load_file
from torch import Tensor

from tl_vpd.adapters.loading import Kind, converted_neox_weights, default_kind, load_model
from tl_vpd.adapters.quiet import quiet_transformers
from tl_vpd.adapters.versions import HookedTransformer, HookedTransformerConfig
from tl_vpd.checks import choice, device_of, path_of, shown
from tl_vpd.decomposition import Decomposition

if TYPE_CHECKING:
    from tl_vpd.evaluation import Evaluation

MODEL = Path(__file__).parent / "model"
DECOMPOSITION = Path(__file__).parent / "decomposition"


def model(*, kind: Kind | None = None, device: str | torch.device = "cpu", folder: Path = MODEL) -> Any:
    """The bundled model: 2 layers, d_model 96, 4 heads, d_mlp 384, vocabulary 768, context 128.

    Args:
        kind: ``hooked_transformer`` or ``bridge`` (None: HookedTransformer where the installed TransformerLens has it).
        device: where the model goes.
        folder: of the weights, tokenizer and config.

    Raises:
        ImportError: the installed TransformerLens has no such class.
        TypeError: an argument is of another type.
        ValueError: there is no such kind or device.
        FileNotFoundError: the folder has no model.
        OSError: its config or weights cannot be read.
    """
    if kind is not None:
        choice("kind", kind, get_args(Kind))
    device, folder = device_of(device), _with_file(folder, "config.json")
    try:
        if (kind or default_kind()) == "hooked_transformer":
            return hooked_transformer(folder, device=device)
        with quiet_transformers():
            bridge: Any = load_model(str(folder), kind="bridge", device=device)
    except OSError as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise OSError(f"folder={shown(str(folder))} cannot be read as a model: {text}.") from error
    bridge.cfg.default_prepend_bos = True  # as the model was trained, and as the HookedTransformer reads strings
    return bridge


def decomposition(*, device: str | torch.device = "cpu") -> Decomposition:
    """The finished decomposition of the bundled model."""
    return Decomposition.load(DECOMPOSITION, device=device)


def tokens(part: Literal["validation", "training"], folder: Path = MODEL) -> Int[Tensor, "window pos"]:
    """Token windows of the standard library's source, each opened by BOS: 256 of validation or 2,000 of training files."""
    if not isinstance(part, str) or part not in ("validation", "training"):
        raise KeyError(f"part={shown(part)}: the bundled tokens are 'validation' and 'training'.")
    return torch.from_numpy(
        load_file(_with_file(folder, "tokens.safetensors") / "tokens.safetensors")[part].astype(np.int64)
    )


def training_record(folder: Path = MODEL) -> dict[str, Any]:
    """How the model was trained, with its validation ``curve`` of (step, cross-entropy in nats)."""
    return json.loads((_with_file(folder, "training.json") / "training.json").read_text(encoding="utf-8"))


def _with_file(folder: Any, name: str) -> Path:
    """The folder of a model; raises FileNotFoundError if it has no such file, TypeError or ValueError if it is not a path."""
    path = path_of("folder", folder)
    if not (path / name).is_file():
        raise FileNotFoundError(f"folder={shown(str(path))} has no {name}: give the folder of a bundled model.")
    return path


def hooked_transformer(folder: Path, *, device: str | torch.device = "cpu") -> Any:
    """A GPT-NeoX folder of transformers as an unprocessed HookedTransformer.

    Raises:
        ImportError: the installed TransformerLens has none.
    """
    if HookedTransformer is None:
        raise ImportError("This TransformerLens has no HookedTransformer: use kind='bridge', or install 3.x.")
    from transformers import AutoTokenizer, GPTNeoXForCausalLM

    with quiet_transformers():
        source = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = source.config
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=config.hidden_size // config.num_attention_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        act_fn="gelu",
        eps=config.layer_norm_eps,
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=config.hidden_size // config.num_attention_heads,
        rotary_adjacent_pairs=False,
        original_architecture="GPTNeoXForCausalLM",
        default_prepend_bos=True,
        device=str(device),
        seed=None,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, add_bos_token=True)
    hooked = HookedTransformer(cfg, tokenizer=tokenizer, move_to_device=False)
    with torch.no_grad():
        state = {k: v.clone() for k, v in converted_neox_weights(source, cfg).items()}
    hooked.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return hooked.to(device, print_details=False)


def evaluation() -> Evaluation:
    """The evaluation on validation tokens that ships with the bundled decomposition: masks, counts, attacks and controls, and
    some of the tables (``record["tables"]``)."""
    from tl_vpd.evaluation import Evaluation

    return Evaluation.load(DECOMPOSITION / "metrics.json")
