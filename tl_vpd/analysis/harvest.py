"""Harvest: where each subcomponent fires on a set of token rows, as statistics, windows of text and token tables.

A subcomponent *fires* at a token where its causal importance g exceeds a threshold.
*Input tokens* are those it fires at; *output tokens* those that follow in the text. The activation shown is
``(x @ V[:, c]) ‖U[c]‖``.

    >>> harvested = harvest(vpd, model, tokens)                     # doctest: +SKIP
    >>> harvested["blocks.1.mlp.W_in:12"].input_tokens(by="pmi")    # doctest: +SKIP
    >>> pick(harvested, 12)                                         # doctest: +SKIP

Memory grows with one batch of importances and each subcomponent's few windows and counts, never with the importances of all rows.
Left out: the tokens the *model* predicts (output tokens are the text's), and correlations between subcomponents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_vpd.analysis.nodes import several
from tl_vpd.analysis.records import Harvest
from tl_vpd.analysis.tally import HarvestConfig, Tally
from tl_vpd.checks import config_of, instance
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel
from tl_vpd.site import Subcomponent


@torch.no_grad()
def harvest(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None = None,
    *,
    config: HarvestConfig | None = None,
    attention_mask: Int[Tensor, "n pos"] | None = None,
) -> Harvest:
    """Runs the model over rows of tokens once and collects what every subcomponent does there.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: strings, or rows of tokens ``[n, pos]``; padding is left out.
        subcomponents: which ones (None: all). With very many, naming the ones to look at saves memory.
        config: windows, threshold and memory (None: the defaults).
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Raises:
        ValueError: no subcomponent is named, the prompts are not this model's or not tokens, or it has other weights.
        KeyError: a site is not decomposed.
        IndexError: there is no such subcomponent.
        TypeError: an argument is of another type.

    Warns (RuntimeWarning) where importances or activations are NaN or infinite.
    """
    config = config_of(HarvestConfig, config)
    instance("decomposition", decomposition, Decomposition)
    chosen = _chosen(decomposition, subcomponents)
    with MaskedModel(decomposition, model) as masked_model:
        tokens = masked_model.adapter.tokens(prompts)
        check_are_tokens(tokens, "A harvest")
        token_mask = masked_model.adapter.padding(tokens, attention_mask)
        real = torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask
        tally = Tally(len(chosen), int(tokens.max()) + 1, config, tokens.device)
        for start in range(0, len(tokens), config.batch_size):
            rows = slice(start, start + config.batch_size)
            batch_mask = None if token_mask is None else token_mask[rows]
            _, inputs = masked_model.clean(tokens[rows], batch_mask)
            g = decomposition.importances(inputs, batch_mask)
            g = g if subcomponents is None else g[..., chosen.to(g.device)]
            tally.add(tokens[rows], real[rows], g, _activations(decomposition, inputs, chosen), start)
        names = token_texts(getattr(masked_model.adapter.model, "tokenizer", None), tokens)
    return tally.result(decomposition, chosen.to(tokens.device), tokens, real, names)


def _chosen(
    decomposition: Decomposition, subcomponents: str | Subcomponent | Sequence[str | Subcomponent] | None
) -> Int[Tensor, " C"]:
    """Concatenated positions, ascending, each once."""
    site_axis = decomposition.site_axis
    if subcomponents is None:
        return torch.arange(site_axis.total)
    parsed = [decomposition.subcomponent(address) for address in several("subcomponents", subcomponents)]
    return torch.tensor(sorted({site_axis.slices[c.site].start + c.index for c in parsed}))


def check_are_tokens(tokens: Tensor, what: str) -> None:
    """Raises ValueError unless the prompts are rows of tokens, which custom models need not take."""
    if tokens.is_floating_point() or tokens.ndim != 2:
        raise ValueError(f"{what} is made of tokens; this model takes {tokens.dtype} of shape {tuple(tokens.shape)}.")


def _activations(
    decomposition: Decomposition, inputs: Mapping[str, Tensor], chosen: Int[Tensor, " C"]
) -> Float[Tensor, "row pos C"]:
    """``(x @ V[:, c]) ‖U[c]‖`` of the chosen subcomponents."""
    activations = []
    for name, where in decomposition.site_axis.slices.items():
        columns = (chosen[(chosen >= where.start) & (chosen < where.stop)] - where.start).to(decomposition.device)
        V, U = decomposition.V[name][:, columns], decomposition.U[name][columns]
        activations.append(inputs[name] @ (V * U.norm(dim=-1)).to(inputs[name]))
    return torch.cat(activations, dim=-1)


def token_texts(tokenizer: Any, tokens: Int[Tensor, "n pos"]) -> dict[int, str]:
    """The text of every token that occurs; its number where the token alone is no text (half a character)."""
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
