"""``save_param_decomp``: a decomposition and its model in the authors' newer torch format.

    folder/
      experiment_config.yaml     modules and their C, Γ, where the target is
      model_<step>.pth           target_model.*, _components.*.{V,U}, ci_fn.*
      target/                    model_config.yaml, checkpoints/model_step_0.pt, tokenizer.json

What is written is read back, and compared, before the folder takes its name: tensors to the bit, the target by its output.
Settings of training that the authors' config has are written where the decomposition was imported with them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.adapters.arcee import ArceeShape, arcee_of
from tl_vpd.adapters.versions import is_bridge
from tl_vpd.checks import path_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.files.atomic import make_folder, new_folder, write_file, write_text
from tl_vpd.formats.param_decomp.files import CONFIGS, MODEL_CONFIG, TOKENIZER
from tl_vpd.formats.param_decomp.gamma import their_gamma
from tl_vpd.formats.param_decomp.load import RunFiles, model_and_decomposition
from tl_vpd.formats.param_decomp.names import COMPONENTS, TARGET, module_of, target_keys
from tl_vpd.forward import MaskedModel

MODEL_CLASS = "param_decomp_lab.experiments.lm.pretrain.models.llama_simple_mlp.LlamaSimpleMLP"
TARGET_CHECKPOINT = "target/checkpoints/model_step_0.pt"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest relative difference of logits, by the model's dtype (others: 0.05)."""


