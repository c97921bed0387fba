"""One scalar for every subcomponent, its strength: what a loss wants of it, and strengths trained for an objective.

    W(s) = W + Σ_c (s_c − 1) V[:, c] ⊗ U[c],      s = 1 is the model itself

A strength is a mask that is the same at every token, with Δ's at 1, so that its gradient comes from the masked forward:

    ∂L/∂s_c = ⟨∂L/∂W, V[:, c] ⊗ U[c]⟩

Training changes strengths alone, by Adam; with ``penalty`` above 0, ``penalty · Σ_c |s_c − 1| / (|s_c − 1| + ε)`` is added, a
smooth form of the L0 of those that move, and those that moved less than ``smallest`` are put back to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.checks import check_fields, config_of, instance, integer, shown
from tl_vpd.decomposition import Decomposition
from tl_vpd.editing.edit import Edit
from tl_vpd.editing.make import chosen_subcomponents, piece_of
from tl_vpd.editing.runs import Steps
from tl_vpd.forward import MaskedModel
from tl_vpd.hooks.ablations import Subcomponents
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.printing import Printed
from tl_vpd.site import ConcatenatedAxis, Subcomponent

Loss = Callable[[Tensor], Tensor]
"""Takes logits ``[batch, pos, vocab]`` of all prompts, gives one differentiable number."""


def gradient_by_subcomponent(
    decomposition: Decomposition, model: nn.Module, prompts: Any, loss: Loss, *, attention_mask: Any = None
) -> pd.DataFrame:
    """The gradient of a loss with respect to the strength of every subcomponent.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: strings, or tokens ``[batch, pos]``, which run at once.
        loss: of the logits.
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Returns:
        One row per subcomponent, the largest gradients first: ``subcomponent``, ``site``, ``index``, ``gradient``. To first order
        the loss falls by ``gradient`` where the subcomponent is removed.

    Raises:
        TypeError: an argument is of another type, or the loss gives something else than a tensor.
        ValueError: the loss is not one finite number that depends on the logits, or the model has other weights.
    """
    instance("decomposition", decomposition, Decomposition)
    axis = decomposition.site_axis
    with MaskedModel(decomposition, model) as masked_model:
        tokens = masked_model.adapter.tokens(prompts)
        token_mask = masked_model.adapter.padding(tokens, attention_mask)
        strengths = torch.ones(axis.total, device=masked_model.adapter.device, dtype=masked_model.adapter.dtype)
        strengths.requires_grad_()
        with torch.enable_grad():
            value = loss_value(loss, masked_model.masked(tokens, _masks(axis, strengths), token_mask))
        [gradient] = torch.autograd.grad(value, [strengths])
    order = gradient.abs().argsort(descending=True).tolist()
    subcomponents = [axis.at(i) for i in order]
    return pd.DataFrame(
        {
            "subcomponent": [str(c) for c in subcomponents],
            "site": [c.site for c in subcomponents],
            "index": [c.index for c in subcomponents],
            "gradient": gradient[order].tolist(),
        }
    )


@dataclass(frozen=True)
class StrengthConfig:
    """How strengths are trained.

    Attributes:
        steps: of Adam, at most.
        lr: its learning rate.
        penalty: the price of every strength that moves.
        epsilon: the change of strength at which half of the price is paid.
        smallest: changes below this are undone at the end.
        goal: training ends as soon as the loss is at or below this (None: after all steps).
        batch_size: prompts of a step, sampled anew in each; the loss is then of their logits alone (None: all prompts).
        seed: of which prompts a step has.

    Raises:
        TypeError: a value is of another type.
        ValueError: a number is out of its range.
    """

    steps: int = 100
    lr: float = 0.05
    penalty: float = 0.0
    epsilon: float = 0.1
    smallest: float = 0.02
    goal: float | None = None
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, steps=1, lr=(1e-8, 10.0), penalty=0.0, epsilon=(1e-6, 10.0), smallest=0.0, batch_size=1)


@dataclass(frozen=True, eq=False)
class TunedStrengths(Printed):
    """Strengths trained for an objective.

    Attributes:
        subcomponents: that were trained.
        strengths: of each; 1 is the model itself.
        losses: of every step, without the penalty; the first is that of the model itself.
        edit: scales those that moved.
    """

    subcomponents: tuple[Subcomponent, ...]
    strengths: Float[Tensor, " n"] = field(repr=False)
    losses: Float[Tensor, " step"] = field(repr=False)
    edit: Edit = field(repr=False)

    def to_pandas(self) -> pd.DataFrame:
        """One row per subcomponent, the largest changes first: ``subcomponent``, ``strength``."""
        table = pd.DataFrame(
            {"subcomponent": [str(c) for c in self.subcomponents], "strength": self.strengths.tolist()}
        )
        return table.iloc[(table["strength"] - 1).abs().argsort(kind="stable")[::-1]].reset_index(drop=True)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` subcomponents whose strength changed most."""
        return self.to_pandas().head(integer("k", k, minimum=1))


