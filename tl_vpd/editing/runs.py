"""Runs of a model without and with an edit, nothing of which is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor

from tl_vpd.editing.measures import Run
from tl_vpd.forward import MaskedModel, SiteEdit, SitePass


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
