"""How much of a masked model's cross-entropy is owed to Γ's sight of the tokens that come after.

Γ reads the whole window, so the importances at a position may depend on the very token that is to be predicted there. The
KL to the target gains nothing from this; the cross-entropy of the masked model can, and may even fall below the
target's. Here every position is computed twice: with importances from the whole window, and with importances from the
prefix alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.masked_model import users_hooks_aside
from tl_vpd.hooks import attached_to


@torch.no_grad()
def foresight(
    decomposition: Decomposition,
    model: nn.Module,
    tokens: Int[Tensor, "n pos"],
    *,
    positions: Sequence[int],
    mode: str = "rounded",
    threshold: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Cross-entropy and KL at some positions, in nats: the target's, and the masked model's with either Γ.

    Args:
        tokens: rows without padding.
        positions: positions whose next token is predicted, each from 0 to ``pos − 2``; each costs one run of the prefix.
        mode: a mode of ``tl_vpd.masking.modes`` that needs importances.

    Raises:
        IndexError: a position has no next token in the rows. ValueError: another decomposition is attached to the model.
    """
    beyond = [p for p in positions if not 0 <= p < tokens.shape[1] - 1]
    if beyond:
        raise IndexError(f"Positions {beyond} have no next token in rows of {tokens.shape[1]} tokens.")
    other = in_the_way(decomposition, model)
    if other:
        raise ValueError(f"{other[0].upper()}{other[1:]}: detach it first.")
    rows, own = [], attached_to(model)
    serving = decomposition.attach(model) if own is None else nullcontext(own)
    with users_hooks_aside(adapt(model)), serving as attached:
        with attached.paused():
            clean = model(tokens).float().log_softmax(-1)
        with attached.masked(mode, threshold=threshold, seed=seed):
            whole = model(tokens).float().log_softmax(-1)
        for position in positions:
            with attached.masked(mode, threshold=threshold, seed=seed):
                prefix = model(tokens[:, : position + 1])[:, -1].float().log_softmax(-1)
            target, seen, after = clean[:, position], whole[:, position], tokens[:, position + 1]
            rows.append(
                {
                    "position": position,
                    "target_ce": _ce(target, after),
                    "whole_ce": _ce(seen, after),
                    "prefix_ce": _ce(prefix, after),
                    "whole_kl": _kl(target, seen),
                    "prefix_kl": _kl(target, prefix),
                }
            )
    return pd.DataFrame(rows).set_index("position")


def in_the_way(decomposition: Decomposition, model: nn.Module) -> str:
    """What is attached to the model and cannot serve all sites of this decomposition (empty: nothing)."""
    attached = attached_to(model)
    if attached is None:
        return ""
    if attached.decomposition is not decomposition:
        return "another decomposition is attached to this model"
    some = set(attached.sites) != set(decomposition.sites)
    return "the decomposition is attached to this model at some sites alone" if some else ""


def _ce(log_p: Float[Tensor, "n vocab"], after: Int[Tensor, " n"]) -> float:
    return float(-log_p.gather(-1, after[:, None]).mean())


def _kl(target: Float[Tensor, "n vocab"], masked: Float[Tensor, "n vocab"]) -> float:
    return float((target.exp() * (target - masked)).sum(-1).mean())
