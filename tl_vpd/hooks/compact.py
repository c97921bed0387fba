"""``compact``: a decomposition without the subcomponents that are never important on a set of prompts.

A subcomponent is dropped if its importance is at most a threshold at every real token. It is part of Δ from then on, and so has
Δ's factor. What agrees with the decomposition before:

* the model's output where nothing is masked: to the bit;
* importances, activations and ablations of the subcomponents that stay: to rounding;
* the output under masks: to rounding, where the masks of all dropped subcomponents were Δ's factor. On the same prompts, with Δ
  off, these are ``zero``, ``rounded`` at the threshold or above, and ``ci`` if the threshold is 0. Other masks (``stochastic``,
  ``adversarial``, ``unmasked`` with Δ off) differ by what the dropped ones' masks did.

On other prompts, a dropped subcomponent might have been important.

    >>> small = vpd.compact(model, tokens)                              # doctest: +SKIP
    >>> small.original_addresses()                                     # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.checks import check_threshold, instance, integer
from tl_vpd.forward import MaskedModel
from tl_vpd.importance import DecomposedWeights
from tl_vpd.importance.selection import selected
from tl_vpd.site import Subcomponent

D = TypeVar("D", bound=DecomposedWeights)

COMPACT = "compact"
"""Where ``record`` has what was dropped: a list, one entry for each time."""


@torch.no_grad()
def compact(
    decomposition: D,
    model: nn.Module,
    prompts: Any,
    *,
    threshold: float = 0.0,
    batch_size: int = 32,
    attention_mask: Tensor | None = None,
) -> D:
    """The decomposition without the subcomponents whose importance is nowhere above a threshold.

    Δ takes up what is dropped. A site has at least one subcomponent: where none is above the threshold, the one of the
    largest value before squashing stays, and a warning says so.

    Args:
        decomposition: of this model; it is not changed.
        model: the target.
        prompts: a string, strings, or tokens ``[batch, pos]``: the more, the fewer are dropped that other text needs.
        threshold: in [0, 1]; at 0, what has importance 0 at every token is dropped.
        batch_size: rows run at once, which bounds memory.
        attention_mask: 0 at padding (None: the tokens tell, see ``tl_vpd.adapters.prompts``).

    Returns:
        A decomposition whose ``record["compact"]`` has, for each time: ``threshold``, ``rows``, ``tokens``; ``before`` and
        ``after``, the counts by site; ``indices``, by site the former index of each subcomponent; ``below``, the sites with none
        above the threshold.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the threshold is not in [0, 1]; there are no tokens, or they are not this model's; the model is not the
            decomposed one; or Γ gives values that are NaN or infinite.
    """
    threshold, batch_size = check_threshold(threshold), integer("batch_size", batch_size, minimum=1)
    largest, rows, tokens = _largest(decomposition, model, prompts, batch_size, attention_mask)
    indices, below = {}, []
    for name, z in decomposition.site_axis.split_sites(largest).items():
        above = (z.clamp(0, 1) > threshold).nonzero()[:, 0]
        if not len(above):
            below.append(name)
            above = z.argmax()[None]
        indices[name] = above.cpu()
    if below:
        warnings.warn(
            f"No subcomponent of {', '.join(below)} has an importance above {threshold:g} on these {tokens} tokens: the one "
            "nearest to it stays, since a site has at least one.",
            stacklevel=4,  # the caller of Decomposition.compact
        )
    fewer = selected(decomposition, indices)
    entry = {
        "threshold": threshold,
        "rows": rows,
        "tokens": tokens,
        "before": decomposition.counts,
        "after": fewer.counts,
        "indices": {name: index.tolist() for name, index in indices.items()},
        "below": below,
    }
    fewer.record[COMPACT] = [*fewer.record.get(COMPACT, []), entry]
    return fewer


def original_addresses(decomposition: DecomposedWeights) -> pd.DataFrame:
    """The address of every subcomponent before ``compact``, as often as it was used.

    Returns:
        One row per subcomponent: ``subcomponent``, ``original``.

    Raises:
        TypeError: it is something else.
        ValueError: the record does not fit the decomposition.
    """
    instance("decomposition", decomposition, DecomposedWeights)
    rows = []
    for name, C in decomposition.counts.items():
        original = list(range(C))
        for entry in reversed(decomposition.record.get(COMPACT, [])):
            try:
                original = [entry["indices"][name][i] for i in original]
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f"record['compact'] does not have the former index of every subcomponent of {name}: it was changed."
                ) from error
        rows += [(str(Subcomponent(name, i)), str(Subcomponent(name, old))) for i, old in enumerate(original)]
    return pd.DataFrame(rows, columns=["subcomponent", "original"])


def _largest(
    decomposition: DecomposedWeights, model: nn.Module, prompts: Any, batch_size: int, attention_mask: Tensor | None
) -> tuple[Float[Tensor, " C_total"], int, int]:
    """Γ's largest value at any real token before squashing, and how many rows and real tokens there were."""
    largest: Tensor | None = None
    n_tokens = 0
    with MaskedModel(decomposition, model) as masked_model:
        tokens = masked_model.adapter.tokens(prompts)
        token_mask = masked_model.adapter.padding(tokens, attention_mask)
        for start in range(0, len(tokens), batch_size):
            real = None if token_mask is None else token_mask[start : start + batch_size]
            inputs = masked_model.inputs(tokens[start : start + batch_size], real)
            z = decomposition.pre_sigmoid(inputs, real)
            z = z.flatten(0, -2) if real is None else z[real]
            n_tokens += len(z)
            largest = z.amax(0) if largest is None else torch.maximum(largest, z.amax(0))
    assert largest is not None, "the adapter refuses prompts without tokens"
    undefined = (~largest.isfinite()).nonzero()
    if len(undefined):
        raise ValueError(
            f"Γ gives NaN or infinite values for {len(undefined)} of {len(largest)} subcomponents, the first is "
            f"{decomposition.site_axis.at(int(undefined[0]))}: look at the weights and at the model's activations."
        )
    return largest, len(tokens), n_tokens
