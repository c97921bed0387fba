"""Prompts of a model: text and tokens, and which tokens are padding.

Padding is what an attention mask says it is. Without one, pad tokens count as TransformerLens counts them (leading ones where the
tokenizer pads on the left, trailing ones where it pads on the right), with two exceptions, since for GPT-2 and its kin the pad
token is BOS and EOS as well: where all rows have the same length, as a single row has, a pad token at the end is a token like any
other; and no row is padding only.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tl_vpd.adapters.versions import get_attention_mask


class Prompts:
    """What an ``Adapter`` knows of a model's prompts."""

    model: Any

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def tokens(self, prompts: Any) -> Tensor:
        """Prompts (a string, strings or tokens) as tokens ``[batch, pos]`` on the model's device.

        Raises:
            TypeError: neither text nor a tensor.
            ValueError: no prompts, too long, not integers, or a token outside the vocabulary.
        """
        if isinstance(prompts, list | tuple) and not prompts:
            raise ValueError("There are no prompts: the list is empty.")
        if isinstance(prompts, str) or (isinstance(prompts, list) and isinstance(prompts[0], str)):
            tokens = self.model.to_tokens(prompts, truncate=False)
        elif isinstance(prompts, Tensor):
            tokens = prompts
        else:
            raise TypeError(
                f"Prompts are a {type(prompts).__name__}; pass a string, a list of strings or a tensor of tokens."
            )
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        check_tokens(tokens, d_vocab=self.model.cfg.d_vocab, n_ctx=self.model.cfg.n_ctx)
        return savable(tokens).to(self.device)

    def token(self, text: str) -> int:
        """The number of the token that a text is.

        Raises:
            ValueError: the model has no tokenizer, or the text is several tokens.
        """
        if getattr(self.model, "tokenizer", None) is None:
            raise ValueError(f"This model has no tokenizer to read {text!r} with: give tokens as numbers.")
        numbers = self.model.to_tokens(text, prepend_bos=False)[0].tolist()
        if len(numbers) != 1:
            raise ValueError(f"{text!r} is {len(numbers)} tokens to this model; one is needed: mind the leading space.")
        return int(numbers[0])

    def words(self, tokens: Int[Tensor, " pos"]) -> list[str]:
        """Tokens as text (as their numbers, where there is no tokenizer)."""
        if getattr(self.model, "tokenizer", None) is None:
            return [str(token) for token in tokens.tolist()]
        return [self.model.tokenizer.decode([token]) for token in tokens.tolist()]

    def padding(
        self, tokens: Int[Tensor, "batch pos"] | None, attention_mask: Tensor | None
    ) -> Bool[Tensor, "batch pos"] | None:
        """True at real tokens, False at padding; None if nothing is padding.

        Args:
            tokens: None where a pass starts from embeddings.
            attention_mask: 0 at padding; of a longer prefix, the last columns count (None: the tokens tell).

        Raises:
            ValueError: the attention mask does not fit the tokens, or a row has no real token.
        """
        if attention_mask is None:
            token_mask = None if tokens is None else self._padding_of_tokens(tokens)
        else:
            columns = slice(None) if tokens is None else slice(-tokens.shape[1], None)
            if tokens is not None:
                attention_mask = checked_attention_mask(torch.as_tensor(attention_mask), tokens)
            token_mask = attention_mask[:, columns].bool()
        if token_mask is None or bool(token_mask.all()):
            return None
        return savable(token_mask).to(self.device)

    def padding_of_call(
        self, tokens: Int[Tensor, "batch pos"] | None, attention_mask: Tensor | None, *, by_user: bool
    ) -> Bool[Tensor, "batch pos"] | None:
        """``padding`` of a call of the model, from what its layers got.

        Args:
            tokens: None where the call starts from embeddings, as those of ``generate`` do.
            attention_mask: the user's, or the one that TransformerLens made from the tokens.
            by_user: whether the attention mask is an argument of the call.
        """
        if attention_mask is None or (by_user and tokens is not None):
            return self.padding(tokens, attention_mask)
        if tokens is not None and attention_mask.shape[1] > tokens.shape[1]:
            return None  # new tokens behind a KV cache
        return self.padding(None, without_false_padding(attention_mask.bool(), left=self._pads_left()))

    def _pads_left(self) -> bool:
        return getattr(self.model.tokenizer, "padding_side", "right") == "left"

    def _padding_of_tokens(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"] | None:
        tokenizer, left = self.model.tokenizer, self._pads_left()
        if tokenizer is None or tokenizer.pad_token_id is None or tokens.shape[1] == 0:
            return None
        edge = tokens[:, 0] if left else tokens[:, -1]
        if (not left and len(tokens) == 1) or not bool((edge == tokenizer.pad_token_id).any()):
            return None
        mask = get_attention_mask(tokenizer, tokens, bool(self.model.cfg.default_prepend_bos))
        return without_false_padding(mask.bool(), left=left)


def checked_attention_mask(attention_mask: Tensor, tokens: Int[Tensor, "batch pos"]) -> Shaped[Tensor, "batch _"]:
    """An attention mask of all rows, of the tokens or of a longer prefix.

    Raises:
        ValueError: it does not fit the tokens, or a row has no real token.
    """
    batch, pos = tokens.shape
    if attention_mask.ndim != 2 or attention_mask.shape[0] not in (1, batch) or attention_mask.shape[1] < pos:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)} and the tokens are {(batch, pos)}: give one entry per token, 0 at "
            "padding."
        )
    empty = (attention_mask == 0).all(-1)
    if bool(empty.any()):
        rows = empty.nonzero().flatten().tolist()
        raise ValueError(f"attention_mask has no real token in rows {rows}: leave out rows that are padding only.")
    return attention_mask.expand(batch, -1)


def without_false_padding(token_mask: Bool[Tensor, "batch pos"], *, left: bool) -> Bool[Tensor, "batch pos"]:
    """The mask with trailing padding only where rows differ in length, and with a real token in every row.

    Args:
        token_mask: False where pad tokens stand.
        left: whether prompts are padded on the left; a row of pad tokens only ends, else begins, with its real one.
    """
    trailing = token_mask.flip(-1).cumsum(-1).flip(-1) == 0
    lengths = (~trailing).sum(-1)
    if bool((lengths == lengths[0]).all()):
        return token_mask | trailing
    token_mask = token_mask.clone()
    token_mask[~token_mask.any(-1), -1 if left else 0] = True
    return token_mask


def savable(value: Any) -> Any:
    """Where inference mode is off, a copy of an inference tensor, which autograd may save; anything else unchanged."""
    inference = isinstance(value, Tensor) and value.is_inference()
    return value.clone() if inference and not torch.is_inference_mode_enabled() else value


def check_tokens(tokens: Tensor, *, d_vocab: int, n_ctx: int) -> None:
    """Raises ValueError unless ``tokens`` is a non-empty ``[batch, pos]`` of integers the model knows."""
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"Tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; integers [batch, pos] are needed.")
    if tokens.numel() == 0:
        raise ValueError(f"There are no tokens: the shape is {tuple(tokens.shape)}.")
    if tokens.shape[1] > n_ctx:
        raise ValueError(
            f"Sequences of {tokens.shape[1]} tokens are longer than the model's context of {n_ctx}; cut them."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise ValueError(
            f"Tokens run from {low} to {high}, outside the vocabulary 0..{d_vocab - 1}: were they made by another tokenizer?"
        )
