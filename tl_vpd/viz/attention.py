"""Pictures of decomposed attention: pairs' patterns next to the model's, strengths by offset, norms by head, attention by offset.

>>> viz.pair_attention(score_terms(vpd, model, tokens, 0, pairs), words)                                  # doctest: +SKIP
>>> viz.static_strengths(static_strengths(vpd, model, tokens, 0, subcomponents=ends))                     # doctest: +SKIP
>>> viz.head_norms(head_norms(vpd, 0)).save("norms.html")                                                 # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.analysis.attention import AttentionByOffset, HeadNorms, ScoreTerms, StaticStrengths, pattern_of
from tl_vpd.analysis.attention.layer import pairs_of
from tl_vpd.checks import instance, integer, sequence, text_of
from tl_vpd.site import Subcomponent
from tl_vpd.viz.attention_plots import lines
from tl_vpd.viz.circuits import library
from tl_vpd.viz.panel import Panel
from tl_vpd.viz.series import Series, series
from tl_vpd.viz.style import SERIES, shade
from tl_vpd.viz.text import escape, for_script, not_drawn, number, visible

LONGEST = 128
"""Most tokens of a pattern in a picture: its widget grows past what a browser draws smoothly."""

HOW_PAIRS = (
    "Each small square is a head's attention pattern: rows are the tokens that look, columns those looked at. Hover "
    "over one to see it large, click to leave it open.\n\n"
    "“model” is the pattern the model computes; “without” the softmax of its scores with the chosen pairs of "
    "subcomponents left out; “pairs alone” the softmax of the chosen pairs' summands and nothing else (what all other "
    "pairs, Δ and the biases add is left out), so it shows where the pairs by themselves would look."
)
HOW_STATIC = (
    "Each line is a head: what the pair of subcomponents would add to its scores when the query is as many tokens "
    "after the key as the horizontal axis says, both firing with the sign they usually have. Computed from the "
    "weights alone; standardised: in standard deviations of this head's strengths over all pairs and offsets. A peak "
    "at 1 favours the previous token."
)
HOW_NORMS = (
    "Each row is a subcomponent, each column a head: the norm of its piece in that head (Q, K, V: of what it writes "
    "there; O: of what it reads there), times the norm of its other side. “Heads” is the number of heads over which it "
    "spreads: 1 for a single one, the number of heads for all alike. Rows are the largest of each matrix."
)
HOW_OFFSETS = (
    "The mean share of its attention that a head pays to the token so many positions back; dashed: with the named "
    "subcomponents or pairs left out."
)

_DRAW_HEADS = """
(function () {
  for (const place of document.querySelectorAll('[data-tlvpd-heads="KEY"]:not([id])')) {
    place.textContent = "";
    place.id = "tlvpd-heads-KEY-" + Math.random().toString(36).slice(2);
    CircuitsVis.render(place.id, CircuitsVis.AttentionHeads, PROPS);
  }
})();
"""


def pair_attention(
    terms: ScoreTerms, tokens: Sequence[str] | None = None, *, row: int = 0, heads: Sequence[int] | None = None
) -> Panel:
    """The attention of chosen pairs beside the model's pattern, rendered by circuitsvis.

    Args:
        terms: score terms with pairs.
        tokens: of the row, as text (None: their numbers).
        row: of the batch.
        heads: to show (None: all).

    Raises:
        ValueError: the terms have no pairs, the prompt is too long to draw, or the number of words is not that of the tokens.
        IndexError: there is no such row or head.
        TypeError: an argument is of another type.
    """
    instance("terms", terms, ScoreTerms)
    if not terms.pairs:
        raise ValueError("The terms have no pairs: pass score_terms the pairs to look at.")
    row = integer("row", row)
    if not 0 <= row < len(terms.tokens):
        raise IndexError(f"There is no row {row}: the terms are of {len(terms.tokens)} prompts.")
    numbers = terms.tokens[row].tolist()
    words = (
        [str(n) for n in numbers]
        if tokens is None
        else [text_of(f"tokens[{i}]", t) for i, t in enumerate(sequence("tokens", tokens))]
    )
    if len(words) != len(numbers) or len(words) > LONGEST:
        raise ValueError(
            f"{len(words)} words for {len(numbers)} tokens: give one word per token, and at most {LONGEST}."
        )
    n_heads = terms.scores.shape[1]
    chosen = list(range(n_heads))
    if heads is not None:
        chosen = [integer(f"heads[{i}]", h) for i, h in enumerate(sequence("heads", heads))]
    if not chosen or any(not 0 <= h < n_heads for h in chosen):
        raise IndexError(f"heads={chosen}: the layer has heads 0 to {n_heads - 1}.")
    kinds = {"model": terms.scores, "without": terms.without(), "pairs alone": terms.only()}
    shown = {kind: pattern_of(scores[row].float()).cpu() for kind, scores in kinds.items()}
    names = [f"head {h}: {kind}" for h in chosen for kind in shown]
    patterns = [_rounded(shown[kind][h]) for h in chosen for kind in shown]
    pairs = "; ".join(f"{q} · {k}" for q, k in terms.pairs)
    props = {"tokens": [visible(w) for w in words], "attention": patterns, "attentionHeadNames": names}
    data = for_script(props)
    missing = not_drawn(sum(int((~shown[kind][h].isfinite()).sum()) for h in chosen for kind in shown))
    key = hashlib.sha256(data.encode()).hexdigest()[:16]
    title = f"Attention of block {terms.layer}, pair by pair"
    fallback = "Patterns are drawn when scripts may run."
    body = (
        f'<h3>{escape(title)}</h3><p class="note"><code>{escape(pairs)}</code></p>{missing}'
        f'<div class="wide"><div data-tlvpd-heads="{key}">{fallback}</div></div>'
    )
    call = _DRAW_HEADS.replace("KEY", key).replace("PROPS", data)
    return Panel(title=title, body=body, how_to_read=HOW_PAIRS, libraries=(library(),), scripts=(call,))


def _rounded(pattern: Float[Tensor, "query key"]) -> list[list[float]]:
    return [[round(p, 3) for p in row] for row in pattern.nan_to_num(0.0, 0.0, 0.0).tolist()]


def static_strengths(
    strengths: StaticStrengths,
    pairs: Sequence[tuple[str | Subcomponent, str | Subcomponent]] | None = None,
    *,
    top: int = 6,
    max_offset: int | None = None,
) -> Panel:
    """Static interaction strengths by offset, one plot per pair, one line per head.

    Args:
        strengths: of a layer.
        pairs: to draw (None: the ``top`` of the largest standardised strength).
        top: how many pairs, where none are named.
        max_offset: the last one shown (None: all).

    Raises:
        KeyError: a pair is not among the strengths.
        TypeError: an argument is of another type.
        ValueError: a number is out of its range, or no pair is named.
        ImportError: matplotlib is not installed.
    """
    instance("strengths", strengths, StaticStrengths)
    top = integer("top", top, minimum=1)
    max_offset = None if max_offset is None else integer("max_offset", max_offset, minimum=int(strengths.offsets[0]))
    queries, keys = ([str(c) for c in side] for side in (strengths.queries, strengths.keys))
    values = strengths.standardised.detach().cpu()
    if pairs is None:
        peak = values.abs().amax((-2, -1))
        best = peak.flatten().topk(min(top, peak.numel())).indices
        at = [divmod(i, len(keys)) for i in best.tolist()]
    else:
        pairs = pairs_of(pairs)
        if not pairs:
            raise ValueError("pairs=[]: name at least one pair.")
        for q, k in pairs:
            if str(q) not in queries or str(k) not in keys:
                raise KeyError(f"({q}, {k}) is not among the {len(queries)} x {len(keys)} pairs of these strengths.")
        at = [(queries.index(str(q)), keys.index(str(k))) for q, k in pairs]
    offsets = strengths.offsets.cpu()
    shown = offsets <= (int(offsets[-1]) if max_offset is None else max_offset)
    heads = series(f"head {h}" for h in range(values.shape[2]))
    plots = [
        (f"{queries[i]}  ·  {keys[j]}", {name: values[i, j, h][shown] for h, name in enumerate(heads)}) for i, j in at
    ]
    title = f"Static strengths of block {strengths.layer} by offset"
    x_label, y_label = "offset: tokens from key to query", "standardised strength (SD)"
    body = lines(plots, offsets[shown], x_label, y_label, heads)
    return Panel(title=title, body=f"<h3>{escape(title)}</h3>{body}", how_to_read=HOW_STATIC)


def attention_by_offset(attention: AttentionByOffset) -> Panel:
    """Mean attention by offset, one plot per head; dashed where something was left out.

    Raises:
        TypeError: it is something else.
        ImportError: matplotlib is not installed.
    """
    instance("attention", attention, AttentionByOffset)
    shown = {"model": Series(SERIES[0], ".")}
    if attention.after is not None:
        shown["left out"] = Series(SERIES[1], ".", "--")
    plots = []
    for head, before in enumerate(attention.before.detach().cpu()):
        by_name: dict[str, Tensor] = {"model": before}
        if attention.after is not None:
            by_name["left out"] = attention.after[head].detach().cpu()
        plots.append((f"head {head}", by_name))
    title = f"Attention of block {attention.layer} by offset"
    ablated = escape("; ".join(attention.ablated))
    note = f'<p class="note">Left out: <code>{ablated}</code></p>' if ablated else ""
    offsets = torch.arange(attention.before.shape[1])
    body = lines(plots, offsets, "offset: tokens back", "mean attention (share)", shown, share_y=True)
    return Panel(title=title, body=f"<h3>{escape(title)}</h3>{note}{body}", how_to_read=HOW_OFFSETS)


def head_norms(norms: HeadNorms, *, top: int = 12, title: str = "") -> Panel:
    """Norms by head of each matrix's largest subcomponents, as a coloured table.

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``top`` is below 1.
    """
    instance("norms", norms, HeadNorms)
    title = text_of("title", title)
    top = integer("top", top, minimum=1)
    table = norms.to_pandas()
    blocks = []
    for site, of_site in table.groupby("site", sort=False):
        rows = of_site.nlargest(top, "norm")
        columns = [c for c in rows.columns if c.startswith("head_") and rows[c].notna().all()]
        largest = float(rows[columns].replace(float("inf"), 0.0).max(axis=None))
        head = "".join(f"<th>{c.replace('_', ' ')}</th>" for c in columns)
        html = [_norm_row(row, columns, largest) for row in rows.to_dict("records")]
        blocks.append(
            f"<div><h4>{escape(str(site))}</h4><table><tr><th></th>{head}<th>norm</th><th>heads</th></tr>{''.join(html)}</table></div>"
        )
    title = title or f"Block {norms.layer}: subcomponents' norms by head"
    body = f'<h3>{escape(title)}</h3><div class="columns matrices">{"".join(blocks)}</div>'
    return Panel(title=title, body=body, how_to_read=HOW_NORMS)


def _norm_row(row: dict[Any, Any], columns: list[str], largest: float) -> str:
    cells = "".join(f'<td class="{shade(row[c] / largest if largest else 0.0)}">{number(row[c])}</td>' for c in columns)
    name = ":" + str(row["subcomponent"]).rpartition(":")[2]
    return f"<tr><td>{name}</td>{cells}<td>{number(row['norm'])}</td><td>{row['heads']:.1f}</td></tr>"
