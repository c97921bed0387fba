"""Checks of tokens and attention masks as users pass them: one form for the rest of the package, or one sentence.

>>> integers([[3, 1, 4]]).dtype
torch.int64
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


def is_text(prompts: Any) -> bool:
    """Whether prompts are a string or strings; raises TypeError where only some are, ValueError where there are none."""
    if not isinstance(prompts, list | tuple):
        return isinstance(prompts, str)
    if not prompts:
        raise ValueError("There are no prompts: the list is empty.")
    strings = sum(isinstance(prompt, str) for prompt in prompts)
    if 0 < strings < len(prompts):
        raise TypeError(f"Of {len(prompts)} prompts {strings} are strings: give strings only, or tokens only.")
    return strings > 0


def integers(tokens: Any) -> Int[Tensor, "..."]:
    """Tokens (a tensor, an array, or lists) of any integer type and layout as int64; raises TypeError or ValueError otherwise."""
    if isinstance(tokens, list | tuple):
        if any(isinstance(row, Tensor) and (row.is_meta or row.layout != torch.strided) for row in tokens):
            raise ValueError("A row of the tokens is a meta or sparse tensor: give rows of numbers.")
        tokens = [row.tolist() if isinstance(row, Tensor | np.ndarray) else row for row in tokens]
        lengths = {len(row) if isinstance(row, list | tuple) else 0 for row in tokens}
        if len(lengths) > 1:
            raise ValueError(
                f"The rows of tokens have {', '.join(map(str, sorted(lengths)))} entries: pad them to one length and give an "
                "attention_mask, or call once per row."
            )
    elif not isinstance(tokens, Tensor | np.ndarray):
        raise TypeError(
            f"Prompts are a {type(tokens).__name__}: give a string, a list of strings, or tokens (a tensor, an array or lists "
            "of integers)."
        )
    try:
        array = tokens if isinstance(tokens, Tensor) else np.array(tokens)
    except ValueError as error:  # deeper lists of several lengths
        raise ValueError("The tokens are lists of several lengths: give integers [batch, pos].") from error
    kind = str(array.dtype).removeprefix("torch.")
    if not kind.startswith(("int", "uint")):
        raise ValueError(f"Tokens are {kind} of shape {tuple(array.shape)}; integers [batch, pos] are needed.")
    if not isinstance(array, Tensor):
        return torch.from_numpy(array.astype(np.int64))
    if array.is_meta or array.layout != torch.strided:
        raise ValueError("Tokens are a tensor without data or a sparse one: give a dense tensor of integers.")
    return array.long().contiguous()


def check_tokens(tokens: Int[Tensor, "..."], *, d_vocab: int, n_ctx: int) -> None:
    """Raises ValueError unless tokens are a non-empty ``[batch, pos]`` of at most ``n_ctx`` positions, all in the vocabulary."""
    if tokens.ndim != 2:
        raise ValueError(f"Tokens are of shape {tuple(tokens.shape)}; integers [batch, pos] are needed.")
    if tokens.numel() == 0:
        raise ValueError(f"There are no tokens: the shape is {tuple(tokens.shape)}.")
    if tokens.shape[1] > n_ctx:
        raise ValueError(
            f"Sequences of {tokens.shape[1]} tokens are longer than the model's context of {n_ctx}; cut them."
        )
    low, high = torch.stack(tokens.aminmax()).tolist()
    if low < 0 or high >= d_vocab:
        raise ValueError(
            f"Tokens run from {low} to {high}, outside the vocabulary 0..{d_vocab - 1}: give tokens of this model's tokenizer."
        )


def checked_attention_mask(
    attention_mask: Any, shape: Sequence[int], *, prefix: bool = False
) -> Bool[Tensor, "batch _"]:
    """An attention mask of all rows: True at real tokens. Raises TypeError or ValueError where it does not fit the tokens.

    Args:
        attention_mask: 1 (or True) at real tokens and 0 at padding, as a tensor, an array or lists; one row counts for all.
        shape: of the tokens, (batch, pos).
        prefix: whether the mask may go on to the left, over what stands in a KV cache.
    """
    try:
        mask = attention_mask if isinstance(attention_mask, Tensor) else torch.as_tensor(np.asarray(attention_mask))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"attention_mask is a {type(attention_mask).__name__} that is not [batch, pos]: give a tensor of 0 and 1."
        ) from error
    batch, pos = shape
    if (
        mask.ndim != 2
        or mask.shape[0] not in (1, batch)
        or not (mask.shape[1] == pos or (prefix and mask.shape[1] > pos))
    ):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)} and the tokens are {(batch, pos)}: give one entry per token, 0 at padding."
        )
    check_entries(mask)
    mask = mask.bool()
    check_rows("attention_mask has", mask.any(-1))
    return mask.expand(batch, -1)


def check_entries(attention_mask: Tensor) -> None:
    """Raises ValueError if an attention mask has other entries than 0 and 1."""
    if attention_mask.is_meta or attention_mask.layout != torch.strided:
        raise ValueError("attention_mask is a tensor without data or a sparse one: give a dense tensor of 0 and 1.")
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError(
            "attention_mask has other entries than 0 and 1: give 1 (or True) at real tokens and 0 at padding; an additive mask "
            "(0 and large negative numbers) is `mask == 0` in this form."
        )


def check_rows(what: str, real: Bool[Tensor, " batch"]) -> None:
    """Raises ValueError if a row has no real token."""
    if not bool(real.all()):
        rows = (~real).nonzero().flatten().tolist()
        more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
        raise ValueError(f"{what} no real token in rows {rows[:10]}{more}: leave out rows that are padding only.")
