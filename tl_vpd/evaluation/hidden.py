"""Hidden-activation and attention-pattern error: is the masked model right for the right reason?

Under rounded masks (``g > θ``, Δ 0, errors propagating), for what each site puts out and for the residual stream behind each
block, the share of variance over tokens that the masked model does not explain, and for each attention layer the distance
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

from tl_vpd.evaluation.replacement import masked_product, replaced
from tl_vpd.evaluation.sample import Sample
from tl_vpd.masking.modes import masks_of_mode


class Unexplained:
    """Sums over tokens from which the unexplained share of variance follows, in float64."""

    def __init__(self) -> None:
        self.error = self.square = 0.0
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, target: Float[Tensor, "token d"], own: Float[Tensor, "token d"]) -> None:
        """Counts some tokens in."""
        target, own = target.double(), own.double()
        self.error += float((own - target).square().sum())
        self.square += float(target.square().sum())
        total = target.sum(0)
        self.total = total if self.total is None else self.total + total
        self.tokens += len(target)

    @property
    def share(self) -> float:
        """``Σ ‖y' − y‖² / Σ ‖y − ȳ‖²`` (NaN where y never varies)."""
        assert self.total is not None, "no tokens were added"
        variance = self.square - float(self.total.square().sum()) / self.tokens
        return self.error / variance if variance > 1e-12 * max(self.square, 1e-300) else float("nan")


def pattern_kl(
    target: Float[Tensor, "batch head query key"],
    own: Float[Tensor, "batch head query key"],
    token_mask: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, " head"]:
    """KL(target ‖ own) of attention patterns by head, averaged over rows and real queries; keys without attention count 0."""
    p, q = target.double(), own.double()
    tiny = torch.finfo(target.dtype).tiny
    kl = torch.special.xlogy(p, p / q.clamp_min(tiny)).sum(-1)
    if token_mask is None:
        return kl.mean((0, 2))
    weights = token_mask[:, None].to(kl)
    return (kl * weights).sum((0, 2)) / weights.sum((0, 2))


@torch.no_grad()
def hidden_errors(sample: Sample, *, threshold: float = 0.0) -> pd.DataFrame:
    """A row a site (its output), a block (the residual stream behind it) and an attention layer (its patterns).

    Columns: ``kind`` (site, residual, pattern), ``error`` (unexplained share of variance; of patterns the KL in nats).
    """
    model: Any = sample.masked_model.model
    points = _points(model, sample)
    sums: dict[str, Unexplained] = {}
    patterns: dict[str, list[Tensor]] = {}
    for i in range(len(sample.tokens)):
        masks = masks_of_mode("rounded", sample.g[i], sample.site_axis, threshold=threshold)

        def write(own: dict[str, Tensor], masks_: Any, name: str, x: Tensor, y: Tensor) -> Tensor | None:
            output = None if masks_ is None else masked_product(sample.masked_model, name, x, y, masks_[name])
            own[name] = y if output is None else output
            return output

        passes: list[dict[str, Tensor]] = []
        for chosen in (None, masks):
            own: dict[str, Tensor] = {}
            with model.hooks(fwd_hooks=[(name, partial(_note, own, name)) for name in points]):
                replaced(sample.masked_model, sample.tokens[i], sample.token_mask[i], partial(write, own, chosen))
            passes.append(own)
        _add(sums, patterns, passes[0], passes[1], points, sample, i)
    rows: list[dict[str, Any]] = [
        {"what": name, "kind": points.get(name, "site"), "error": own.share} for name, own in sums.items()
    ]
    total = torch.tensor(sample.positions, dtype=torch.float64)
    for name, found in patterns.items():
        by_batch = torch.stack(found).mean(1).cpu()
        rows.append({"what": name, "kind": "pattern", "error": float(by_batch @ total / total.sum())})
    return pd.DataFrame(rows).set_index("what")


def _points(model: Any, sample: Sample) -> dict[str, str]:
    """HookPoints of the residual stream behind each block that is decomposed and of its attention patterns -> kind."""
    layers = sorted({s.layer for s in sample.weights.sites.values() if s.layer is not None and s.home != s.name})
    wanted = {f"blocks.{n}.hook_resid_post": "residual" for n in layers}
    wanted |= {f"blocks.{n}.attn.hook_pattern": "pattern" for n in layers}
    return {name: kind for name, kind in wanted.items() if name in model.hook_dict}


def _note(own: dict[str, Tensor], name: str, value: Tensor, hook: Any) -> None:
    own[name] = value  # under the name asked for: a bridge's hook may bear another one


def _add(
    sums: dict[str, Unexplained],
    patterns: dict[str, list[Tensor]],
    clean: Mapping[str, Tensor],
    masked: Mapping[str, Tensor],
    points: Mapping[str, str],
    sample: Sample,
    i: int,
) -> None:
    token_mask = sample.token_mask[i]
    for name, target in clean.items():
        if points.get(name) == "pattern":
            patterns.setdefault(name, []).append(pattern_kl(target, masked[name], token_mask))
            continue
        lead = sample.g[i].shape[:-1]
        rows, own = (t.reshape(*lead, -1) for t in (target, masked[name]))
        if token_mask is not None:
            rows, own = rows[token_mask], own[token_mask]
        sums.setdefault(name, Unexplained()).add(rows.flatten(0, -2), own.flatten(0, -2))
