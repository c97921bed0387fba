"""The style of panels and pages. Every rule is under ``.tlvpd``, so that a notebook's style does not change."""

from __future__ import annotations

AMBER = "255, 190, 70"
"""Red, green and blue of the background of a token of importance 1; importance is the share of it on the page's background."""
POSITIVE, NEGATIVE = "#1f5fd0", "#c2185b"
"""Underline of positive and negative activations."""
SERIES = ("#1f5fd0", "#c96f00", "#168a5b", "#c2185b", "#7b4bc4", "#5c6775", "#0f8b9d", "#9a6b00")
"""Colours of lines and bars, each at least 3 : 1 on white and, as pages show them, on their dark cards."""
MODES = {"rounded": SERIES[0], "adversarial": SERIES[1], "stochastic": SERIES[2]}
"""Colours of ways to mask."""

SHADES = 50
"""Steps from white to the strongest background of a number in a table."""


def shade(share: float) -> str:
    """The class of a table cell whose number is this share of the largest (no shade where it is not a number)."""
    return f"shade-{round(SHADES * min(max(share, 0.0), 1.0))}" if share == share else ""


def _shade_rule(i: int) -> str:
    """Black or white text, whichever stands out by 4.5 : 1 or more."""
    ink = "#fff" if i > 0.86 * SHADES else "#000" if i > 0.3 * SHADES else "inherit"
    return f".tlvpd td.shade-{i} {{ background: rgba(31, 95, 208, {i / SHADES:.2f}); color: {ink}; }}\n"


_SHADES = "".join(_shade_rule(i) for i in range(SHADES + 1))

PANEL = f"""
.tlvpd {{ --ink: #1d2430; --soft: #566072; --card: #fff; --line: #e0e4ea; --chip: #f1f3f6; --positive: {POSITIVE};
  --negative: {NEGATIVE}; --passed: #2e7d32; }}
.tlvpd {{ font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 22px;
  margin: 0 0 22px; max-width: 1080px; box-sizing: border-box; }}
.tlvpd code, .tlvpd .tok, .tlvpd .text {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
.tlvpd h3 {{ font-size: 17px; margin: 0 0 4px; font-weight: 650; overflow-wrap: anywhere; }}
.tlvpd h4 {{ font-size: 12px; margin: 0 0 4px; font-weight: 650; color: var(--soft); }}
.tlvpd p {{ margin: 4px 0; }}
.tlvpd .facts {{ display: flex; flex-wrap: wrap; gap: 2px 22px; margin: 2px 0 10px; color: var(--soft);
  font-size: 13.5px; }}
.tlvpd .facts b {{ color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }}
.tlvpd .note {{ color: var(--soft); font-size: 13.5px; overflow-wrap: anywhere; }}
.tlvpd .how {{ color: var(--soft); font-size: 13.5px; margin-top: 12px; }}
.tlvpd .how summary {{ cursor: pointer; }}
.tlvpd .legend {{ display: flex; flex-wrap: wrap; gap: 4px 18px; align-items: center; font-size: 12.5px; color: var(--soft);
  margin: 0 0 8px; }}
.tlvpd .legend i {{ display: inline-block; vertical-align: -2px; margin: 0 5px; }}
.tlvpd .legend .ramp {{ width: 64px; height: 12px; border: 1px solid var(--line);
  background: linear-gradient(90deg, var(--card), rgb({AMBER})); }}
.tlvpd .legend .line {{ width: 22px; height: 3px; vertical-align: 3px; }}
.tlvpd .legend .positive {{ background: var(--positive); }}
.tlvpd .legend .negative {{ background: var(--negative); }}
.tlvpd .legend .dashed {{ background: repeating-linear-gradient(90deg, var(--negative) 0 5px, transparent 5px 8px); }}
.tlvpd .legend .peak {{ width: 14px; height: 12px; box-shadow: inset 0 0 0 1.5px var(--ink); }}
.tlvpd .legend svg {{ vertical-align: -1px; margin: 0 5px 0 0; }}
.tlvpd .window {{ display: grid; grid-template-columns: 118px 1fr; gap: 10px; padding: 7px 0;
  border-top: 1px solid var(--line); }}
.tlvpd .where {{ font-size: 12px; line-height: 1.35; color: var(--soft); padding-top: 2px;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
.tlvpd .text {{ font-size: 13px; line-height: 2.15; overflow-wrap: anywhere; min-width: 0; }}
.tlvpd .text mark {{ background: rgb({AMBER}); color: #1d2430; }}
.tlvpd .text .colored-tokens {{ padding: 0 0 0 1px !important; }}
.tlvpd .text .colored-tokens > div {{ display: none !important; }}
.tlvpd .text .colored-tokens > span > span {{ position: relative; color: inherit !important; padding: 3px 0 7px !important;
  border-color: transparent !important; }}
.tlvpd .text .colored-tokens > span > span.strong {{ color: #000 !important; }}
.tlvpd .text .peak {{ outline: 1.5px solid var(--ink); outline-offset: -1px; z-index: 1; }}
.tlvpd .text [data-about]:hover {{ z-index: 10; }}
.tlvpd .text [data-about]:hover::after {{ content: attr(data-about); position: absolute; left: 0; top: 100%;
  margin-top: 3px; white-space: pre; background: #1d2430; color: #fff; padding: 5px 8px; border-radius: 5px;
  border: 1px solid #566072;
  font: 12px/1.45 system-ui, sans-serif; pointer-events: none; }}
.tlvpd .text .right[data-about]::after {{ left: auto; right: 0; }}
.tlvpd .columns {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 14px 22px;
  margin-top: 14px; padding-top: 12px; border-top: 1px solid var(--line); }}
.tlvpd .columns.matrices {{ border: 0; margin: 0; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); }}
.tlvpd .wide {{ overflow-x: auto; }}
.tlvpd table {{ border-collapse: collapse; font-size: 13px; border: 0; margin: 0; color: inherit; background: none; }}
.tlvpd .columns table {{ width: 100%; }}
.tlvpd th, .tlvpd td {{ padding: 2px 12px 2px 0; text-align: right; border: 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; background: none; }}
.tlvpd th {{ font-weight: 500; color: var(--soft); }}
.tlvpd th {{ white-space: normal; vertical-align: bottom; }}
.tlvpd td:first-child, .tlvpd th:first-child {{ text-align: left; }}
.tlvpd td[class^=shade] {{ padding: 2px 8px; }}
.tlvpd td[class^=shade] + td:not([class]) {{ padding-left: 8px; }}
.tlvpd td:last-child, .tlvpd th:last-child {{ padding-right: 2px; }}
.tlvpd td.words, .tlvpd th.words {{ text-align: left; }}
.tlvpd td.sentence {{ white-space: normal; min-width: 14em; }}
.tlvpd .fault {{ color: var(--negative); }}
.tlvpd .passed {{ color: var(--passed); }}
.tlvpd input[type=range] {{ width: 260px; vertical-align: middle; }}
.tlvpd td .tok {{ background: var(--chip); border-radius: 3px; padding: 0 4px; white-space: normal; overflow-wrap: anywhere; }}
.tlvpd .plot > svg {{ width: 100%; height: auto; display: block; }}
.tlvpd .plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 14px 18px; }}
.tlvpd .plots .plot > svg {{ max-width: 480px; }}
.tlvpd [data-tlvpd-heads] h2 {{ display: none; }}
.tlvpd [data-tlvpd-heads] h4 {{ position: static !important; background: none !important; color: inherit !important; }}
.tlvpd button, .tlvpd input[type=search] {{ font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 7px; padding: 2px 9px; min-height: 28px; max-width: 100%;
  box-sizing: border-box; }}
.tlvpd button {{ cursor: pointer; }}
.tlvpd :focus-visible {{ outline: 2px solid var(--positive); outline-offset: 1px; }}
.tlvpd .graph {{ position: relative; }}
.tlvpd .graph svg {{ display: block; cursor: grab; touch-action: pan-y; user-select: none; -webkit-user-select: none; }}
.tlvpd .graph circle {{ cursor: pointer; }}
.tlvpd .tip {{ position: absolute; z-index: 5; margin: 0; padding: 6px 9px; border-radius: 5px; background: #1d2430; color: #fff;
  border: 1px solid #566072;
  font: 12px/1.4 system-ui, sans-serif; white-space: pre-wrap; overflow-wrap: anywhere; max-width: min(340px, 100%);
  box-sizing: border-box; pointer-events: none; }}
{_SHADES}"""

