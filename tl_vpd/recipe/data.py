"""Which tokens: the bundled ones, a file of arrays, or text files cut into windows."""

from __future__ import annotations

from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Integer
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from tl_vpd import bundled
from tl_vpd.frozen import Frozen


class DataRecipe(Frozen):
    """Which tokens."""

    tokens: str = "bundled"
    """``bundled``, a ``.npy`` or ``.safetensors`` file, or a pattern of text files."""
    key: str | None = None
    """Which tensor of a ``.safetensors`` file, or which part of the bundled windows (None: ``training``, or ``validation`` where
    a decomposition is evaluated)."""
    context: int | None = Field(None, ge=2)
    """Length of the windows that text is cut into, and to which longer rows are cut (None: the model's context)."""

    def load(self, model: Any, *, default_key: str = "training") -> Int[Tensor, "n pos"] | Integer[np.ndarray, "n pos"]:
        """Rows of tokens for a model; a ``.npy`` file stays on the disk, and each step reads its rows.

        Args:
            model: whose tokenizer and context are used.
            default_key: where ``key`` is None.

        Raises:
            FileNotFoundError: no file matches.
            ValueError: the file does not hold rows of integers, or ``key`` does not fit.
        """
        length = self.context or model.cfg.n_ctx
        if self.tokens == "bundled":
            return bundled.tokens(_bundled_part(self.key or default_key))[:, :length]  # type: ignore[arg-type]
        paths = [Path(p) for p in sorted(glob(self.tokens, recursive=True))]
        if not paths:
            raise FileNotFoundError(f"No file matches data.tokens = {self.tokens!r}.")
        suffix = paths[0].suffix
        if self.key is not None and suffix != ".safetensors":
            raise ValueError(f"data.key is {self.key!r}, and {paths[0]} has no tensors by name: leave it out.")
        if suffix not in (".npy", ".safetensors"):
            return text_windows(model, [_read_text(p) for p in paths], length)
        if len(paths) > 1:
            raise ValueError(f"data.tokens = {self.tokens!r} matches {len(paths)} files of arrays: give one.")
        rows = _read_npy(paths[0]) if suffix == ".npy" else _read_safetensors(paths[0], self.key or default_key)
        if rows.ndim != 2 or rows.dtype.kind not in "iu":
            raise ValueError(f"{paths[0]} holds {rows.dtype} of shape {rows.shape}; integers [n, pos] are needed.")
        rows = rows[:, :length]
        return rows if isinstance(rows, np.memmap) else torch.from_numpy(rows.astype(np.int64))

    def first(self, model: Any, n: int, *, default_key: str = "training") -> Int[Tensor, "_ pos"]:
        """The first ``n`` rows, in memory."""
        rows = self.load(model, default_key=default_key)[:n]
        return rows if isinstance(rows, Tensor) else torch.from_numpy(rows.astype(np.int64))


def _bundled_part(key: str) -> str:
    if key not in ("training", "validation"):
        raise ValueError(f"data.key is {key!r}; the bundled tokens have 'training' and 'validation'.")
    return key


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or not a .npy file of numbers.") from error


def _read_safetensors(path: Path, key: str) -> np.ndarray:
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
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def text_windows(model: Any, texts: list[str], length: int) -> Int[Tensor, "n pos"]:
    """Texts tokenised and cut into windows of ``length``, each opened by BOS; the rest at the end of each text is dropped.

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
