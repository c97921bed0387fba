"""Harvest at scale: its time over that of the model's and Γ's own passes, and its memory. Writes ``harvest.json``.

    python -m benchmarks.harvest                                  # 32,768 tokens of the bundled text
    python -m benchmarks.harvest --tokens 1000000 --minutes 12    # a million; call it again until all kinds are there

Training text is read from a memory-mapped file (again and again, where more is asked for) by the bundled model. Each kind of
harvest is timed beside the passes alone, in the processor's seconds, which other work on the machine changes little;
``beyond`` is what the harvest takes in addition, per million tokens. ``peak_mb`` is the most memory of the whole process, library
and model included, during that harvest. The record has one entry for every number of tokens; with ``--minutes``, kinds that it
has stay, and no further one begins after that time.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tl_vpd
from benchmarks import harness
from tl_vpd.analysis import HarvestConfig, harvest
from tl_vpd.forward import MaskedModel

KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "windows and tokens": ({}, False),
    "and samples, histograms": ({"samples": 8, "bins": 20}, False),
    "and pairs at lags 0 to 2": ({"samples": 8, "bins": 20, "lags": 2}, False),
    "and columns on the disk": ({"samples": 8, "bins": 20, "lags": 2}, True),
    "all in 400 MB": ({"samples": 8, "bins": 20, "lags": 2, "memory": 400_000_000}, True),
}


def rows_on_disk(n: int, folder: Path) -> np.ndarray:
    """A memory-mapped array of at least ``n`` tokens."""
    tokens = tl_vpd.bundled.tokens("training").numpy()
    copies = np.resize(tokens, (-(-n // tokens.shape[1]), tokens.shape[1]))
    np.save(folder / "tokens.npy", copies.astype(np.uint16))
    return np.load(folder / "tokens.npy", mmap_mode="r")


@torch.no_grad()
def passes(model: Any, vpd: tl_vpd.Decomposition, rows: np.ndarray) -> None:
    """The model and Γ alone."""
    with MaskedModel(vpd, model) as masked_model:
        for start in range(0, len(rows), 32):
            tokens = torch.from_numpy(rows[start : start + 32].astype(np.int64))
            vpd.importances(masked_model.clean(tokens)[1])


def timed(function: Callable[[], object]) -> dict[str, float]:
    """Seconds and the peak of memory of a call."""
    harness.restart_peak()
    clock, processor = time.perf_counter(), time.process_time()
    function()
    seconds = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}
    return {**{name: round(value, 1) for name, value in seconds.items()}, "peak_mb": round(harness.peak_mb())}


def measured(model: Any, vpd: tl_vpd.Decomposition, rows: np.ndarray, kind: str, alone: float) -> dict[str, float]:
    """One kind of harvest, beside the seconds of the passes alone."""
    config, on_disk = KINDS[kind]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "harvest" if on_disk else None
        figures = timed(lambda: harvest(vpd, model, rows, config=HarvestConfig(**config), folder=folder))
        figures["ratio"] = round(figures["cpu_seconds"] / alone, 2)
        figures["beyond_minutes_per_million"] = round((figures["cpu_seconds"] - alone) / 60 * 1e6 / rows.size, 1)
        if folder is not None:
            figures["disk_mb"] = round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6)
    return figures


def main() -> None:
    """Runs and writes."""
    parser = harness.parser("harvest", __doc__)
    parser.add_argument("--tokens", type=int, default=32_768, help="how many")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this one; may be repeated")
    parser.add_argument("--minutes", type=float, help="go on with the record, for about as long")
    options = parser.parse_args()
    until = time.monotonic() + 60 * (options.minutes or float("inf"))
    model, vpd = tl_vpd.bundled.model(), tl_vpd.bundled.decomposition()
    extra = "" if options.tokens == parser.get_default("tokens") else f" --tokens {options.tokens}"
    record = harness.read(options.out)
    with tempfile.TemporaryDirectory() as temporary:
        rows = rows_on_disk(options.tokens, Path(temporary))
        passes(model, vpd, rows[:64])
        entry: dict[str, Any] = record.get(str(options.tokens), {}) if options.minutes else {}
        if not entry:
            entry = {"tokens": rows.size, "subcomponents": vpd.site_axis.total, "load": round(os.getloadavg()[0], 1)}
            entry["passes"] = timed(lambda: passes(model, vpd, rows))
        for kind in options.kind or KINDS:
            if kind not in entry and time.monotonic() < until:
                entry[kind] = measured(model, vpd, rows, kind, entry["passes"]["cpu_seconds"])
                print(kind, entry[kind], flush=True)
            record[str(options.tokens)] = entry
            harness.write(options.out, record, f"harvest{extra}")


if __name__ == "__main__":
    main()
