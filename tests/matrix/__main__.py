"""``python -m tests.matrix --out build/matrix/3.9.json``: runs every cell for the installed TransformerLens."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from tests.matrix.cells import cells, run, version_here


def say(text: str) -> None:
    """A line of progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Runs the cells; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix")
    parser.add_argument("--out", default="build/matrix/{version}.json")
    for axis in ("family", "kind", "flag"):
        parser.add_argument(f"--{axis}", action="append", help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [
        c
        for c in cells()
        if all(not (o := getattr(options, a)) or getattr(c, a) in o for a in ("family", "kind", "flag"))
    ]
    results, began = [], time.monotonic()
    for i, cell in enumerate(chosen):
        if i % 50 == 0:
            say(f"{i} of {len(chosen)} cells, {time.monotonic() - began:.0f} s")
        result = run(cell)
        results.append(result)
        if result.status == "failed":
            say(f"{cell}: failed\n{result.message}")
    counts = Counter(r.status for r in results)
    say(f"TransformerLens {version_here()}: {dict(counts)} in {time.monotonic() - began:.0f} s")
    out = Path(options.out.format(version=version_here()))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"version": version_here(), "cells": [r.as_dict() for r in results]}, indent=1) + "\n")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
