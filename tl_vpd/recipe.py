"""Files that describe a run: which model, which tokens, and the three configs of ``tl_vpd.decompose``.

    model: {name: bundled}                 # or a name that TransformerLens knows, with kind and options
    data: {tokens: bundled}                # or a .npy / .safetensors of tokens [n, pos], or text files
    vpd: {steps: 2000, C: 128}             # tl_vpd.VPDConfig: what is learned
    execution: {micro_batch: 4}            # tl_vpd.ExecutionConfig: how it runs
    saving: {folder: runs/first}           # tl_vpd.SavingConfig: what is written

Unknown keys are refused. Under ``torchrun`` every process reads the same recipe.
"""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Int, Integer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from tl_vpd.adapters.loading import Kind, load_model
from tl_vpd.training import ExecutionConfig, SavingConfig, VPDConfig


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRecipe(_Frozen):
    """Which model."""

    name: str = "bundled"
    """``bundled``, or a name or local folder that TransformerLens knows."""
    kind: Kind | None = None
    """``hooked_transformer`` or ``bridge`` (None: HookedTransformer where the installed TransformerLens has it)."""
    options: dict[str, Any] = {}
    """Keyword arguments of ``HookedTransformer.from_pretrained`` (``fold_ln``, ``center_unembed``, ...) or, for a bridge, of
    ``boot_transformers``; ``compatibility_mode: true`` processes a bridge's weights."""
    device: str = "cpu"
    """Under ``torchrun``, ``cuda`` is each process's own device."""

    def load(self) -> Any:
        """The model on its device."""
        if self.name == "bundled":
            from tl_vpd import bundled

            if self.options:
                raise ValueError(f"model.options ({', '.join(self.options)}): the bundled model takes none.")
            return bundled.model(kind=self.kind, device=usable_device(self.device))
        return load_model(self.name, kind=self.kind, device=usable_device(self.device), **self.options)


class DataRecipe(_Frozen):
    """Which tokens."""

    tokens: str = "bundled"
    """``bundled``, a ``.npy`` or ``.safetensors`` file, or a pattern of text files."""
    key: str = "training"
    """Which tensor of a ``.safetensors`` file, and which part of the bundled windows."""
    context: int | None = Field(None, ge=2)
    """Length of the windows that text is cut into, and to which longer rows are cut (None: the model's context)."""

    def load(self, model: Any) -> Int[Tensor, "n pos"] | Integer[np.ndarray, "n pos"]:
        """Rows of tokens for a model; a ``.npy`` file stays on the disk and is read row by row when rows are asked for.

        Raises:
            FileNotFoundError: nothing is there. ValueError: the file does not hold rows of integers.
        """
        length = self.context or model.cfg.n_ctx
        if self.tokens == "bundled":
            from tl_vpd import bundled

            if self.key not in ("training", "validation"):
                raise ValueError(f"data.key is {self.key!r}; the bundled tokens have 'training' and 'validation'.")
            return bundled.tokens(self.key)[:, :length]  # type: ignore[arg-type]
        paths = [Path(p) for p in sorted(glob(self.tokens, recursive=True))]
        if not paths:
            raise FileNotFoundError(f"No file matches data.tokens = {self.tokens!r}.")
        if paths[0].suffix in (".npy", ".safetensors"):
            if len(paths) > 1:
                raise ValueError(f"data.tokens = {self.tokens!r} matches {len(paths)} files of arrays: give one.")
            rows = _read_array(paths[0], self.key)
            if rows.ndim != 2 or rows.dtype.kind not in "iu":
                raise ValueError(f"{paths[0]} holds {rows.dtype} of shape {rows.shape}; integers [n, pos] are needed.")
            return (
                rows[:, :length] if isinstance(rows, np.memmap) else torch.from_numpy(rows[:, :length].astype(np.int64))
            )
        return text_windows(model, [_read_text(p) for p in paths], length)

    def first(self, model: Any, n: int) -> Int[Tensor, "_ pos"]:
        """The first ``n`` rows, in memory."""
        rows = self.load(model)[:n]
        return rows if isinstance(rows, Tensor) else torch.from_numpy(rows.astype(np.int64))


class Recipe(_Frozen):
    """A whole run."""

    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    vpd: VPDConfig = VPDConfig()
    execution: ExecutionConfig = ExecutionConfig()
    saving: SavingConfig = SavingConfig()

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Reads a YAML file.

        Raises:
            FileNotFoundError: there is none. ValueError: it is not a recipe; the message names each wrong key.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: give a YAML file with model, data, vpd, execution and saving."
            )
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"{path} holds a {type(content).__name__}; keys model, data, vpd, execution and saving are needed."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{path}: {_sentence(error)}") from error

    def changed(self, section: str, **given: Any) -> Recipe:
        """The recipe with other values in a section; those that are None stay as they are.

        Raises:
            ValueError: a value is not allowed.
        """
        own = getattr(self, section)
        values = {**own.model_dump(), **{name: value for name, value in given.items() if value is not None}}
        try:
            return self.model_copy(update={section: type(own)(**values)})
        except ValidationError as error:
            raise ValueError(f"{section}.{_sentence(error)}") from error


def _sentence(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def usable_device(device: str) -> str:
    """A device's name, ``cuda`` as that of this process.

    Raises:
        ValueError: PyTorch knows no such device, or has none here.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}: give cpu, cuda, cuda:0, ...") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and PyTorch sees no GPU here: use cpu.")
    return own_device(device)


def own_device(device: str) -> str:
    """``cuda`` as the device of this process, where ``torchrun`` started several."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def _read_array(path: Path, key: str) -> np.ndarray:
    if path.suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged, or no .npy file of numbers.") from error
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if key not in tensors:
        raise ValueError(f"{path} has no tensor {key!r}; it has {', '.join(tensors)}. Set data.key.")
    return tensors[key]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}).") from error


def text_windows(model: Any, texts: list[str], length: int) -> Int[Tensor, "n pos"]:
    """Texts tokenised and cut into windows of ``length``, each opened by BOS; what is left over at each end is dropped.

    Raises:
        ValueError: the model has no tokenizer, or no text is as long as a window.
    """
    if model.tokenizer is None:
        raise ValueError("This model has no tokenizer: pass tokens instead of text.")
    rows = []
    for text in texts:
        ids = model.to_tokens(text, prepend_bos=False, truncate=False)[0].cpu()
        n = len(ids) // (length - 1)
        body = ids[: n * (length - 1)].view(n, length - 1)
        rows.append(torch.cat([body.new_full((n, 1), model.tokenizer.bos_token_id), body], dim=1))
    windows = torch.cat(rows) if rows else torch.empty(0, length, dtype=torch.long)
    if not len(windows):
        raise ValueError(f"No text is as long as one window of {length} tokens; give longer text or a smaller context.")
    return windows
