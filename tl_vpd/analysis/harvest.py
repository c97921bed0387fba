"""Harvest: where each subcomponent fires on a set of token rows, as statistics, windows of text and token tables.

A subcomponent *fires* at a token where its causal importance g exceeds a threshold.
*Input tokens* are those it fires at; *output tokens* those that follow in the text. The activation shown is
``(x @ V[:, c]) ‖U[c]‖``.

    >>> found = harvest(vpd, model, tokens)                     # doctest: +SKIP
    >>> found["blocks.1.mlp.W_in:12"].input_tokens(by="pmi")    # doctest: +SKIP
    >>> pick(found, 12)                                         # doctest: +SKIP

Memory holds one batch of importances, and a subcomponent's few windows and counts; never the importances of all rows.
Left out: the tokens the *model* predicts (output tokens are the text's), and correlations between subcomponents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_vpd.analysis.records import Harvest
from tl_vpd.analysis.tally import Tally
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.hooks.importances import zero_padding
from tl_vpd.importance import lower_leaky
from tl_vpd.site import Subcomponent


@torch.no_grad()
def harvest(
    decomposition: Decomposition,
    model: nn.Module,
    tokens: Int[Tensor, "n pos"] | str | list[str],
    *,
    subcomponents: Sequence[str | Subcomponent] | None = None,
    windows: int = 8,
    radius: int = 20,
    batch_size: int = 32,
    threshold: float = 0.1,
    attention_mask: Int[Tensor, "n pos"] | None = None,
) -> Harvest:
    """Runs the model over rows of tokens once and collects what every subcomponent does there.

    Args:
        tokens: rows ``[n, pos]`` or strings; padding (or 0 in ``attention_mask``) is left out.
        subcomponents: which ones (None: all). With very many, naming the ones to look at saves memory.
        windows: windows kept of each, at most one a row, in order of the largest importance.
        radius: tokens shown on each side of a window's peak.
        threshold: it fires where g exceeds this.

    Raises:
        ValueError: an option is out of range, or the tokens are not this model's.
        KeyError, IndexError: a subcomponent does not exist.
    """
    for name, value, least in (("windows", windows, 1), ("radius", radius, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: at least {least} is needed.")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold}: importances lie in [0, 1], so it must be at least 0 and below 1.")
    chosen = _chosen(decomposition, subcomponents)
    with MaskedModel(decomposition, model) as masked_model:
        tokens = masked_model.adapter.tokens(tokens)
        token_mask = masked_model.adapter.padding(tokens, attention_mask)
        real = torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask
        tally = Tally(len(chosen), int(tokens.max()) + 1, windows, radius, threshold, tokens.device)
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            own_keep = None if token_mask is None else token_mask[rows]
            _, inputs = masked_model.clean(tokens[rows], own_keep)
            g = zero_padding(lower_leaky(decomposition.pre_sigmoid(inputs, own_keep)), own_keep)
            g = g if subcomponents is None else g[..., chosen.to(g.device)]
            tally.add(tokens[rows], real[rows], g, _activations(decomposition, inputs, chosen), start)
        names = _names(getattr(masked_model.adapter.model, "tokenizer", None), tokens)
    return tally.result(decomposition, chosen.to(tokens.device), tokens, real, names)


def _chosen(decomposition: Decomposition, subcomponents: Sequence[str | Subcomponent] | None) -> Int[Tensor, " C"]:
    """Positions, ascending, each once."""
    site_axis = decomposition.site_axis
    if subcomponents is None:
        return torch.arange(site_axis.total)
    if isinstance(subcomponents, (str, Subcomponent)):
        subcomponents = [subcomponents]
    if not len(subcomponents):
        raise ValueError("No subcomponent is named; pass subcomponents=None for all of them.")
    found = [decomposition.subcomponent(address) for address in subcomponents]
    return torch.tensor(sorted({site_axis.slices[f.site].start + f.index for f in found}))


def _of_site(chosen: Int[Tensor, " C"], where: slice) -> Int[Tensor, " own"]:
    return chosen[(chosen >= where.start) & (chosen < where.stop)] - where.start


def _activations(
    decomposition: Decomposition, inputs: Mapping[str, Tensor], chosen: Int[Tensor, " C"]
) -> Float[Tensor, "row pos C"]:
    parts = []
    for name, where in decomposition.site_axis.slices.items():
        own = _of_site(chosen, where).to(decomposition.device)
        V, U = decomposition.V[name][:, own], decomposition.U[name][own]
        parts.append(inputs[name] @ (V * U.norm(dim=-1)).to(inputs[name]))
    return torch.cat(parts, dim=-1)


def _names(tokenizer: Any, tokens: Int[Tensor, "n pos"]) -> dict[int, str]:
    """The text of every token that occurs; its number where there is no text for it alone (half a character)."""
    ids = tokens.unique().tolist()
    if tokenizer is None:
        return {i: str(i) for i in ids}
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    names = {}
    for i, text, piece in zip(ids, texts, pieces, strict=True):
        # Sentencepiece tokenizers drop the space in front when a token is decoded alone.
        spaced = " " + text if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text
        names[i] = f"⟨{i}⟩" if not text or "\ufffd" in text else spaced
    return names
