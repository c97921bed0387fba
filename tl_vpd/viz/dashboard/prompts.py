"""Prompts that can be looked at token by token: which subcomponents are important at each token.

==========  ==================================================================================================
``tokens``  as numbers of the pages' list of tokens
``next``    the token that the model thinks most probable after each, and that probability in hundredths
``at``      for each token ``[place, importance in hundredths, activation]``, the most important first
==========  ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tl_vpd.analysis.harvest.batch import activations_of
from tl_vpd.analysis.harvest.rows import check_are_tokens
from tl_vpd.analysis.harvest.tokens import token_texts
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel
from tl_vpd.viz.dashboard.records import Record, Records, hundredths, short


def prompt_records(decomposition: Decomposition, model: nn.Module, prompts: Any, records: Records) -> Iterator[Record]:
    """One record for each prompt, without its padding; of the harvested subcomponents.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: strings, or rows of tokens.
        records: of the subcomponents, with the list of tokens.

    Raises:
        ValueError: the prompts are not this model's, or not tokens.
    """
    with MaskedModel(decomposition, model) as masked_model:
        tokens = masked_model.adapter.tokens(prompts)
        check_are_tokens(tokens, "A page of prompts")
        mask = masked_model.adapter.padding(tokens, None)
        tokenizer = getattr(masked_model.adapter.model, "tokenizer", None)
        chosen = records.harvested.chosen.to(tokens.device)
        for i in range(len(tokens)):
            row = slice(i, i + 1)
            row_mask = None if mask is None else mask[row]
            with torch.no_grad():
                logits, inputs = masked_model.clean(tokens[row], row_mask)
                g = decomposition.importances(inputs, row_mask)[0, :, chosen]
                a = activations_of(decomposition, inputs, chosen)[0]
            real = slice(None) if mask is None else mask[i]
            best = logits[0, real].float().softmax(-1).max(-1)
            ids, following = tokens[i, real].tolist(), best.indices.tolist()
            texts = token_texts(tokenizer, torch.tensor(sorted({*ids, *following})))
            texts |= {t: records.harvested.names[t] for t in texts if t in records.harvested.names}
            number = {t: records.tokens.number(t, text) for t, text in texts.items()}
            yield {
                "tokens": [number[t] for t in ids],
                "next": [[number[t], p] for t, p in zip(following, hundredths(best.values), strict=True)],
                "at": [_strongest(*pair, records.config.per_token) for pair in zip(g[real], a[real], strict=True)],
            }


def _strongest(g: Tensor, a: Tensor, k: int) -> list[list[Any]]:
    """Those of a token whose importance is at least a hundredth; of equal ones the most active first."""
    best = g.topk(min(k, len(g)))
    listed = [
        [place, importance, short(float(a[place]))]
        for place, importance in zip(best.indices.tolist(), hundredths(best.values), strict=True)
        if importance > 0
    ]
    return sorted(listed, key=lambda entry: (-entry[1], -abs(entry[2] or 0.0), entry[0]))