PAGE = """
html { background: #f5f6f8; }
body { margin: 0 auto; padding: 34px 20px 60px; max-width: 1080px; background: #f5f6f8; color: #1d2430;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
body > header h1 { font-size: 27px; line-height: 1.2; margin: 0 0 8px; font-weight: 680; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
body > header p { max-width: 78ch; margin: 0 0 10px; }
body > .explanation { color: #566072; font-size: 14px; margin: 0 0 14px; padding: 0 23px; }
body > .explanation summary { cursor: pointer; }
body > .explanation div { columns: 2 380px; column-gap: 34px; }
body > .explanation p { margin: 0 0 8px; }
body > nav { margin: 18px 0 24px; font-size: 13.5px; columns: 3 240px; column-gap: 24px; }
body > nav a { display: block; color: #1f5fd0; text-decoration: none; padding: 1px 0; overflow-wrap: anywhere; }
body > nav a:hover { text-decoration: underline; }
@media (max-width: 560px) { body { padding: 16px 10px 40px; } body > header h1 { font-size: 21px; }
  .tlvpd { padding: 12px; } .tlvpd td.words { white-space: normal; } .tlvpd td.sentence { min-width: 9em; }
  .tlvpd th, .tlvpd td { padding-right: 8px; } .tlvpd .window { grid-template-columns: 1fr; gap: 0; }
  .tlvpd .columns.matrices { grid-template-columns: 1fr; } }
@media screen and (prefers-color-scheme: dark) {
  html, body { background: #14171c; color: #e6e9ef; color-scheme: dark; }
  body > .explanation { color: #a3adbd; }
  body > nav a { color: #8ab4ff; }
  .tlvpd { --ink: #e6e9ef; --soft: #a3adbd; --card: #1c2027; --line: #323945; --chip: #2a303a; --positive: #78aaff;
    --negative: #ff78aa; --passed: #81c784; }
  .tlvpd .text, .tlvpd td[class^=shade] { color: #fff; }
  .tlvpd [data-tlvpd-heads] { background: #fff; color: #1d2430; border-radius: 6px; padding: 8px; }
  .tlvpd .plot > svg, .tlvpd .legend svg { filter: invert(.9) hue-rotate(180deg); } }
@media print { html, body { background: #fff; } .tlvpd { break-inside: avoid; } }
"""
