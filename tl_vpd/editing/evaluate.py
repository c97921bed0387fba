"""What an edit does: the change that is wanted, and the changes that are not.

Tokens of the text where an edited subcomponent is important *fire*. For every other real token, and for other text,

    KL(p ‖ p') = Σ_v p_v (log p_v − log p'_v)          between the model's prediction and the edited model's, in nats

``near``: tokens at most ``radius`` (20) from one that fires, in the same row; ``elsewhere``: all that do not fire (VPD paper,
section on editing). Controls are measured on the same tokens.

    >>> result = evaluate_edit(vpd, model, tokens, edit, wanted=Wanted(" her", prompts))     # doctest: +SKIP
    >>> result.to_pandas()                                                                   # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.checks import check_fields, config_of, instance
from tl_vpd.decomposition import Decomposition
from tl_vpd.editing.activity import activity
from tl_vpd.editing.controls import random_control, singular_control
from tl_vpd.editing.edit import Edit
from tl_vpd.editing.evaluation import EditEvaluation
from tl_vpd.editing.examples import Examples, Wanted
from tl_vpd.editing.measures import changed_contexts, kl_by_token, near_and_elsewhere, row_of_text, row_of_wanted
from tl_vpd.editing.runs import clean_run, edited_run
from tl_vpd.forward import MaskedModel, SiteEdit


@dataclass(frozen=True)
class EditEvaluationConfig:
    """How an edit is measured.

    Attributes:
        radius: tokens on either side of one that fires that count as near.
        threshold: a token fires where an edited subcomponent's importance is above this.
        controls: whether the controls are measured.
        contexts: the most changed contexts that are shown.
        batch_size: rows that run at once.
        seed: of the random control.

    Raises:
        TypeError: a value is of another type.
        ValueError: a number is out of its range.
    """

    radius: int = 20
    threshold: float = 0.0
    controls: bool = True
    contexts: int = 10
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, radius=1, contexts=0, batch_size=1)


@torch.no_grad()
def evaluate_edit(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    edit: Edit,
    *,
    wanted: Wanted | None = None,
    other_text: Mapping[str, Any] | None = None,
    config: EditEvaluationConfig | None = None,
) -> EditEvaluation:
    """Measures an edit on an unchanged model; nothing is written.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: text in which the edited subcomponents fire: strings, or tokens ``[batch, pos]``.
        edit: of this decomposition.
        wanted: the token that the edit is to make likely, or unlikely, and where (None: none is measured).
        other_text: further text by kind, as strings or tokens.
        config: radius, controls and so on (None: the defaults).

    Raises:
        TypeError: an argument is of another type.
        ValueError: the edit is of another decomposition, or the model has other weights.

    Warns (RuntimeWarning) where an edited subcomponent is not important at any token of the prompts, with its frequency.
    """
    config = config_of(EditEvaluationConfig, config)
    instance("decomposition", decomposition, Decomposition)
    instance("edit", edit, Edit)
    if other_text is not None and not isinstance(other_text, Mapping):
        raise TypeError(f"other_text is a {type(other_text).__name__}: give text or tokens by kind, in a dict.")
    variants: dict[str, Mapping[str, SiteEdit]] = {"edit": edit.site_edits(decomposition)}
    with MaskedModel(decomposition, model) as masked_model:
        adapter = masked_model.adapter
        examples = None if wanted is None else Examples.of(adapter, instance("wanted", wanted, Wanted))
        text = activity(
            decomposition,
            masked_model,
            prompts,
            edit.subcomponents,
            threshold=config.threshold,
            batch_size=config.batch_size,
        )
        text.warn_of_dead()
        if config.controls:
            weights = {site: adapter.weight(site) for site in edit.sites}
            variants |= _controls(edit, decomposition, weights, text.alive, config.seed)
        rows, contexts = [], pd.DataFrame()
        near, elsewhere = near_and_elsewhere(text.fires, text.real, config.radius)
        other_tokens = {kind: adapter.tokens(more) for kind, more in (other_text or {}).items()}
        for name, site_edits in variants.items():
            run = edited_run(masked_model, site_edits)
            kl = kl_by_token(clean_run(masked_model), run, text.tokens, text.token_mask, config.batch_size)
            row: dict[str, Any] = {"variant": name}
            row |= row_of_wanted(clean_run(masked_model), run, examples)
            row |= row_of_text(kl, {"firing": text.fires, "near": near, "elsewhere": elsewhere})
            for kind, tokens in other_tokens.items():
                mask = adapter.padding(tokens, None)
                other = kl_by_token(clean_run(masked_model), run, tokens, mask, config.batch_size)
                real = torch.ones_like(other, dtype=torch.bool) if mask is None else mask.cpu()
                row |= row_of_text(other, {kind: real})
            rows.append(row)
            if name == "edit" and config.contexts:
                contexts = changed_contexts(adapter, clean_run(masked_model), run, text, kl, config.contexts)
    return EditEvaluation(edit, pd.DataFrame(rows), contexts, text)


def _controls(
    edit: Edit,
    decomposition: Decomposition,
    weights: Mapping[str, Float[Tensor, "_ _"]],
    alive: Bool[Tensor, " C_total"],
    seed: int,
) -> dict[str, dict[str, SiteEdit]]:
    """The controls by name; warns where a site has no subcomponent for the random one."""
    controls = {"singular": singular_control(edit, weights).site_edits(decomposition)}
    random = random_control(edit, decomposition, alive, torch.Generator().manual_seed(seed))
    if random is None:
        message = "A site has no other subcomponent alive: the random control is left out."
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return controls
    return {"random": random.site_edits(decomposition)} | controls