def save_param_decomp(decomposition: Decomposition, model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Writes a decomposition of a LlamaSimpleMLP for the authors' torch code, and for ``load_param_decomp``.

    Args:
        decomposition: with a shared transformer or small MLPs per subcomponent as Γ.
        model: its target, unprocessed: a HookedTransformer or TransformerBridge that ``load_param_decomp`` could have made.
        folder: does not exist, or is empty.

    Returns:
        The folder.

    Raises:
        FileExistsError: there is something in the folder.
        ValueError: the model is of another architecture or not the target, or the format has no such Γ.
        OSError: the folder cannot be written; it is not there then.
    """
    place = path_of("folder", folder)
    for site in decomposition.sites:
        if module_of(site) is None:
            raise ValueError(
                f"{site} is not a weight of a LlamaSimpleMLP: only decompositions of such models can be written."
            )
    with new_folder(place) as written:
        with MaskedModel(decomposition, model) as masked_model:  # refuses another model
            shape, weights = arcee_of(model)
            tokens = _some_tokens(shape, masked_model.adapter.device)
            logits, _ = masked_model.clean(tokens)
        _write(written, decomposition, model, shape, weights, their_gamma(decomposition))
        _check(written, decomposition, model, tokens, logits)
    return place


def _write(
    folder: Path,
    decomposition: Decomposition,
    model: Any,
    shape: ArceeShape,
    weights: Mapping[str, Tensor],
    gamma: Mapping[str, Tensor],
) -> None:
    source = decomposition.record.get("source") or {}
    make_folder(folder / TARGET_CHECKPOINT.rpartition("/")[0])
    target = {}
    for key, name in target_keys(shape.n_layers).items():
        linear = weights[name].ndim == 2 and name != "embed.W_E"
        target[key] = _stored(weights[name].T if linear else weights[name])
    target["lm_head.weight"] = target["wte.weight"]
    state = {f"{TARGET}{key}": tensor for key, tensor in target.items()}
    for site in sorted(decomposition.sites, key=lambda site: module_of(site) or ""):
        prefix = f"{COMPONENTS}{(module_of(site) or '').replace('.', '-')}."
        state |= {f"{prefix}V": _stored(decomposition.V[site]), f"{prefix}U": _stored(decomposition.U[site])}
    state |= {key: _stored(tensor) for key, tensor in gamma.items()}
    _save(folder / f"model_{source.get('step') or 0}.pth", state)
    _save(folder / TARGET_CHECKPOINT, target)
    backend = getattr(getattr(model, "tokenizer", None), "backend_tokenizer", None)
    if backend is not None:
        write_text(folder / "target" / TOKENIZER, backend.to_str())
    settings = source.get("settings") or {}
    write_text(
        folder / CONFIGS[0], _yaml(_experiment_config(decomposition, shape, settings if "pd" in settings else {}))
    )
    write_text(folder / "target" / MODEL_CONFIG, _yaml(_model_config(shape)))


def _experiment_config(decomposition: Decomposition, shape: ArceeShape, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The run's config: that of the run it came from, with what is written put in its place."""
    config, gamma = deepcopy(dict(settings)), decomposition.gamma_config
    ci: dict[str, Any] = {"mode": "layerwise", "fn_type": "mlp", "hidden_dims": [gamma.hidden]}
    if gamma.kind == "shared_transformer":
        size = {
            "d_model": gamma.d_ci,
            "n_blocks": gamma.n_blocks,
            "mlp_hidden_dim": [gamma.d_mlp or 4 * (gamma.d_ci or 0)],
            "attn_config": {"n_heads": gamma.n_heads, "max_len": shape.n_ctx, "rope_base": 10_000.0},
        }
        ci = {
            "mode": "global",
            "fn_type": "global_shared_transformer",
            "hidden_dims": None,
            "simple_transformer_ci_cfg": size,
        }
    config["pd"] = {
        **config.get("pd", {}),
        "decomposition_targets": [
            {"module_pattern": module_of(site), "C": C} for site, C in decomposition.counts.items()
        ],
        "identity_decomposition_targets": None,
        "ci_config": ci,
        "sigmoid_type": "leaky_hard",
        "sampling": "continuous",
        "tied_weights": None,
        "use_delta_component": True,
    }
    config["target"] = {
        "output_extract": 0,
        "spec": {"kind": "pretrained", "model_class": MODEL_CLASS, "run_path": TARGET_CHECKPOINT},
    }
    return config


def _model_config(shape: ArceeShape) -> dict[str, Any]:
    return {
        "model_type": "LlamaSimpleMLP",
        "n_layer": shape.n_layers,
        "n_embd": shape.d_model,
        "n_head": shape.n_heads,
        "n_key_value_heads": shape.n_kv_heads,
        "n_intermediate": shape.d_mlp,
        "vocab_size": shape.d_vocab,
        "n_ctx": shape.n_ctx,
        "block_size": shape.n_ctx,
        "rms_norm_eps": shape.eps,
        "rotary_base": int(shape.rotary_base) if shape.rotary_base.is_integer() else shape.rotary_base,
        "rotary_dim": shape.d_head,
        "rotary_adjacent_pairs": False,
        "use_grouped_query_attention": True,
        "flash_attention": False,
        "attn_bias": False,
        "mlp_bias": False,
    }


def _check(folder: Path, decomposition: Decomposition, model: Any, tokens: Tensor, logits: Tensor) -> None:
    """Raises ValueError unless what was written is the decomposition, and its target gives the model's output."""
    adapter, kind = adapt(model), "bridge" if is_bridge(model) else "hooked_transformer"
    files = RunFiles.of(folder, None)
    copy, read = model_and_decomposition(files, kind, device=adapter.device, dtype=adapter.dtype)  # type: ignore[arg-type]
    tensors = read.file_tensors()
    for key, tensor in decomposition.file_tensors().items():
        assert torch.equal(tensors[key].cpu(), tensor.to("cpu", adapter.dtype)), f"{key} was read back otherwise"
    with torch.no_grad():
        difference = float((copy(tokens) - logits).abs().max() / logits.abs().max())
    if not difference <= TOLERANCE.get(adapter.dtype, 0.05):
        raise ValueError(
            f"The model is not a LlamaSimpleMLP: one of its weights gives logits that differ by {difference:.1%} of the model's "
            "largest, so it cannot be written in this format."
        )


def _some_tokens(shape: ArceeShape, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, shape.d_vocab, (2, min(shape.n_ctx, 32)), generator=generator).to(device)


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_file(path, lambda p: torch.save(dict(tensors), p))


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=True)
