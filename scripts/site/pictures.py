"""Photographs pages for the README and the gallery: ``python -m scripts.site.pictures``, or with names of pictures.

Writes docs/graph.png, demo.png, dashboard.png (of the bundled decomposition) and fact.png (of the figures that ship), each also
on a dark background as docs/…_dark.png, with a headless Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageChops

import tl_vpd
from tl_vpd import viz
from tl_vpd.analysis import Harvest, HarvestConfig, pick
from tl_vpd.fact.data import finished_figures
from tl_vpd.fact.page import fact_panels

DOCS = Path(__file__).parents[2] / "docs"


def pages(folder: Path) -> dict[str, tuple[Callable[[], Path], tuple[int, int]]]:
    """What writes each page and returns its path (perhaps with a #), and the window, by the picture's name."""
    return {
        "graph": (lambda: _graph(folder), (830, 660)),
        "demo": (lambda: _demo(folder), (830, 1600)),
        "dashboard": (lambda: _dashboard(folder), (1100, 1500)),
        "fact": (lambda: _fact(folder), (1000, 1600)),
    }


def _graph(folder: Path) -> Path:
    model, vpd = tl_vpd.bundled.model(), tl_vpd.Decomposition.bundled()
    graph = tl_vpd.attribution_graph(vpd, model, "foo(x)[0", targets=["]"])
    return viz.page([viz.graph(graph, nodes=80)], "How the bundled model closes a bracket", folder / "graph.html")


def _demo(folder: Path) -> Path:
    model, vpd = tl_vpd.bundled.model(), tl_vpd.Decomposition.bundled()
    harvest = tl_vpd.harvest(vpd, model, tl_vpd.bundled.tokens("validation"), config=HarvestConfig(windows=3))
    panels = [viz.subcomponent(harvest, address) for address in concentrated(harvest, 2)]
    return viz.page(panels, "Two subcomponents of the bundled model", folder / "demo.html")


def _dashboard(folder: Path) -> Path:
    """A subcomponent's page: of those that fire mostly at one word, the one that does so most."""
    model, vpd = tl_vpd.bundled.model(), tl_vpd.Decomposition.bundled()
    config = HarvestConfig(windows=4, samples=8, bins=20, lags=2)
    harvest = tl_vpd.harvest(vpd, model, tl_vpd.bundled.tokens("validation")[:128], config=config)
    (address,) = concentrated(harvest, 1)
    shown = viz.DashboardConfig(windows=4, samples=4, neighbours=6)
    viz.dashboard(vpd, model, harvest, folder / "dashboard", config=shown)
    return folder / "dashboard" / f"subcomponent.html#{address}"


def _fact(folder: Path) -> Path:
    panels = fact_panels(finished_figures())
    return viz.page([panels[0], panels[4], panels[5]], "A fact, erased and rewired", folder / "fact.html")


def concentrated(harvest: Harvest, n: int) -> list[str]:
    """Addresses of a sample of subcomponents: those whose firings are most at one token, each another word."""
    words: dict[str, tuple[float, str]] = {}
    for address in pick(harvest, 100, min_firings=60, max_density=0.03):
        token, recall = harvest[address].input_tokens()[["token", "recall"]].iloc[0]
        if token.strip().isalpha():
            words[token] = max(words.get(token, (0.0, "")), (float(recall), str(address)))
    return [address for _, address in sorted(words.values(), reverse=True)[:n]]


def photograph(page: str, picture: Path, size: tuple[int, int], *, dark: bool) -> None:
    """A page as a picture of 256 colours, twice as fine as the window, without the empty space below."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "neither chromium nor google-chrome is installed"
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-device-scale-factor=2",
        "--virtual-time-budget=15000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--window-size={size[0]},{size[1]}",
    ]
    subprocess.run([browser, *flags, f"--screenshot={picture}", page], check=True, capture_output=True)
    image = Image.open(picture).convert("RGB")
    box = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))).getbbox()
    bottom = min(image.height, box[3] + 32) if box else image.height
    image.crop((0, 0, image.width, bottom)).quantize(256).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with tempfile.TemporaryDirectory() as place:
        made = pages(Path(place))
        parser.add_argument("names", nargs="*", choices=[*made, []], help="pictures (none: all)")
        for name in parser.parse_args().names or made:
            write, size = made[name]
            folder, _, fragment = str(write()).partition("#")
            address = Path(folder).as_uri() + (f"#{fragment}" if fragment else "")
            for dark in (False, True):
                photograph(address, DOCS / f"{name}{'_dark' if dark else ''}.png", size, dark=dark)


if __name__ == "__main__":
    main()
