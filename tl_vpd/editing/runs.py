"""Runs of a model without and with an edit, nothing of which is written; and the repeated runs of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.editing.measures import Run
from tl_vpd.forward import MaskedModel, SiteEdit, SitePass
from tl_vpd.masking import Masks


def clean_run(masked_model: MaskedModel) -> Run:
    """The model as it is."""

    def run(tokens: Tensor, token_mask: Tensor | None) -> Float[Tensor, "batch pos vocab"]:
        return masked_model.run(tokens, SitePass(), token_mask)

    return run


def edited_run(masked_model: MaskedModel, edit: Mapping[str, SiteEdit]) -> Run:
    """The model with changes by site."""

    def run(tokens: Tensor, token_mask: Tensor | None) -> Float[Tensor, "batch pos vocab"]:
        with edited(masked_model, edit):
            return masked_model.run(tokens, SitePass(), token_mask)

    return run


@contextmanager
def edited(masked_model: MaskedModel, edit: Mapping[str, SiteEdit]) -> Iterator[None]:
    """Inside, runs have the edit.

    Args:
        masked_model: that runs.
        edit: changes by site.
    """
    edits = masked_model.taps.edits
    edits.append(edit)
    try:
        yield
    finally:
        edits[:] = [other for other in edits if other is not edit]


class Steps:
    """The same prompts in step after step of a training; blocks before the first decomposed one run once.

    Args:
        masked_model: that runs.
        tokens: of the prompts.
        token_mask: False at padding (None: no padding).
        batch_size: prompts of a step (None: all).
        seed: of which.
    """

    def __init__(
        self,
        masked_model: MaskedModel,
        tokens: Int[Tensor, "batch pos"],
        token_mask: Bool[Tensor, "batch pos"] | None,
        batch_size: int | None,
        seed: int,
    ) -> None:
        self.masked_model, self.tokens, self.token_mask = masked_model, tokens, token_mask
        self.size = len(tokens) if batch_size is None else min(batch_size, len(tokens))
        self.generator = torch.Generator().manual_seed(seed)
        self.start: Tensor | None = None
        if masked_model.can_start_late(tokens[:1], None if token_mask is None else token_mask[:1]):
            run = SitePass(collect=True)
            with torch.no_grad():
                masked_model.run(tokens, run, token_mask)
            self.start = run.residual

    def rows(self) -> Int[Tensor, " row"]:
        """The prompts of the next step."""
        n = len(self.tokens)
        order = torch.arange(n) if self.size == n else torch.randperm(n, generator=self.generator)[: self.size]
        return order.to(self.tokens.device)

    def logits(self, rows: Int[Tensor, " row"], masks: Masks | None = None) -> Float[Tensor, "row pos vocab"]:
        """Of prompts.

        Args:
            rows: which.
            masks: of the sites that are masked (None: no site).
        """
        mask, start = (None if t is None else t[rows] for t in (self.token_mask, self.start))
        return self.masked_model.masked(self.tokens[rows], Masks({}) if masks is None else masks, mask, start=start)
