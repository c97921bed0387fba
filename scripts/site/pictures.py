"""Photographs pages of the bundled decomposition for the README and the gallery: ``python -m scripts.site.pictures``.

Writes docs/graph.png and docs/demo.png with a headless Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

import tl_vpd
from tl_vpd import viz
from tl_vpd.analysis import Harvest, HarvestConfig, pick
from tl_vpd.viz.panel import Panel

DOCS = Path(__file__).parents[2] / "docs"


def pictures() -> dict[str, tuple[list[Panel], str, tuple[int, int]]]:
    """Panels, title and window of each page, by the picture's name."""
    model, vpd = tl_vpd.bundled.model(), tl_vpd.Decomposition.bundled()
    graph = tl_vpd.attribution_graph(vpd, model, "foo(x)[0", targets=["]"])
    harvest = tl_vpd.harvest(vpd, model, tl_vpd.bundled.tokens("validation"), config=HarvestConfig(windows=3))
    panels = [viz.subcomponent(harvest, address) for address in concentrated(harvest, 2)]
    return {
        "graph": ([viz.graph(graph, nodes=80)], "How the bundled model closes a bracket", (830, 620)),
        "demo": (panels, "Two subcomponents of the bundled model", (830, 1600)),
    }


def concentrated(harvest: Harvest, n: int) -> list[str]:
    """Addresses of a sample of subcomponents: those whose firings are most at one token, each another word."""
    words: dict[str, tuple[float, str]] = {}
    for address in pick(harvest, 100, min_firings=60, max_density=0.03):
        token, recall = harvest[address].input_tokens()[["token", "recall"]].iloc[0]
        if token.strip().isalpha():
            words[token] = max(words.get(token, (0.0, "")), (float(recall), str(address)))
    return [address for _, address in sorted(words.values(), reverse=True)[:n]]


def photograph(page: Path, picture: Path, size: tuple[int, int]) -> None:
    """A page as a picture of 256 colours, twice as fine as the window, without the empty space below."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "neither chromium nor google-chrome is installed"
    window = f"--window-size={size[0]},{size[1]}"
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-device-scale-factor=2",
        "--virtual-time-budget=15000",
        window,
    ]
    subprocess.run([browser, *flags, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True)
    image = Image.open(picture).convert("RGB")
    box = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))).getbbox()
    bottom = min(image.height, box[3] + 32) if box else image.height
    image.crop((0, 0, image.width, bottom)).quantize(256).save(picture, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, (panels, title, size) in pictures().items():
            page = viz.page(panels, title, Path(folder) / f"{name}.html")
            photograph(page, DOCS / f"{name}.png", size)


if __name__ == "__main__":
    main()
