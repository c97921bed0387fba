"""A prompt's tokens coloured by the importances of chosen subcomponents, with their activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.analysis import Component, Window
from tl_vpd.analysis.nodes import several
from tl_vpd.checks import integer
from tl_vpd.forward.target_check import check_decomposition
from tl_vpd.site import Subcomponent
from tl_vpd.viz.circuits import draw, library, note_of, scale_of
from tl_vpd.viz.panel import Panel
from tl_vpd.viz.text import breakable, number

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition

HOW = (
    "Each block is the same prompt for one subcomponent. Background: its causal importance at the token, none 0, "
    "full 1. Underline: its activation (times the norm of what it writes); hue is the sign, the strongest colour the "
    "largest in the block. Framed: the largest importance. Hover over a token for both numbers. Line breaks are shown "
    "as ⏎."
)


@torch.no_grad()
def importances(
    decomposition: Decomposition,
    model: nn.Module,
    prompt: Any,
    subcomponents: Sequence[str | Subcomponent | Component] | None = None,
    *,
    k: int = 6,
) -> Panel:
    """One prompt's tokens, coloured by importance and underlined by activation, once for every subcomponent.

    Args:
        decomposition: of the model.
        model: the target.
        prompt: a string, or the tokens of one prompt.
        subcomponents: to show (None: the ``k`` of the largest mean importance that are not above 0.5 at half the tokens or more).
            A component in a list is one block, with the largest importance of its members and that member's activation.
        k: how many, where none are named.

    Raises:
        ValueError: there is more than one prompt, or nothing to show.
        KeyError: there is no such site.
        IndexError: the site has no such subcomponent.
        TypeError: an argument is of another type.
    """
    check_decomposition(decomposition)
    k = integer("k", k, minimum=1)
    g = decomposition.causal_importances(model, prompt)
    if len(g.tokens) != 1:
        raise ValueError(f"{len(g.tokens)} prompts: one is shown at a time, pass a single one.")
    if subcomponents is None:
        often = (g.concatenated[0] > 0.5).float().mean(0) >= 0.5
        mean = g.concatenated[0].mean(0).masked_fill(often, 0)
        best = mean.topk(min(k, len(mean)))
        values = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        chosen: list[Subcomponent | Component] = [g.site_axis.at(i) for i, m in values if m > 0]
    else:
        named = several("subcomponents", subcomponents)
        chosen = [c if isinstance(c, Component) else decomposition.subcomponent(c) for c in named]
    if not chosen:
        raise ValueError("There is nothing to show: no subcomponent was named, or none is important anywhere.")
    acts = decomposition.component_acts(model, g.tokens)
    words = adapt(model).words(g.tokens[0])
    blocks, scripts = [], []
    for c in chosen:
        name = c.address if isinstance(c, Component) else str(c)
        ci, a = _values(decomposition, c, g, acts)
        peak = int(ci.nan_to_num(-1.0).argmax())
        window = Window(0, peak, 0, tuple(g.tokens[0].tolist()), tuple(words), ci, a)
        scale = scale_of([window])
        (place,), script_of_window = draw([window], scale)
        scripts.append(script_of_window)
        blocks.append(
            f'<div class="window"><div class="where"><code>{breakable(name)}</code><br>importance '
            f"up to {number(float(ci[peak]))}<br>activation up to {number(scale)}</div>{place}</div>{note_of([window])}"
        )
    legend = (
        '<div class="legend"><span>importance 0<i class="ramp"></i>1</span>'
        '<span>activation<i class="line positive"></i>positive'
        '<i class="line negative"></i>negative</span></div>'
    )
    title = "Tokens by importance"
    body = f"<h3>{title}</h3>{legend}{''.join(blocks)}"
    return Panel(title=title, body=body, how_to_read=HOW, libraries=(library(),), scripts=tuple(scripts))


def _values(
    decomposition: Decomposition, shown: Subcomponent | Component, g: Mapping[str, Tensor], acts: Mapping[str, Tensor]
) -> tuple[Float[Tensor, " pos"], Float[Tensor, " pos"]]:
    """Importance and activation at each token; of a component those of the member that is most important there."""
    members = list(shown) if isinstance(shown, Component) else [decomposition.subcomponent(shown)]
    lags = shown.lags if isinstance(shown, Component) else (0,)
    rows = []
    for c, lag in zip(members, lags, strict=True):
        norm = decomposition.U[c.site][c.index].detach().norm().to(acts[c.site])
        both = torch.stack([g[c.site][0, :, c.index].float(), (acts[c.site][0, :, c.index] * norm).float()]).cpu()
        rows.append(nn.functional.pad(both, (lag, 0))[:, : both.shape[1]])
    importance, activation = torch.stack(rows, dim=1)
    best = importance.nan_to_num(-1.0).argmax(0)[None]
    return importance.gather(0, best)[0], activation.gather(0, best)[0]
