"""The target of a run: its sizes, from its config and its tensors, and its tensors under TransformerLens's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from tl_vpd.adapters.arcee import ArceeShape
from tl_vpd.checks import check_finite, shown
from tl_vpd.formats.param_decomp.checkpoint import read_target, same
from tl_vpd.formats.param_decomp.config import TARGET_CLASS
from tl_vpd.formats.param_decomp.files import MODEL_CONFIG, checkpoint_in, first_of, read_yaml
from tl_vpd.formats.param_decomp.names import target_keys

PAPERS = {
    "t-9d2b8f02": {
        "n_layer": 4,
        "n_embd": 768,
        "n_head": 6,
        "n_key_value_heads": 6,
        "n_intermediate": 3072,
        "vocab_size": 50_277,
        "n_ctx": 512,
        "block_size": 512,
    }
}
"""Sizes of the paper's target, whose config a downloaded decomposition does not have."""

_FIXED = {
    "model_type": TARGET_CLASS,
    "mlp_bias": False,
    "attn_bias": False,
    "rotary_adjacent_pairs": False,
    "use_grouped_query_attention": True,
}
"""What the architecture leaves open and no released run uses otherwise."""


SIZES = ("n_layer", "n_embd", "n_head", "n_intermediate", "vocab_size", "n_ctx")
MOST, MOST_LAYERS = 1 << 28, 10_000
"""Beyond this, a size is a mistake, and looking for the weights would take forever."""


def target_folder(run: Path, reference: str | None) -> Path | None:
    """The folder with the target's config: the run's, ``target`` or the target's id in it or beside it (None: nowhere).

    Args:
        run: the run's folder.
        reference: what the run's config says of the target: ``wandb:…/t-9d2b8f02``, or a path.
    """
    names = ["target"]
    if reference:
        parts = [part for part in PurePosixPath(reference.removeprefix("wandb:")).parts if part not in ("/", "..", ".")]
        names += (
            [parts[-1]] if reference.startswith("wandb:") else ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
        )
    candidates = [run, *(place / name for place in (run, run.resolve().parent) for name in names)]
    return next((folder for folder in candidates if (folder / MODEL_CONFIG).is_file()), None)


def target_config(folder: Path | None, reference: str | None) -> tuple[dict[str, Any], str]:
    """The target's config, and where it is from.

    Raises:
        ValueError: there is none, and the target is not the paper's.
    """
    if folder is not None:
        path = first_of(folder, [MODEL_CONFIG])
        assert path is not None, "the caller looked"
        return read_yaml(path), str(path)
    known = PAPERS.get((reference or "").rstrip("/").rsplit("/", 1)[-1])
    if known is None:
        where = f" ({reference})" if reference else ""
        raise ValueError(
            f"The number of heads of the target{where} is nowhere in this run: put the target's {MODEL_CONFIG} into its folder, "
            "or pass target=FOLDER."
        )
    return dict(known), f"the paper's target {reference}"


def shape_of(config: Mapping[str, Any], source: str) -> ArceeShape:
    """The sizes of a target from its config.

    Args:
        config: of the target.
        source: of the config, for messages.

    Raises:
        ValueError: it is another architecture, or a size is missing or impossible; the message names it.
    """
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{source}: {name} is {config[name]!r}, and {value!r} is the one that is read.")
    sizes = {name: _size(config.get(name), name, source) for name in SIZES}
    kv_heads, block_size = (
        _size(sizes[default] if config.get(name) is None else config[name], name, source)
        for name, default in (("n_key_value_heads", "n_head"), ("block_size", "n_ctx"))
    )
    base = config.get("rotary_base", 10_000)
    if not isinstance(base, int | float) or isinstance(base, bool) or not 1 <= base < MOST or base != int(base):
        raise ValueError(
            f"{source}: rotary_base is {shown(base)}, and TransformerLens takes a whole number of at least 1."
        )
    try:
        eps = float(config.get("rms_norm_eps", 1e-6))  # YAML reads 1e-6, without a dot, as text
    except (TypeError, ValueError):
        eps = -1.0
    if not 0 <= eps <= 1:
        raise ValueError(
            f"{source}: rms_norm_eps is {shown(config['rms_norm_eps'])}, and a number from 0 to 1 is needed."
        )
    if sizes["n_embd"] % sizes["n_head"] or sizes["n_head"] % kv_heads:
        raise ValueError(
            f"{source}: n_embd={sizes['n_embd']}, n_head={sizes['n_head']} and n_key_value_heads={kv_heads} do not divide."
        )
    d_head, rotary_dim = sizes["n_embd"] // sizes["n_head"], config.get("rotary_dim")
    if rotary_dim not in (None, d_head):
        raise ValueError(f"{source}: rotary_dim is {shown(rotary_dim)}, and only the whole head, {d_head}, is read.")
    return ArceeShape(
        n_layers=sizes["n_layer"],
        d_model=sizes["n_embd"],
        n_heads=sizes["n_head"],
        n_kv_heads=kv_heads,
        d_mlp=sizes["n_intermediate"],
        d_vocab=sizes["vocab_size"],
        n_ctx=min(sizes["n_ctx"], block_size),
        eps=eps,
        rotary_base=float(base),
    )


def _size(size: Any, name: str, source: str) -> int:
    most = MOST_LAYERS if name == "n_layer" else MOST
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
        raise ValueError(f"{source}: {name} is {shown(size)}, and a number from 1 to {most} is needed.")
    return size


def target_weights(
    stored: Mapping[str, Tensor], shape: ArceeShape, source: str, *, complete: bool = True
) -> dict[str, Tensor]:
    """The target's tensors under TransformerLens's names, ``[d_in, d_out]``.

    Args:
        stored: by the authors' key, ``[out, in]``.
        shape: of the target.
        source: of the tensors, for messages.
        complete: whether every weight must be there.

    Raises:
        ValueError: a key is unknown or missing, a shape is not the config's, or the two copies of the embedding differ.
    """
    keys, shapes, weights = target_keys(shape.n_layers), shape.weights(), {}
    for key in stored.keys() - keys.keys() - {"lm_head.weight"}:
        raise ValueError(f"{source} has {key!r}, which a {TARGET_CLASS} of {shape.n_layers} layers does not have.")
    missing = sorted((keys.keys() | {"lm_head.weight"}) - stored.keys())
    if missing and complete:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of the target, {missing[0]!r} first: it is incomplete."
        )
    embeddings = [stored[key] for key in ("lm_head.weight", "wte.weight") if key in stored]
    if len(embeddings) == 2 and not same(*embeddings):
        raise ValueError(f"{source}: lm_head and wte differ, and they are one matrix in a {TARGET_CLASS}.")
    for key, tensor in stored.items():
        if key == "lm_head.weight":
            continue
        name = keys[key]
        linear = tensor.ndim == 2 and name != "embed.W_E"
        weights[name] = tensor.T if linear else tensor
        if tuple(weights[name].shape) != shapes[name]:
            wanted = tuple(reversed(shapes[name])) if linear else shapes[name]
            raise ValueError(f"{source}: {key} is {tuple(tensor.shape)}, and the target's config says {wanted}.")
        check_finite(f"{source}: {key}", tensor)
    return weights


def target_from_folder(folder: Path, shape: ArceeShape) -> dict[str, Tensor]:
    """The target's tensors from its checkpoint.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is damaged or of another model.
    """
    path = checkpoint_in(folder, where=(".", "checkpoints"))
    return target_weights(read_target(path), shape, str(path))
