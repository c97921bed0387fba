"""Measures of a changed model beside the model itself, from both models' logits: of an edit, a LoRA, or anything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.editing.activity import Activity
from tl_vpd.editing.examples import Examples
from tl_vpd.losses.precision import at_least_float32

Run = Callable[[Tensor, Tensor | None], Tensor]
"""From tokens and their mask to logits ``[batch, pos, vocab]``."""
BEFORE = 12
"""Tokens shown before a changed one."""


@torch.no_grad()
def kl_by_token(
    before: Run,
    after: Run,
    tokens: Int[Tensor, "batch pos"],
    token_mask: Bool[Tensor, "batch pos"] | None,
    batch_size: int,
) -> Float[Tensor, "batch pos"]:
    """``KL(p ‖ p')`` at every token, in nats, on the CPU.

    Args:
        before: gives the logits of p.
        after: gives those of p'.
        tokens: of the text.
        token_mask: False at padding (None: no padding).
        batch_size: rows that run at once.
    """
    kl = []
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        mask = None if token_mask is None else token_mask[rows]
        log_p, log_q = (at_least_float32(run(tokens[rows], mask)).log_softmax(-1) for run in (before, after))
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).cpu())
    return torch.cat(kl)


def near_and_elsewhere(
    fires: Bool[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"], radius: int
) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Tokens that do not fire: those at most ``radius`` from one that does, and all.

    Args:
        fires: tokens that fire.
        real: False at padding.
        radius: in tokens.
    """
    within = torch.nn.functional.max_pool1d(fires.float().unsqueeze(1), 2 * radius + 1, 1, radius).squeeze(1) > 0
    elsewhere = real & ~fires
    return within & elsewhere, elsewhere


def row_of_text(kl: Float[Tensor, "batch pos"], kinds: Mapping[str, Bool[Tensor, "batch pos"]]) -> dict[str, float]:
    """``{kind}_kl``, the mean, and ``{kind}_p99``, the 99th percentile, over the tokens of each kind (NaN: there are none).

    Args:
        kl: at every token.
        kinds: which tokens, by kind.
    """
    row: dict[str, float] = {}
    for kind, chosen in kinds.items():
        values = kl[chosen].double()
        row[f"{kind}_kl"] = float(values.mean()) if len(values) else math.nan
        row[f"{kind}_p99"] = float(values.quantile(0.99)) if len(values) else math.nan
    return row


@torch.no_grad()
def row_of_wanted(before: Run, after: Run, examples: Examples | None) -> dict[str, float]:
    """The mean probability and logit of what is wanted, without and with the change (nothing, where nothing is wanted).

    Args:
        before: gives the logits of the model.
        after: gives those of the changed model.
        examples: prompts, and what is wanted.
    """
    row: dict[str, float] = {}
    if examples is not None:
        for when, run in (("before", before), ("after", after)):
            logits = at_least_float32(run(examples.tokens, examples.token_mask))
            row[f"wanted_{when}"] = float(examples.log_probs(logits).exp().mean())
            row[f"logit_{when}"] = float(examples.at(logits).mean())
    return row


@torch.no_grad()
def changed_contexts(
    adapter: Adapter,
    before: Run,
    after: Run,
    text: Activity,
    kl: Float[Tensor, "batch pos"],
    n: int,
) -> pd.DataFrame:
    """The real tokens of the largest KL: ``row``, ``pos``, ``kl``, ``fires``, ``context``, ``token``, and the most likely next
    token of both models with its probability: ``before``, ``p_before``, ``after``, ``p_after``.

    Args:
        adapter: of the model, for texts of tokens.
        before: gives the logits of the model.
        after: gives those of the changed model.
        text: the tokens, and where edited subcomponents fire.
        kl: at every token.
        n: how many, at most.
    """
    rows: list[dict[str, Any]] = []
    order = kl.masked_fill(~text.real, -1.0).flatten().argsort(descending=True, stable=True)
    for flat in order[: min(n, int(text.real.sum()))].tolist():
        row, pos = divmod(flat, kl.shape[1])
        words, first = adapter.words(text.tokens[row]), max(0, pos - BEFORE)
        entry: dict[str, Any] = {"row": row, "pos": pos, "kl": float(kl[row, pos]), "fires": bool(text.fires[row, pos])}
        entry["context"] = "".join(words[i] for i in range(first, pos) if text.real[row, i])
        entry["token"] = words[pos]
        mask = None if text.token_mask is None else text.token_mask[[row]]
        for when, run in (("before", before), ("after", after)):
            p = at_least_float32(run(text.tokens[[row]], mask)[0, pos]).softmax(-1)
            entry |= {when: adapter.words(p.argmax()[None])[0], f"p_{when}": float(p.max())}
        rows.append(entry)
    return pd.DataFrame(rows)