def tune_strengths(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    loss: Loss,
    subcomponents: Subcomponents | None = None,
    *,
    config: StrengthConfig | None = None,
) -> TunedStrengths:
    """Trains the strengths of subcomponents for an objective on a few prompts.

    Args:
        decomposition: of the model's weights.
        model: the target, which is left as it is.
        prompts: strings, or tokens ``[batch, pos]``, which run at once in every step.
        loss: of the logits; what is to stay as it is must be part of it.
        subcomponents: whose strengths are trained (None: all).
        config: steps, penalty and so on (None: the defaults).

    Raises:
        TypeError: an argument is of another type.
        KeyError: a site does not exist.
        IndexError: a site has no such subcomponent.
        ValueError: the loss is not one finite number that depends on the logits, the model has other weights, or no strength
            moved by ``smallest``.
    """
    config = config_of(StrengthConfig, config)
    instance("decomposition", decomposition, Decomposition)
    axis = decomposition.site_axis
    chosen = [*axis.subcomponents()] if subcomponents is None else chosen_subcomponents(decomposition, subcomponents)
    with MaskedModel(decomposition, model) as masked_model, torch.enable_grad():
        tokens = masked_model.adapter.tokens(prompts)
        steps = Steps(masked_model, tokens, masked_model.adapter.padding(tokens, None), config.batch_size, config.seed)
        dtype, device = masked_model.adapter.dtype, masked_model.adapter.device
        columns = torch.tensor([axis.slices[c.site].start + c.index for c in chosen], device=device)
        change = torch.zeros(len(chosen), dtype=dtype, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([change], lr=config.lr)
        losses: list[float] = []
        for step in range(config.steps + 1):
            strengths = torch.ones(axis.total, dtype=dtype, device=device).index_add(0, columns, change)
            masks = _masks(axis, strengths, {c.site for c in chosen})
            value = loss_value(loss, steps.logits(steps.rows(), masks))
            losses.append(float(value.detach()))
            if step == config.steps or (config.goal is not None and losses[-1] <= config.goal):
                break
            optimizer.zero_grad()
            (value + config.penalty * (change.abs() / (change.abs() + config.epsilon)).sum()).backward()
            optimizer.step()
    moved = torch.where(change.detach().abs() < config.smallest, 0.0, change.detach()).to(change)
    return TunedStrengths(tuple(chosen), 1 + moved, torch.tensor(losses), _edit(decomposition, chosen, moved))


def _edit(decomposition: Decomposition, chosen: Sequence[Subcomponent], change: Tensor) -> Edit:
    pieces = [
        piece_of(decomposition, c, s * decomposition.U[c.site][c.index], f"scaled by {s:.4g}")
        for c, s in zip(chosen, (1 + change).tolist(), strict=True)
        if s != 1
    ]
    if not pieces:
        raise ValueError("No strength moved: train for more steps or at a larger lr, or lower penalty and smallest.")
    return Edit.of(decomposition, pieces)


def _masks(axis: ConcatenatedAxis, strengths: Tensor, sites: Any = None) -> Masks:
    """Strengths as masks ``[C]``, of these sites (None: all)."""
    by_site = axis.split_sites(strengths)
    return Masks({name: SiteMask(by_site[name], None) for name in (by_site if sites is None else sites)})


def loss_value(loss: Loss, logits: Tensor) -> Tensor:
    """The loss of logits, checked."""
    if not callable(loss):
        raise TypeError(f"loss={shown(loss)} is a {type(loss).__name__}: give a function of the logits.")
    value = loss(logits)
    if not isinstance(value, Tensor):
        raise TypeError(f"The loss gave a {type(value).__name__}: return a tensor of one number.")
    if value.numel() != 1 or not value.requires_grad or not bool(value.isfinite().all()):
        raise ValueError(
            f"The loss gave {shown(value.detach())}: return one finite number that depends on the logits and has a gradient."
        )
    return value.reshape(())
