"""Prompts of a model: text and tokens, and which tokens are padding.

Prompts are a string, strings, or tokens: a tensor, an array or lists of integers of any type, ``[batch, pos]`` or one row.

Padding is what an attention mask says it is. Without one, pad tokens count as TransformerLens counts them (leading ones where the
tokenizer pads on the left, trailing ones where it pads on the right), with two exceptions, since for GPT-2 and its kin the pad
token is BOS and EOS as well: where all rows have the same length, as a single row has, a pad token at the end is a token like any
other; and a row of BOS or EOS only has a real token. A row of other pad tokens only is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_vpd.adapters.token_checks import (
    check_entries,
    check_rows,
    check_tokens,
    checked_attention_mask,
    integers,
    is_text,
)
from tl_vpd.adapters.versions import get_attention_mask
from tl_vpd.checks import shown


class Prompts:
    """What an ``Adapter`` knows of a model's prompts."""

    model: Any

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def tokens(self, prompts: Any) -> Tensor:
        """Prompts (a string, strings or tokens) as tokens ``[batch, pos]``, int64, on the model's device.

        Raises:
            TypeError: neither text nor tokens.
            ValueError: no prompts, too long, not integers, rows of several lengths, or a token outside the vocabulary.
        """
        tokens = self._text(prompts) if is_text(prompts) else integers(prompts)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        check_tokens(tokens, d_vocab=self.model.cfg.d_vocab, n_ctx=self.model.cfg.n_ctx)
        return to_device(savable(tokens), self.device)

    def _text(self, prompts: Any) -> Tensor:
        """Text as tokens."""
        if getattr(self.model, "tokenizer", None) is None:
            raise ValueError("This model has no tokenizer to read text with: give tokens as numbers.")
        tokens: Tensor = self.model.to_tokens(prompts if isinstance(prompts, str) else list(prompts), truncate=False)
        return tokens

    def token(self, text: str) -> int:
        """The number of the token that a text is; raises ValueError where it is several, or the model has no tokenizer."""
        if getattr(self.model, "tokenizer", None) is None:
            raise ValueError(f"This model has no tokenizer to read {shown(text)} with: give tokens as numbers.")
        numbers = self.model.to_tokens(text, prepend_bos=False)[0].tolist()
        if len(numbers) != 1:
            raise ValueError(
                f"{shown(text)} is {len(numbers)} tokens to this model; one is needed: mind the leading space."
            )
        return int(numbers[0])

    def words(self, tokens: Int[Tensor, " pos"]) -> list[str]:
        """Tokens as text (as their numbers, where there is no tokenizer)."""
        if getattr(self.model, "tokenizer", None) is None:
            return [str(token) for token in tokens.tolist()]
        return [self.model.tokenizer.decode([token]) for token in tokens.tolist()]

    def padding(self, tokens: Int[Tensor, "batch pos"], attention_mask: Any) -> Bool[Tensor, "batch pos"] | None:
        """True at real tokens, False at padding; None if nothing is padding. Without an attention mask the tokens tell. Raises
        TypeError or ValueError where the mask does not fit the tokens, or a row has no real token.
        """
        if attention_mask is None:
            return self._token_mask(self._padding_of_tokens(tokens, refuse=True))
        return self._token_mask(checked_attention_mask(attention_mask, tokens.shape))

    def padding_of_call(
        self, tokens: Int[Tensor, "batch pos"] | None, attention_mask: Tensor | None, *, by_user: bool, cached: bool
    ) -> Bool[Tensor, "batch pos"] | None:
        """``padding`` of a call of the model, from what its layers got.

        Args:
            tokens: None where the call starts from embeddings, as those of ``generate`` do.
            attention_mask: the user's, or the one that TransformerLens made; behind a KV cache, of the whole prefix.
            by_user: whether the attention mask is an argument of the call.
            cached: whether the tokens stand behind a KV cache.
        """
        if attention_mask is None or (not by_user and attention_mask.ndim != 2):
            return None if tokens is None else self._token_mask(self._padding_of_tokens(tokens))
        if by_user and tokens is not None:
            checked = checked_attention_mask(attention_mask, tokens.shape, prefix=cached)
            return self._token_mask(checked[:, -tokens.shape[1] :])
        if by_user:
            check_entries(attention_mask)
        if tokens is not None and attention_mask.shape[1] > tokens.shape[1]:
            return None  # new tokens behind a KV cache
        return self._token_mask(without_false_padding(attention_mask.bool(), left=self._pads_left()))

    def _token_mask(self, token_mask: Bool[Tensor, "batch pos"] | None) -> Bool[Tensor, "batch pos"] | None:
        """The mask on the model's device, None if nothing is padding."""
        if token_mask is None or bool(token_mask.all()):
            return None
        return to_device(savable(token_mask), self.device)

    def _pads_left(self) -> bool:
        return getattr(self.model.tokenizer, "padding_side", "right") == "left"

    def _padding_of_tokens(
        self, tokens: Int[Tensor, "batch pos"], *, refuse: bool = False
    ) -> Bool[Tensor, "batch pos"] | None:
        """Where pad tokens count as padding; with ``refuse``, raises ValueError for rows of nothing else."""
        tokenizer, left = self.model.tokenizer, self._pads_left()
        if tokenizer is None or tokenizer.pad_token_id is None or tokens.shape[1] == 0:
            return None
        pad, alone = tokenizer.pad_token_id, not left and len(tokens) == 1
        refuse = refuse and pad not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        edge = tokens[:, 0] if left else tokens[:, -1]
        if (alone and not refuse) or not bool((edge == pad).any()):
            return None
        if refuse:
            check_rows("The tokens have", (tokens != pad).any(-1))
        if alone:
            return None
        mask = get_attention_mask(tokenizer, tokens, bool(self.model.cfg.default_prepend_bos))
        return without_false_padding(mask.bool(), left=left)


def without_false_padding(token_mask: Bool[Tensor, "batch pos"], *, left: bool) -> Bool[Tensor, "batch pos"]:
    """The mask with trailing padding only where rows differ in length, and with a real token in every row: of a row of pad
    tokens, the last where prompts are padded on the ``left``, else the first.
    """
    trailing = token_mask.flip(-1).cumsum(-1).flip(-1) == 0
    lengths = (~trailing).sum(-1)
    if bool((lengths == lengths[0]).all()):
        return token_mask | trailing
    token_mask = token_mask.clone()
    token_mask[~token_mask.any(-1), -1 if left else 0] = True
    return token_mask


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. From the CPU to a GPU it goes by pinned memory, for which nobody waits."""
    if tensor.device.type != "cpu" or device.type in ("cpu", "mps"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def savable(value: Any) -> Any:
    """Where inference mode is off, a copy of an inference tensor, which autograd may save; anything else unchanged."""
    inference = isinstance(value, Tensor) and value.is_inference()
    return value.clone() if inference and not torch.is_inference_mode_enabled() else value
