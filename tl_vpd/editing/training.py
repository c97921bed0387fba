"""A write direction trained on a few examples (VPD paper, section on editing: 4 to 8 of them).

    min over u of  −mean log p(wanted token | prompt, U[c] = u)

by Adam from ``u = U[c]``, of which the edit has a copy from before. It ends as soon as the wanted tokens' mean probability
reaches ``probability``: trained for longer, or on few examples from far, directions grow and harm all other text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.checks import check_fields, config_of, instance
from tl_vpd.decomposition import Decomposition
from tl_vpd.editing.edit import Edit
from tl_vpd.editing.examples import Examples, Wanted
from tl_vpd.editing.make import chosen_subcomponents, piece_of
from tl_vpd.editing.runs import Steps, edited
from tl_vpd.forward import MaskedModel, SiteEdit
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent

FEWEST = 4
"""Examples that a direction is trained on at least: with fewer it fits them and nothing else."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a write direction is trained.

    Attributes:
        steps: of Adam, at most.
        lr: its learning rate, relative to the root mean square of the direction's entries.
        probability: training ends when the mean probability of what is wanted is this.
        batch_size: examples of a step, sampled anew in each (None: all); whether training ends is decided by all of them.
        seed: of which examples a step has.

    Raises:
        TypeError: a value is of another type.
        ValueError: a number is out of its range.
    """

    steps: int = 200
    lr: float = 0.1
    probability: float = 0.8
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, steps=1, lr=(1e-8, 100.0), probability=(1e-6, 1 - 1e-6), batch_size=1)


@dataclass(frozen=True, eq=False)
class TrainedEdit(Printed):
    """What training gave.

    Attributes:
        edit: the new write direction.
        probabilities: of what is wanted, in the mean over the step's examples, at every step; the first is the model's. The last
            is that of all examples, as is any that would end the training.
        reached: whether training ended since the probability was reached.
    """

    edit: Edit
    probabilities: Float[Tensor, " step"] = field(repr=False)
    reached: bool

    def to_pandas(self) -> pd.DataFrame:
        """One row per step: ``step``, ``probability``."""
        return pd.DataFrame({"step": range(len(self.probabilities)), "probability": self.probabilities.tolist()})


def train_write_direction(
    decomposition: Decomposition,
    model: nn.Module,
    wanted: Wanted,
    subcomponent: str | Subcomponent,
    *,
    config: TrainingConfig | None = None,
) -> TrainedEdit:
    """Trains the write direction of one subcomponent until wanted tokens are likely; nothing else of the model changes.

    Args:
        decomposition: of the model's weights.
        model: the target, which is left as it is.
        wanted: the examples: prompts on which the subcomponent is important, and the token that is wanted after each.
        subcomponent: which.
        config: steps, learning rate, when to stop (None: the defaults).

    Raises:
        TypeError: an argument is of another type.
        KeyError: the site does not exist.
        IndexError: the site has no such subcomponent, or a position or token does not exist.
        ValueError: there are fewer than 4 examples, what is wanted is as likely already, the model has other weights, or the
            subcomponent has no effect on the examples.
    """
    config = config_of(TrainingConfig, config)
    instance("wanted", wanted, Wanted)
    [c] = chosen_subcomponents(decomposition, subcomponent)
    U = decomposition.U[c.site][c.index].detach().clone()
    with MaskedModel(decomposition, model) as masked_model, torch.enable_grad():
        examples = Examples.of(masked_model.adapter, wanted)
        if len(examples.tokens) < FEWEST:
            raise ValueError(f"There are {len(examples.tokens)} examples: give {FEWEST} or more, 4 to 8 are usual.")
        read = decomposition.V[c.site][:, [c.index]].detach()
        change = torch.zeros(1, len(U), dtype=masked_model.adapter.dtype, device=masked_model.adapter.device)
        change.requires_grad_()
        scale = float(U.double().square().mean().sqrt()) or 1.0
        optimizer = torch.optim.Adam([change], lr=config.lr * scale)
        steps = Steps(masked_model, examples.tokens, examples.token_mask, config.batch_size, config.seed)
        probabilities: list[float] = []
        for step in range(config.steps + 1):
            rows = steps.rows()
            with edited(masked_model, {c.site: SiteEdit(read, change, (c.index,))}):
                log_probs = examples.of_rows(rows).log_probs(steps.logits(rows))
            probabilities.append(float(log_probs.detach().exp().mean()))
            if (probabilities[-1] >= config.probability or step == config.steps) and len(rows) < len(examples.tokens):
                with torch.no_grad(), edited(masked_model, {c.site: SiteEdit(read, change, (c.index,))}):
                    every = steps.logits(torch.arange(len(examples.tokens), device=rows.device))
                    probabilities[-1] = float(examples.log_probs(every).exp().mean())
            if probabilities[-1] >= config.probability or step == config.steps:
                break
            optimizer.zero_grad()
            (-log_probs.mean()).backward()
            if change.grad is None or not bool(change.grad.any()):
                raise ValueError(f"{c} has no effect on these examples: give prompts on which it is important.")
            optimizer.step()
    if len(probabilities) == 1:
        raise ValueError(
            f"What is wanted has a mean probability of {probabilities[0]:.3g} already (wanted: {config.probability}): there is "
            "nothing to train."
        )
    reached = probabilities[-1] >= config.probability
    new = U + change.detach()[0].to(U)
    piece = piece_of(decomposition, c, new, f"trained on {len(examples.tokens)} examples")
    return TrainedEdit(Edit.of(decomposition, [piece]), torch.tensor(probabilities), reached)
