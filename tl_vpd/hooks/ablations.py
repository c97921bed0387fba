"""Masks and ablations as lists of ``fwd_hooks``, for ``run_with_hooks`` and everything else that takes them.

They act on the HookPoints that ``Decomposition.attach`` puts on the model, so the model must be attached. ``mask_hooks``
sets masks; ``ablation_hooks`` multiplies into whatever masks stand, so that several lists compose in the order given:

    y = y₀ − Σ_{c ∈ S} amount · a_c U[c]            (other masks and Δ at 1)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.hooks.registry import is_attached
from tl_vpd.masking import Masks
from tl_vpd.sites import Subcomponent

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition

FwdHooks = list[tuple[str, Callable[..., Any]]]
Positions = int | slice | Sequence[int] | None


@dataclass(frozen=True)
class SetTo:
    """A hook that puts a given tensor in the place of the mask."""

    value: Float[Tensor, "*batch"] = field(repr=False)  # TransformerLens names hooks by their repr

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        try:
            return self.value.to(tensor).expand_as(tensor)
        except RuntimeError as error:
            raise ValueError(
                f"The mask for {hook.name} is {tuple(self.value.shape)}, this forward pass needs {tuple(tensor.shape)}: "
                "masks belong to the prompt they were made for (generation with a KV cache sees one position at a time)."
            ) from error


@dataclass(frozen=True)
class Ablate:
    """A hook that multiplies some subcomponents' masks by ``1 − amount`` at some positions."""

    indices: tuple[int, ...]
    pos: Positions
    amount: float

    def __call__(self, tensor: Float[Tensor, "batch pos C"], hook: Any) -> Float[Tensor, "batch pos C"]:
        where = slice(None) if self.pos is None else self.pos if isinstance(self.pos, slice) else _as_list(self.pos)
        factor = torch.ones_like(tensor)
        indices = torch.tensor(self.indices, device=tensor.device)
        try:
            rows = torch.arange(tensor.shape[1], device=tensor.device)[where]
        except IndexError as error:
            raise IndexError(f"pos={self.pos} is outside the {tensor.shape[1]} positions at {hook.name}.") from error
        factor[:, rows[:, None], indices] = 1.0 - self.amount
        return tensor * factor


def _as_list(pos: int | Sequence[int]) -> list[int]:
    return [pos] if isinstance(pos, int) else list(pos)


def _require_attached(decomposition: Decomposition, function: str) -> None:
    if not is_attached(decomposition):
        raise RuntimeError(
            f"{function} makes hooks for an attached model, and this decomposition is attached to none: call "
            "`with vpd.attach(model):` first."
        )


def mask_hooks(decomposition: Decomposition, masks: Masks) -> FwdHooks:
    """``fwd_hooks`` that set the masks (and Δ's) of every site in ``masks``; the other sites stay as they are.

    Raises:
        RuntimeError: the decomposition is attached to no model.
        KeyError: the masks name a site that is not decomposed.
    """
    _require_attached(decomposition, "mask_hooks")
    hooks: FwdHooks = []
    for name, own in masks.items():
        if name not in decomposition.sites:
            raise KeyError(f"The masks name {name!r}, which this decomposition does not have.")
        site = decomposition.sites[name]
        mask, delta = own.mask, own.delta
        if own.routed is not None:  # where the masked path is not taken, all-ones is the target itself
            mask = None if mask is None else torch.where(own.routed[..., None], mask, 1.0)
            delta = None if delta is None else torch.where(own.routed, delta, 1.0)
        if mask is not None:
            hooks.append((site.hook_name("mask"), SetTo(mask)))
        if delta is not None:
            hooks.append((site.hook_name("delta_mask"), SetTo(delta)))
    return hooks


def ablation_hooks(
    decomposition: Decomposition,
    subcomponents: Sequence[str | Subcomponent],
    *,
    pos: Positions = None,
    amount: float = 1.0,
) -> FwdHooks:
    """``fwd_hooks`` that take subcomponents out of the target.

    Args:
        subcomponents: ``"blocks.1.attn.W_Q:316"`` or ``Subcomponent``s.
        pos: an index, indices or slice of positions of each forward pass (None: all). Generation with a KV cache sees one
            position at a time, so an index acts on every new token there.
        amount: 1 removes, 0.5 halves, 0 leaves, 2 reverses the contribution.

    Raises:
        RuntimeError: the decomposition is attached to no model.
        KeyError, IndexError, ValueError: a subcomponent does not exist or is not written ``site:index``.
    """
    _require_attached(decomposition, "ablation_hooks")
    if isinstance(subcomponents, str):
        subcomponents = [subcomponents]
    by_site: dict[str, list[int]] = defaultdict(list)
    for address in subcomponents:
        found = decomposition.subcomponent(address)
        by_site[found.site].append(found.index)
    return [
        (decomposition.sites[site].hook_name("mask"), Ablate(tuple(indices), pos, amount))
        for site, indices in by_site.items()
    ]
