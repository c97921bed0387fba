"""A picture of one subcomponent: its norm, where it fires, at which tokens, and what follows."""

from __future__ import annotations

import pandas as pd

from tl_vpd.analysis import Harvest, SubcomponentHarvest
from tl_vpd.checks import integer, text_of
from tl_vpd.site import Subcomponent
from tl_vpd.viz.circuits import draw, library, note_of, scale_of
from tl_vpd.viz.panel import Panel
from tl_vpd.viz.text import escape, number, visible

HOW = (
    "A subcomponent is one rank-one piece of a weight matrix. Its causal importance at a token says whether the "
    "piece could be removed there without changing what the model predicts: 1 means it is needed, 0 that it is not. "
    "Importances are an estimate, made by a network trained together with the pieces.\n\n"
    "Each line of text is cut around the token, framed, where the importance is largest; no two lines come from one "
    "row of the data. Background: importance. Underline: activation, the strength and sign with which the piece "
    "writes into the model at that token; the strongest colour is the largest activation shown in the panel. Hover "
    "over a token for both numbers. Line breaks are shown as ⏎, spaces in the tables as dots (·×8: eight of them).\n\n"
    "Tokens in the tables: recall is the share of the piece's firings that falls on the token (or is followed by "
    "it); PMI, in nats, is how much more often the two meet than by chance. Tokens met only once are left out. The "
    "windows are the strongest cases, not typical ones."
)

_LEGEND = (
    '<div class="legend"><span>importance 0<i class="ramp"></i>1</span>'
    '<span>activation<i class="line positive"></i>positive'
    '<i class="line negative"></i>negative, up to {scale}</span>'
    '<span><i class="peak"></i>largest importance</span></div>'
)


def subcomponent(
    harvest: Harvest,
    address: str | Subcomponent,
    *,
    note: str = "",
    windows: int | None = None,
    tokens: int = 8,
) -> Panel:
    """One subcomponent of a harvest as a panel.

    Args:
        harvest: with this subcomponent.
        address: ``site:index``.
        note: plain text under the heading, such as a label.
        windows: how many windows of text are shown (None: all that were harvested).
        tokens: rows of each token table.

    Raises:
        KeyError: there is no such site, or the subcomponent was not harvested.
        IndexError: the site has no such subcomponent.
        ValueError: ``windows`` or ``tokens`` is below 0.
        TypeError: ``harvest`` is not a Harvest, or another argument is of another type.
    """
    if not isinstance(harvest, Harvest):
        raise TypeError(f"A Harvest is needed, as harvest(vpd, model, tokens) gives; got a {type(harvest).__name__}.")
    windows = None if windows is None else integer("windows", windows, minimum=0)
    tokens, note = integer("tokens", tokens, minimum=0), text_of("note", note)
    record = harvest[address]
    shown = list(record.windows[:windows])
    scale = scale_of(shown)
    places, script = draw(shown, scale)
    rows = [
        f'<div class="window"><div class="where">row {w.row}, token {w.pos}<br>importance '
        f"{number(float(w.importances[w.peak]))}</div>{place}</div>"
        for w, place in zip(shown, places, strict=True)
    ]
    nothing = f'<p class="note">Its importance exceeds {harvest.threshold:g} at no token of this data.</p>'
    text = _LEGEND.format(scale=number(scale)) + "".join(rows) + note_of(shown) if record.windows else nothing
    body = (
        f"<h3><code>{escape(str(record.subcomponent))}</code></h3>{_facts(record, harvest)}"
        f"{f'<p>{escape(note)}</p>' if note else ''}{text}{_token_tables(record, tokens)}"
    )
    libraries, scripts = ((library(),), (script,)) if shown else ((), ())
    return Panel(str(record.subcomponent), body, HOW, libraries, scripts)


def _facts(record: SubcomponentHarvest, harvest: Harvest) -> str:
    facts = {
        "g > 0 at": f"{record.density:.2%} of tokens",
        f"fires (g > {harvest.threshold:g})": f"{record.firings:,} times",
        "mean importance": number(record.mean_importance),
        "mean activation when firing": number(record.mean_activation),
        "norm": number(record.norm),
    }
    return f'<div class="facts">{"".join(f"<span>{escape(k)} <b>{v}</b></span>" for k, v in facts.items())}</div>'


def _token_tables(record: SubcomponentHarvest, k: int) -> str:
    if not k or not record.windows:
        return ""
    tables = [
        _token_table(f"{name}, by {'PMI' if by == 'pmi' else by}", tokens(k, by=by), by)
        for name, tokens in (("Fires at", record.input_tokens), ("Next token", record.output_tokens))
        for by in ("pmi", "recall")
    ]
    return f'<div class="columns">{"".join(tables)}</div>'


def _token_table(heading: str, table: pd.DataFrame, by: str) -> str:
    shown = number if by == "pmi" else "{:.0%}".format
    rows = [
        f'<tr><td><span class="tok">{escape(visible(token))}</span></td><td>{shown(value)}</td><td>{count:,}</td></tr>'
        for token, value, count in zip(table["token"], table[by], table["count"], strict=True)
    ]
    head = f"<tr><th>token</th><th>{'PMI' if by == 'pmi' else by}</th><th>times</th></tr>"
    inside = f"<table>{head}{''.join(rows)}</table>" if rows else '<p class="note">No token was met twice.</p>'
    return f"<div><h4>{heading}</h4>{inside}</div>"
