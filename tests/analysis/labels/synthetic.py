"""Firings by rules that everyone can check: at a token, after a token, before a token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tl_vpd.analysis.labels import Firings

N_ROWS, N_POS, VOCABULARY = 60, 40, 30


def text(seed: int = 0) -> np.ndarray:
    """Rows of random tokens."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (N_ROWS, N_POS))


def firings_where(tokens: np.ndarray, where: Mapping[str, np.ndarray], real: np.ndarray | None = None) -> Firings:
    """Firings at the tokens where each address is True, with importances that rise over the rows and activations of −2.

    Args:
        tokens: the rows.
        where: by address.
        real: False at padding.
    """
    real = np.ones(tokens.shape, dtype=bool) if real is None else real
    at = [(fires & real).reshape(-1).nonzero()[0] for fires in where.values()]
    ends = np.cumsum([0, *map(len, at)])
    g = np.concatenate([np.linspace(0.2, 1.0, len(a), dtype=np.float32) for a in at])
    names = {i: f" w{i}" for i in range(int(tokens.max()) + 1)}
    return Firings(
        tuple(where), ends, np.concatenate(at), g, np.full(len(g), -2.0, dtype=np.float32), tokens, real, names, 0.1
    )


def ruled(seed: int = 0) -> Firings:
    """Twelve addresses: four fire at one of two tokens, four after a token, four before one."""
    tokens = text(seed)
    before, after = np.roll(tokens, 1, 1), np.roll(tokens, -1, 1)
    before[:, 0] = after[:, -1] = -1
    rules = [np.isin(tokens, [2 * i, 2 * i + 1]) for i in range(4)]
    rules += [np.isin(before, [2 * i + 8, 2 * i + 9]) for i in range(4)]
    rules += [np.isin(after, [2 * i + 16, 2 * i + 17]) for i in range(4)]
    return firings_where(tokens, {f"blocks.{i % 2}.mlp.W_in:{i}": rule for i, rule in enumerate(rules)})
