"""Which tokens: the bundled ones, a file of arrays, or text files cut into windows."""

from __future__ import annotations

from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Integer
from pydantic import Field
from torch import Tensor

from tl_vpd import bundled
from tl_vpd.checks import choice
from tl_vpd.files.tensor_file import open_tensors
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
        """Rows of tokens for a model; a ``.npy`` file stays on the disk, and each step reads its rows. ``default_key`` counts
        where there is no ``key``. Raises FileNotFoundError or, where a file does not hold rows of integers, ValueError.
        """
        length = self.context or model.cfg.n_ctx
        if self.tokens == "bundled":
            part = choice("data.key", self.key or default_key, ("training", "validation"))
            return bundled.tokens(part)[:, :length]  # type: ignore[arg-type]
        paths = [Path(p) for p in sorted(glob(self.tokens, recursive=True)) if not Path(p).is_dir()]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path} is a device, a socket or a pipe: give an ordinary file.")
        if not paths:
            raise FileNotFoundError(f"No file matches data.tokens = {self.tokens!r}.")
        suffix = paths[0].suffix
        if self.key is not None and suffix != ".safetensors":
            raise ValueError(f"data.key is {self.key!r}, and {paths[0]} has no tensors by name: leave it out.")
        if suffix not in (".npy", ".safetensors"):
            return text_windows(model, [read_utf8(p) for p in paths], length)
        if len(paths) > 1:
            raise ValueError(f"data.tokens = {self.tokens!r} matches {len(paths)} files of arrays: give one.")
        rows = stored_rows(paths[0], self.key or default_key)[:, :length]
        return rows if isinstance(rows, np.memmap) else torch.from_numpy(rows.astype(np.int64))

    def length(self, model: Any) -> int:
        """Tokens in a row, as ``load`` would give it; text is not read for it."""
        if self.tokens == "bundled" or Path(self.tokens).suffix in (".npy", ".safetensors"):
            return int(self.load(model).shape[1])
        return self.context or int(model.cfg.n_ctx)

    def first(self, model: Any, n: int, *, default_key: str = "training") -> Int[Tensor, "_ pos"]:
        """The first ``n`` rows, in memory."""
        rows = self.load(model, default_key=default_key)[:n]
        return rows if isinstance(rows, Tensor) else torch.from_numpy(rows.astype(np.int64))


def stored_rows(path: Path, key: str) -> Integer[np.ndarray, "n pos"]:
    """Rows of tokens from a ``.npy`` file, which stays on the disk, or from one tensor of a ``.safetensors`` file; raises
    FileNotFoundError where there is no such file, ValueError where it does not hold rows of integers.
    """
    if path.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"{path} is not a .npy or .safetensors file: save the tokens as one of these.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not an ordinary file: give a file of tokens.")
    rows = _read_npy(path) if path.suffix == ".npy" else _read_safetensors(path, key)
    if rows.ndim != 2 or rows.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {rows.dtype} of shape {rows.shape}; integers [n, pos] are needed.")
    return rows


def first_stored_rows(path: Path, key: str, n: int) -> Int[Tensor, "_ pos"]:
    """The first ``n`` of ``stored_rows``, in memory."""
    return torch.from_numpy(stored_rows(path, key)[:n].astype(np.int64))


def _read_npy(path: Path) -> np.ndarray:
    try:
        rows = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged, or not a .npy file of numbers.") from error
    if not isinstance(rows, np.ndarray):
        raise ValueError(f"{path} is an archive of several arrays: save one with numpy.save.")
    return rows


def _read_safetensors(path: Path, key: str) -> np.ndarray:
    with open_tensors(path) as file:
        if key not in file.shapes:
            raise ValueError(f"{path} has no tensor {key!r}, it has {', '.join(file.shapes)}: set data.key.")
        dtype = str(file.dtypes[key]).removeprefix("torch.")
        if not dtype.lower().startswith(("int", "uint", "u")):
            raise ValueError(f"{path} holds {dtype} of shape {file.shapes[key]}; integers [n, pos] are needed.")
        return file.read(key).numpy()


def read_utf8(path: Path) -> str:
    """A text file, without a byte order mark; raises ValueError where it is in another encoding."""
    data = path.read_bytes()
    remedy = "save it as UTF-8"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16 text: {remedy}.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): {remedy}.") from error
    if "\0" in text:
        raise ValueError(f"{path} has zero bytes, so it is UTF-16 or not text at all: {remedy}.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_windows(model: Any, texts: list[str], length: int) -> Int[Tensor, "n pos"]:
    """Texts tokenised and cut into windows of ``length``, each opened by BOS; the rest at the end of each text is dropped."""
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
