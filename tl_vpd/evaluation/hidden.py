"""Hidden-activation and attention-pattern error: is the masked model right for the right reason?

Under rounded masks (``g > θ``, Δ 0, errors propagating): for the output of each site and for the residual stream after each
block, the share of variance over tokens that the masked model does not explain; for each attention layer, the distance
of its patterns:

    error = Σ_t ‖y'(t) − y(t)‖² / Σ_t ‖y(t) − ȳ‖²      0: the same; 1: no better than always the mean
    KL    = mean over rows, heads and queries of Σ_k p(k) (log p(k) − log p'(k))

    >>> hidden_errors(sample)                                  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.checks import check_threshold
from tl_vpd.evaluation.batch import Batch
from tl_vpd.evaluation.modes import rounded
from tl_vpd.evaluation.sample import Sample, measure
from tl_vpd.forward import SitePass
from tl_vpd.masking import Masks


class Unexplained:
    """Sums over tokens from which the unexplained share of variance follows, in float64."""

    def __init__(self) -> None:
        self.error = self.square = 0.0
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, target: Float[Tensor, "token d"], masked: Float[Tensor, "token d"]) -> None:
        """Adds tokens to the sums."""
        target, masked = target.double(), masked.double()
        self.error += float((masked - target).square().sum())
        self.square += float(target.square().sum())
        total = target.sum(0)
        self.total = total if self.total is None else self.total + total
        self.tokens += len(target)

    @property
    def fraction(self) -> float:
        """``Σ ‖y' − y‖² / Σ ‖y − ȳ‖²`` (NaN where y never varies)."""
        assert self.total is not None, "no tokens were added"
        variance = self.square - float(self.total.square().sum()) / self.tokens
        return self.error / variance if variance > 1e-12 * max(self.square, 1e-300) else float("nan")


def pattern_kl(
    target: Float[Tensor, "batch head query key"],
    masked: Float[Tensor, "batch head query key"],
    token_mask: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, " head"]:
    """KL(target ‖ masked) of attention patterns by head, averaged over rows and real queries; keys without attention count 0."""
    p, q = target.double(), masked.double()
    tiny = torch.finfo(target.dtype).tiny
    kl = torch.special.xlogy(p, p / q.clamp_min(tiny)).sum(-1)
    if token_mask is None:
        return kl.mean((0, 2))
    weights = token_mask[:, None].to(kl)
    return (kl * weights).sum((0, 2)) / weights.sum((0, 2))


@measure
def hidden_errors(sample: Sample, *, threshold: float = 0.0) -> pd.DataFrame:
    """A row for each site (its output), block (the residual stream after it) and attention layer (its patterns).

    Columns: ``kind`` (site, residual, pattern), ``error`` (unexplained share of variance; of patterns the KL in nats).

    Args:
        sample: the rows.
        threshold: θ.
    """
    points = _points(sample)
    masks = rounded(sample, check_threshold(threshold))
    sums: dict[str, Unexplained] = {}
    patterns: dict[str, list[Tensor]] = {}
    n_tokens: list[int] = []
    for batch in sample.batches():
        clean = _activations(sample, batch, None, points)
        masked = _activations(sample, batch, masks(batch), points)
        n_tokens.append(batch.n_tokens)
        for name, target in clean.items():
            if points.get(name) == "pattern":
                patterns.setdefault(name, []).append(pattern_kl(target, masked[name], batch.rows.token_mask))
            else:
                flat = (t.reshape(*batch.real.shape, -1)[batch.real] for t in (target, masked[name]))
                sums.setdefault(name, Unexplained()).add(*flat)
    rows: list[dict[str, Any]] = [
        {"what": name, "kind": points.get(name, "site"), "error": total.fraction} for name, total in sums.items()
    ]
    weights = torch.tensor(n_tokens, dtype=torch.float64)
    for name, by_batch in patterns.items():
        error = torch.stack(by_batch).mean(1).cpu() @ weights / weights.sum()
        rows.append({"what": name, "kind": "pattern", "error": float(error)})
    return pd.DataFrame(rows).set_index("what")


def _points(sample: Sample) -> dict[str, str]:
    """HookPoints of the residual stream after each decomposed block and of its attention patterns -> kind."""
    sites = sample.masked_model.weights.sites.values()
    layers = sorted({s.layer for s in sites if s.layer is not None and s.home != s.name})
    points = {f"blocks.{n}.hook_resid_post": "residual" for n in layers}
    points |= {f"blocks.{n}.attn.hook_pattern": "pattern" for n in layers}
    model: Any = sample.masked_model.model
    return {name: kind for name, kind in points.items() if name in model.hook_dict}


def _activations(sample: Sample, batch: Batch, masks: Masks | None, points: Mapping[str, str]) -> dict[str, Tensor]:
    """Every site's output and the values at ``points`` in one pass of a batch, clean or masked."""
    masked_model = sample.masked_model
    model: Any = masked_model.model
    values: dict[str, Tensor] = {}

    def write(name: str, x: Tensor, y: Tensor) -> Tensor | None:
        output = None if masks is None else masked_model.product(name, x, y).masked(masks[name])
        values[name] = y if output is None else output
        return output

    def note(name: str, value: Tensor, hook: Any) -> None:
        values[name] = value  # under this name: a bridge's hook may have another one

    with model.hooks(fwd_hooks=[(name, partial(note, name)) for name in points]):
        masked_model.run(batch.rows.tokens, SitePass(write), batch.rows.token_mask)
    return values
