"""Explains the difference between a model and the same one fine-tuned; ``tl_vpd.editing.difference`` says as what."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.checks import config_of, instance
from tl_vpd.components import Fingerprint
from tl_vpd.decomposition import Decomposition
from tl_vpd.editing.difference import Difference, DifferenceConfig
from tl_vpd.editing.path import along_path
from tl_vpd.editing.runs import clean_run
from tl_vpd.editing.strengths import Loss, loss_value
from tl_vpd.editing.tangent import Explained, explain
from tl_vpd.forward import MaskedModel
from tl_vpd.forward.target_check import check_target
from tl_vpd.losses import kl_divergence
from tl_vpd.losses.precision import at_least_float32

RIDGE = 1e-4
"""Added to the second moment of inputs, relative to its mean eigenvalue: directions that the data lacks stay defined."""


@torch.no_grad()
def explain_difference(
    decomposition: Decomposition,
    model: nn.Module,
    finetuned: nn.Module,
    *,
    prompts: Any = None,
    loss: Loss | None = None,
    config: DifferenceConfig | None = None,
) -> Difference:
    """Explains what a fine-tuning changed by changes of subcomponents.

    Args:
        decomposition: of the model's weights.
        model: the target, before.
        finetuned: the same architecture, after.
        prompts: strings or tokens of the new behaviour (None: changes are compared by their norms).
        loss: of the logits of all prompts at once (None: the mean KL from the prediction of the model before, in nats).
        config: how many subcomponents (None: the defaults).

    Raises:
        TypeError: an argument is of another type.
        ValueError: the model has other weights, the fine-tuned one other shapes, no decomposed weight differs, or there is a loss
            without prompts.

    Warns (RuntimeWarning) where parameters changed that are not decomposed: these are not explained.
    """
    config = config_of(DifferenceConfig, config)
    instance("decomposition", decomposition, Decomposition)
    before, after = adapt(model), adapt(finetuned)
    check_target(decomposition, before)
    check_target(decomposition, after, check_weights=False)
    _warn_of_others(decomposition, before, after)
    if loss is not None and prompts is None:
        raise ValueError("A loss does nothing without prompts: give prompts= too.")
    moments = {} if prompts is None else _second_moments(decomposition, model, prompts, config.batch_size)
    explained: dict[str, Explained] = {}
    sites, changes = [], []
    for name in decomposition.sites:
        W, changed = (a.weight(name).double().cpu() for a in (before, after))
        delta = changed - W
        if not bool(delta.any()):
            continue
        V, U = (t[name].detach().double().cpu() for t in (decomposition.V, decomposition.U))
        root = None if prompts is None else _root(moments[name])
        e = explained[name] = explain(delta, V, U, root, pieces=config.pieces, smallest=config.smallest)
        site, rows = _rows(name, W, delta, e, root)
        sites.append(site)
        changes += rows
    if not sites:
        raise ValueError(
            "The fine-tuned model has the same weights at every decomposed site: there is nothing to explain."
        )
    columns = ["subcomponent", "strength", "write", "read", "norm", "fraction", "effect"]
    table = pd.DataFrame(changes, columns=columns)
    table["output"] = math.nan
    if prompts is not None:
        runs = _Runs.of(decomposition, model, prompts, config.batch_size, loss)
        table["output"] = _outputs(decomposition, finetuned, explained, runs, config.steps)
    order = table["norm" if prompts is None else "output"].abs().sort_values(ascending=False, kind="stable").index
    table = table.loc[order].reset_index(drop=True)
    prints = {name: Fingerprint.of(after.weight(name)) for name in decomposition.sites}
    return Difference(table, pd.DataFrame(sites), decomposition, explained, prints)


def _rows(
    name: str, W: Tensor, delta: Tensor, e: Explained, root: Tensor | None
) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """A site's row, and those of its subcomponents."""
    writes, reads = e.changes(e.indices)
    total, norm, rest = _size(delta, root), float(delta.norm()), delta - e.V @ writes - reads.T @ e.U
    rows: list[tuple[Any, ...]] = []
    for c, v, u, D, E in zip(e.indices, e.V.T, e.U, writes, reads, strict=True):
        strength = float(D @ u / (u @ u).clamp(min=1e-300))
        change = torch.outer(v, D) + torch.outer(E, u)
        write, read = float(v.norm() * (D - strength * u).norm()), float(E.norm() * u.norm())
        fraction = 1 - _size(delta - change, root) / total
        effect = math.nan if root is None else math.sqrt(_size(change, root))
        rows.append((f"{name}:{c}", strength, write, read, float(change.norm()), fraction, effect))
    site = {"site": name, "norm": norm, "relative": norm / max(float(W.norm()), 1e-300)}
    site |= {"explained": 1 - _size(rest, root) / total, "explained_norm": 1 - _size(rest, None) / norm**2}
    return site, rows


