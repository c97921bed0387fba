"""How much of a masked model's cross-entropy is owed to Γ's sight of the tokens that come after.

Γ reads the whole window, so the importances at a position may depend on the very token that is to be predicted there. The
KL to the target gains nothing from this; the cross-entropy of the masked model can, and may even fall below the
target's. Here every position is computed twice: with importances from the whole window, and with importances from the
prefix alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.decomposition import Decomposition
from tl_vpd.hooks.attached import Attached
from tl_vpd.hooks.registry import attached_to
from tl_vpd.hooks.tapped import users_hooks_aside


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
        mode: a mode of ``tl_vpd.hooks.modes`` that needs importances.

    Raises:
        IndexError: a position has no next token in the rows. ValueError: another decomposition is attached to the model.
    """
    beyond = [p for p in positions if not 0 <= p < tokens.shape[1] - 1]
    if beyond:
        raise IndexError(f"Positions {beyond} have no next token in rows of {tokens.shape[1]} tokens.")
    rows = []
    with users_hooks_aside(adapt(model)), _attached(decomposition, model) as attached:
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


def cannot_attach(decomposition: Decomposition, model: nn.Module) -> str:
    """Why what is attached to the model is in the way (empty: it is not)."""
    attached = attached_to(model)
    if attached is None or (
        attached.decomposition is decomposition and set(attached.sites) == set(decomposition.sites)
    ):
        return ""
    what = "at some sites alone" if attached.decomposition is decomposition else "another one"
    return f"a decomposition is attached to this model already ({what})"


def _attached(decomposition: Decomposition, model: nn.Module) -> AbstractContextManager[Attached]:
    why = cannot_attach(decomposition, model)
    if why:
        raise ValueError(f"{why[0].upper()}{why[1:]}: detach it first.")
    attached = attached_to(model)
    return decomposition.attach(model) if attached is None else nullcontext(attached)


def _ce(log_p: Float[Tensor, "n vocab"], after: Int[Tensor, " n"]) -> float:
    return float(-log_p.gather(-1, after[:, None]).mean())


def _kl(target: Float[Tensor, "n vocab"], masked: Float[Tensor, "n vocab"]) -> float:
    return float((target.exp() * (target - masked)).sum(-1).mean())
