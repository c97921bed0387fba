"""The target's tokenizer: the file beside the target, or the one of its name that this machine already has."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tl_vpd.formats.param_decomp.files import TOKENIZER, first_of

END = "<|endoftext|>"


def tokenizer_of(folder: Path, name: str | None) -> Any | None:
    """The tokenizer (None: the run has none, or it is not on this machine, which a warning says).

    Args:
        folder: that may hold ``tokenizer.json``.
        name: on the Hugging Face Hub; only its local cache is read.

    Raises:
        ValueError: the file is damaged.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = first_of(folder, [TOKENIZER])
    if path is not None:
        try:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer that can be read ({str(error).splitlines()[0]}).") from error
        if END in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"eos_token": END, "bos_token": END})
        return tokenizer
    if name is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        warnings.warn(
            f"The tokenizer {name} is not on this machine: the model takes tokens, not text, unless {TOKENIZER} is in {folder}.",
            stacklevel=2,
        )
        return None
