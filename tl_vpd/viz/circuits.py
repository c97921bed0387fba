"""circuitsvis without its network: its script inlined once, and windows of text shown with ``ColoredTokens``.

circuitsvis colours the background and has no underline, no second value and no escaping (it writes tokens as HTML).
So tokens are escaped first, and when circuitsvis has rendered a window, ``tlVpdDraw`` adds to its token
elements the underline, the frame of the peak and a tooltip of both values. Until the script has run, and wherever
scripts are not allowed, the window is plain text.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import circuitsvis

from tl_vpd.analysis import Window
from tl_vpd.viz.style import AMBER
from tl_vpd.viz.text import escape, for_script, not_drawn, number, spaced

FAINT = 0.05
"""Activations below this share of the scale get no underline."""

_DRAW = """
window.tlVpdDraw = function (windows) {
  for (const [key, w] of Object.entries(windows)) {
    // The same window may be on a page more than once, and circuitsvis needs an id.
    for (const place of document.querySelectorAll('[data-tlvpd="' + key + '"]:not([id])')) {
      place.id = "tlvpd-" + key + "-" + Math.random().toString(36).slice(2);
      const finish = function () {
        const spans = place.querySelectorAll(".colored-tokens > span > span");
        if (spans.length !== w.tokens.length) return;
        observer.disconnect();
        spans.forEach(function (span, i) {
          // On the page's own background, light or dark; circuitsvis mixes with white.
          span.style.backgroundColor = "rgba(AMBER, " + w.values[i] + ")";
          if (w.values[i] > .5) span.classList.add("strong");
          if (w.underline[i]) span.style.boxShadow = "inset 0 -3px " + w.underline[i];
          if (i === w.peak) span.classList.add("peak");
          span.dataset.about = w.about[i];
          span.addEventListener("mouseenter", function () {
            const middle = place.getBoundingClientRect().left + place.clientWidth / 2;
            span.classList.toggle("right", span.getBoundingClientRect().left > middle);
          });
        });
      };
      const observer = new MutationObserver(finish);
      observer.observe(place, { childList: true, subtree: true });
      CircuitsVis.render(place.id, CircuitsVis.ColoredTokens, {
        tokens: w.tokens, values: w.values, minValue: 0, maxValue: 1, positiveColor: w.color, paddingBottom: 0
      });
    }
  }
};
"""


@lru_cache(maxsize=1)
def library() -> str:
    """The script (1.3 MB) that windows need before them: circuitsvis's and ``tlVpdDraw``.

    Raises:
        ImportError: this version of circuitsvis has its script elsewhere.
    """
    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    if not path.is_file():
        raise ImportError(f"circuitsvis {circuitsvis.__version__} has no dist/cdn/iife.js; install circuitsvis 1.43.3.")
    code = path.read_text(encoding="utf-8").replace("</script", "<\\/script")
    code = code.rpartition("//# sourceMappingURL=")[0] or code
    return f"{code}\n{_DRAW.replace('AMBER', AMBER)}"


def underline(activation: float, scale: float) -> str:
    """The CSS colour under a token: hue by sign, strength by ``|activation| / scale``; none where that is tiny.

    The hues are variables of the style sheet, which differ in light and dark.
    """
    share = min(abs(activation) / scale, 1.0) if scale > 0 else 0.0
    if not share >= FAINT:  # NaN has none
        return ""
    colour = "positive" if activation > 0 else "negative"
    return f"color-mix(in srgb, var(--{colour}) {round(100 * share)}%, transparent)"


def window_data(window: Window, scale: float) -> dict[str, Any]:
    """What ``tlVpdDraw`` gets of a window; ``scale`` is the activation of the strongest underline."""
    g, a = window.importances.tolist(), window.activations.tolist()
    about = [
        f"{spaced(token)}\nimportance {number(importance)}\nactivation {number(activation)}"
        for token, importance, activation in zip(window.tokens, g, a, strict=True)
    ]
    return {
        "tokens": [escape(spaced(token)) for token in window.tokens],
        "values": [round(value, 4) if math.isfinite(value) else 0.0 for value in g],
        "underline": [underline(value, scale) for value in a],
        "about": about,
        "peak": window.peak,
        "color": f"rgb({AMBER})",
    }


def scale_of(windows: list[Window]) -> float:
    """The activation of the strongest underline: the largest that is a finite number."""
    return max((float(w.activations.abs().nan_to_num(0.0, 0.0).max()) for w in windows), default=0.0)


def note_of(windows: list[Window]) -> str:
    """What is said of numbers of windows that cannot be drawn."""
    return not_drawn(sum(int((~x.isfinite()).sum()) for w in windows for x in (w.importances, w.activations)))


def draw(windows: list[Window], scale: float) -> tuple[list[str], str]:
    """The elements of windows, and the script that draws them, which has to come after them all."""
    places, data = [], {}
    for window in windows:
        content = window_data(window, scale)
        key = hashlib.sha256(for_script(content).encode()).hexdigest()[:16]
        data[key] = content
        texts = [escape(spaced(token)) for token in window.tokens]
        texts[window.peak] = f"<mark>{texts[window.peak]}</mark>"
        places.append(f'<div class="text" data-tlvpd="{key}">{"".join(texts)}</div>')
    return places, f"tlVpdDraw({for_script(data)})"