def _size(matrix: Tensor, root: Tensor | None) -> float:
    """``‖R M‖²``."""
    return float((matrix if root is None else root @ matrix).square().sum())


def _second_moments(
    decomposition: Decomposition, model: nn.Module, prompts: Any, batch_size: int
) -> dict[str, Float[Tensor, "d_in d_in"]]:
    """``E[x xᵀ]`` of every site's input over real tokens, in float64 on the CPU."""
    moments = {name: torch.zeros(s.d_in, s.d_in, dtype=torch.float64) for name, s in decomposition.sites.items()}
    n = 0
    with MaskedModel(decomposition, model) as masked_model:
        tokens = masked_model.adapter.tokens(prompts)
        token_mask = masked_model.adapter.padding(tokens, None)
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            mask = None if token_mask is None else token_mask[rows]
            _, inputs = masked_model.clean(tokens[rows], mask)
            for name, x in inputs.items():
                flat = (x.flatten(0, -2) if mask is None else x[mask]).double().cpu()
                moments[name] += flat.T @ flat
            n += tokens[rows].numel() if mask is None else int(mask.sum())
    return {name: moment / n for name, moment in moments.items()}


@dataclass(frozen=True)
class _Runs:
    """Batches of the prompts, and the loss of a batch's logits and its number."""

    batches: list[tuple[Tensor, Tensor | None]]
    loss: Callable[[Tensor, int], Tensor]

    @classmethod
    def of(
        cls, decomposition: Decomposition, model: nn.Module, prompts: Any, batch_size: int, loss: Loss | None
    ) -> _Runs:
        with MaskedModel(decomposition, model) as masked_model:
            tokens = masked_model.adapter.tokens(prompts)
            token_mask = masked_model.adapter.padding(tokens, None)
            n = len(tokens) if loss is not None else batch_size
            rows = [slice(start, start + n) for start in range(0, len(tokens), n)]
            batches = [(tokens[r], None if token_mask is None else token_mask[r]) for r in rows]
            if loss is not None:
                return cls(batches, lambda logits, number: loss_value(loss, logits))
            run = clean_run(masked_model)
            targets = [at_least_float32(run(*batch)).log_softmax(-1) for batch in batches]
        real = [batch.numel() if mask is None else int(mask.sum()) for batch, mask in batches]
        weights = [n / sum(real) for n in real]
        return cls(batches, lambda logits, i: weights[i] * kl_divergence(targets[i], logits, batches[i][1]))


def _outputs(
    decomposition: Decomposition,
    finetuned: nn.Module,
    explained: Mapping[str, Explained],
    runs: _Runs,
    steps: int,
) -> list[float]:
    """What the change of every subcomponent contributes to the loss, in the order of the table's rows."""
    changes = []
    for name, e in explained.items():
        for v, u, D, E in zip(e.V.T, e.U, *e.changes(e.indices), strict=True):
            changes.append((name, torch.stack([v, E], dim=1), torch.stack([D, u])))
    with MaskedModel(decomposition, finetuned, check_weights=False) as masked_model:
        return along_path(masked_model, changes, runs.batches, runs.loss, steps=steps).tolist()


def _root(moment: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in d_in"]:
    """The symmetric square root, with a ridge."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0) + RIDGE * values.clamp(min=0).mean().clamp(min=1e-300)
    return vectors @ (values.sqrt()[:, None] * vectors.T)


def _warn_of_others(decomposition: Decomposition, before: Adapter, after: Adapter) -> None:
    """Warns of parameters that differ and are not decomposed."""
    sites = {id(getattr(*a.holder(name))) for a in (before, after) for name in decomposition.sites}
    old, new = (dict(a.model.named_parameters()) for a in (before, after))
    others = [
        name
        for name, p in old.items()
        if name in new and id(p) not in sites and not torch.equal(p.cpu(), new[name].detach().cpu().to(p))
    ]
    if others:
        warnings.warn(
            f"The fine-tuning changed {len(others)} parameters that are not decomposed, {others[0]} among them: what they do is "
            "not explained.",
            RuntimeWarning,
            stacklevel=3,
        )
