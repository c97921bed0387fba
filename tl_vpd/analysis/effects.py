"""Each of many subcomponents ablated in turn, and what that does to a metric: what activation patching's sweeps are for heads.

>>> table = ablation_table(vpd, model, tokens, lambda logits: logits[0, -1, answer])          # doctest: +SKIP
>>> table.sort_values("change").head()                                                        # doctest: +SKIP

The prompts are repeated along the batch, so that one pass ablates a different subcomponent in every copy; a pass computes only
the columns it touches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.analysis.metric import Metric, check_metric, number_of
from tl_vpd.analysis.nodes import several
from tl_vpd.checks import check_fields, check_finite, config_of, instance
from tl_vpd.decomposition import Decomposition
from tl_vpd.hooks import attachment_of
from tl_vpd.hooks.importances import causal_importances
from tl_vpd.hooks.positions import Positions
from tl_vpd.hooks.sparse import AblateEach
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent, nearest


@dataclass(frozen=True)
class AblationTableConfig(Printed):
    """How subcomponents are ablated, and how many prompts run at once.

    Attributes:
        pos: at which positions, as in ``ablation_hooks`` (None: all).
        amount: how much of each subcomponent is ablated, as in ``ablation_hooks``.
        values: what activations are replaced by, as in ``ablation_hooks`` (None: 0).
        threshold: without a choice of subcomponents, those whose importance exceeds this at any token are ablated.
        rows: prompts run at once (at least all of one copy).
        progress: whether a bar is shown.
    """

    pos: Positions = None
    amount: float = 1.0
    values: Mapping[str, Tensor] | None = None
    threshold: float = 0.0
    rows: int = 32
    progress: bool = False

    def __post_init__(self) -> None:
        check_fields(self, rows=1)
        if self.values is not None and not isinstance(self.values, Mapping):
            raise TypeError(f"values is a {type(self.values).__name__}: give tensors by site.")


@torch.no_grad()
def ablation_table(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    metric: Metric,
    subcomponents: Sequence[str | Subcomponent] | None = None,
    *,
    config: AblationTableConfig | None = None,
    attention_mask: Tensor | None = None,
) -> pd.DataFrame:
    """A metric of the model's output with one subcomponent ablated at a time.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: a string, strings, or tokens ``[batch, pos]``.
        metric: takes the logits of all prompts ``[batch, pos, vocab]``, gives a number.
        subcomponents: such as ``"blocks.1.attn.W_Q:316"``, one or several (None: those that are important at any token of the
            prompts).
        config: how they are ablated (None: the defaults).
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Returns:
        One row per subcomponent, in the order of ``subcomponents`` (or by site and index): ``subcomponent``, ``site``, ``index``,
        ``metric``, and ``change`` (``metric`` minus that of the model without ablation).

    Raises:
        KeyError: a site is not decomposed, or ``values`` lacks it.
        IndexError: a subcomponent or position does not exist.
        ValueError: the metric gives several numbers, the model has other weights, another decomposition is attached to it, no
            subcomponent is named, ``values`` are not finite, or the config's threshold comes with a choice of subcomponents.
        TypeError: an argument is of another type, or the metric gives no number.

    Warns (RuntimeWarning) where the metric is NaN or infinite.
    """
    config = config_of(AblationTableConfig, config)
    instance("decomposition", decomposition, Decomposition)
    check_metric(metric)
    if subcomponents is not None and config.threshold:
        raise ValueError(f"threshold={config.threshold} does nothing with subcomponents=: leave out one of the two.")
    attached = attachment_of(decomposition, model)
    adapter = adapt(model)
    tokens = adapter.tokens(prompts)
    token_mask = adapter.padding(tokens, attention_mask)
    if subcomponents is None:
        g = causal_importances(decomposition, model, tokens, attention_mask=attention_mask).concatenated
        important = (g > config.threshold).flatten(0, -2).any(0).nonzero().flatten().tolist()
        chosen = [decomposition.site_axis.at(i) for i in important]
    else:
        chosen = [decomposition.subcomponent(c) for c in several("subcomponents", subcomponents)]
    with decomposition.attach(model) if attached is None else nullcontext():
        clean = number_of(metric(adapter.run(tokens, token_mask)))
        values: list[float] = []
        copies = max(1, config.rows // len(tokens))
        for start in tqdm(range(0, len(chosen), copies), disable=not config.progress, desc="ablating"):
            group = chosen[start : start + copies]
            with model.hooks(fwd_hooks=_hooks(decomposition, group, len(tokens), config)):  # type: ignore[operator]
                output = _run_copies(adapter, tokens, token_mask, len(group))
            values += [number_of(metric(logits)) for logits in output.split(len(tokens))]
    _warn_of_undefined(clean, values, chosen)
    return pd.DataFrame(
        {
            "subcomponent": [str(c) for c in chosen],
            "site": [c.site for c in chosen],
            "index": [c.index for c in chosen],
            "metric": values,
            "change": [value - clean for value in values],
        }
    )


def _warn_of_undefined(clean: float, values: Sequence[float], chosen: Sequence[Subcomponent]) -> None:
    undefined = [str(c) for c, value in zip(chosen, values, strict=True) if not math.isfinite(value)]
    if not math.isfinite(clean) or undefined:
        where = "the model itself" if not math.isfinite(clean) else f"the model without {undefined[0]}"
        warnings.warn(
            f"The metric is NaN or infinite on {where}, and on {len(undefined)} of {len(chosen)} ablated models.",
            RuntimeWarning,
            stacklevel=4,
        )


def _run_copies(adapter: Adapter, tokens: Tensor, token_mask: Tensor | None, n: int) -> Tensor:
    times = [n] + [1] * (tokens.ndim - 1)
    return adapter.run(tokens.repeat(times), None if token_mask is None else token_mask.repeat(n, 1))


def _hooks(
    decomposition: Decomposition, group: Sequence[Subcomponent], batch: int, config: AblationTableConfig
) -> list[tuple[str, AblateEach]]:
    """Copy i of the prompts runs without ``group[i]``."""
    kind = "mask" if config.values is None else "component_acts"
    hooks = []
    for site in dict.fromkeys(c.site for c in group):
        copies = tuple(copy for copy, c in enumerate(group) if c.site == site)
        indices = tuple(group[copy].index for copy in copies)
        values = None if config.values is None else _values_of(decomposition, config.values, site)[..., list(indices)]
        hook = AblateEach(indices, config.pos, copies, batch, config.amount, values)
        hooks.append((decomposition.sites[site].hook_name(kind), hook))
    return hooks


def _values_of(decomposition: Decomposition, values: Mapping[str, Tensor], site: str) -> Tensor:
    """What a site's activations are replaced by."""
    if site not in values:
        raise KeyError(f"values has nothing for {site}{nearest(site, values)}.")
    if values[site].shape[-1:] != (decomposition.counts[site],):
        raise ValueError(
            f"values of {site} are {tuple(values[site].shape)}: their last axis needs {decomposition.counts[site]} subcomponents."
        )
    check_finite(f"values[{site!r}]", values[site])
    return values[site]
