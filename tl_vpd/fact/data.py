"""The texts of the run and its result, which ship: rows of tokens for SmolLM2, each opened by BOS.

``scripts/bundled/fact_texts.py`` made the texts: source files and documentation of Python's standard library (PSF licence),
licences of installed packages, what the model itself writes at temperature 1, and, for training alone, sentences about 25 other
capitals. No row of ``other_text`` is among the training rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor

from tl_vpd.decomposition import Decomposition

FOLDER = Path(__file__).parent.parent / "bundled" / "fact"


def training_rows() -> Int[Tensor, "row pos"]:
    """The rows of the non-target stream."""
    return load_file(FOLDER / "texts.safetensors")["training"].long()


def other_text(rows: int | None = None) -> dict[str, Int[Tensor, "row pos"]]:
    """Text that was not trained on, by kind.

    Args:
        rows: of each kind (None: all 160 of 32 tokens).
    """
    texts = load_file(FOLDER / "texts.safetensors")
    return {kind: tokens[:rows].long() for kind, tokens in texts.items() if kind != "training"}


def finished() -> Decomposition:
    """The decomposition that ships: only what the prompts use."""
    return Decomposition.load(FOLDER / "decomposition")


def finished_figures() -> dict[str, Any]:
    """What was measured of it."""
    figures: dict[str, Any] = json.loads((FOLDER / "figures.json").read_text(encoding="utf8"))
    return figures
