"""A model in which a circuit is kept and every other piece lies somewhere between its own value and an ablated one.

    value = ablated + m · (own − ablated),       m = 1 for the circuit, r ∈ [0, 1] for a piece of everything else

r = 0 is plain ablation; *own* is what the piece is in this very pass, downstream of the other ablations. Ablated values: 0; the
mean over the reference prompts' real tokens; or those of another reference prompt at the same position (resample).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.analysis.audit.node_set import HookSite, NodeSet
from tl_vpd.forward.masked_model import frozen, users_hooks_aside
from tl_vpd.hooks import attached_to, attachment_of

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition

Reference = Literal["zero", "mean", "resample"]


def between(
    own: Float[Tensor, "batch pos *rest"], ablated: Tensor, m: Float[Tensor, "#batch #pos piece"], place: HookSite
) -> Float[Tensor, "batch pos *rest"]:
    """``ablated + m (own − ablated)`` with the pieces' factors where they lie; at m = 1 ``own`` to the bit."""
    if place.kind == "delta":
        return m.to(own).expand_as(own).clone()
    if place.kind == "head":
        heads, other = _by_head(own, place.count), _by_head(ablated.to(own), place.count)
        return torch.lerp(other.expand_as(heads), heads, m.to(own).unsqueeze(-1).expand_as(heads)).reshape(own.shape)
    return torch.lerp(ablated.to(own).expand_as(own), own, m.to(own).expand_as(own))


def _by_head(z: Tensor, heads: int) -> Tensor:
    """``[batch, pos, head, d_head]``, which some models flatten (a single number stays one)."""
    return z.unflatten(-1, (heads, -1)) if z.ndim == 3 else z


@dataclass
class _Hook:
    """Puts one place's pieces where ``m`` says; counts how often it ran."""

    place: HookSite
    ablated: Tensor
    m: Tensor = field(default_factory=lambda: torch.ones(1, 1, 1))
    fired: int = 0

    def __call__(self, own: Tensor, hook: Any) -> Tensor:
        self.fired += 1
        return between(own, self.ablated, self.m, self.place)


class AblatedModel:
    """Runs of a model under factors for every piece of a universe. A context manager: leaving it puts the model back.

    Args:
        model, universe: what is run, and what its pieces are. decomposition: whose subcomponents they are, if they are.
        tokens, keep: the prompts, and where they are real (None: everywhere).
    """

    def __init__(
        self,
        model: nn.Module,
        node_set: NodeSet,
        tokens: Int[Tensor, "batch pos"],
        token_mask: Bool[Tensor, "batch pos"] | None,
        decomposition: Decomposition | None = None,
    ) -> None:
        self.model, self.node_set, self.tokens, self.token_mask = model, node_set, tokens, token_mask
        self.decomposition = decomposition
        self.adapter = adapt(model)
        self._stack = ExitStack()
        self._slices = node_set.slices()

    def __enter__(self) -> AblatedModel:
        if self.decomposition is None:
            if (other := attached_to(self.model)) is not None:
                self._stack.enter_context(other.paused())
        elif (attached := attachment_of(self.decomposition, self.model)) is None:
            self._stack.enter_context(self.decomposition.attach(self.model, hooks=("component_acts", "delta_mask")))
        elif attached.runs_masked:
            raise ValueError("The model runs masked here: audit it outside of masked() and keep_only().")
        # After attaching: what is put aside comes back as the dictionaries it was in.
        self._stack.enter_context(frozen(self.adapter))
        self._stack.enter_context(users_hooks_aside(self.adapter))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def clean(self, tokens: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        """Logits of the model as it is (on its own prompts unless others are given)."""
        with torch.no_grad():
            return (
                self.adapter.run(self.tokens, self.token_mask)
                if tokens is None
                else self.adapter.run(tokens, token_mask)
            )

    @torch.no_grad()
    def references(
        self, reference: Reference, tokens: Tensor, token_mask: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Ablated values of every place, by hook.

        Raises:
            ValueError: resampling needs another prompt of the same length.
        """
        zero = torch.zeros((), device=tokens.device)
        if reference == "zero":
            return {p.hook: zero for p in self.node_set.places}
        found: dict[str, Tensor] = {}

        def see(name: str, own: Tensor, hook: Any) -> None:
            found[name] = own.detach().clone()

        hooks = [(p.hook, partial(see, p.hook)) for p in self.node_set.places if p.kind != "delta"]
        with self.model.hooks(fwd_hooks=hooks):  # type: ignore[operator]
            self.clean(tokens, token_mask)
        self._require([h for h, _ in hooks if h not in found])
        if reference == "mean":
            real = (
                torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device) if token_mask is None else token_mask
            )
            values = {h: own[real].mean(0)[None, None] for h, own in found.items()}
        else:
            rows = self._others(tokens, token_mask, generator)
            values = {h: own[rows] for h, own in found.items()}
        return {p.hook: values.get(p.hook, zero) for p in self.node_set.places}

    def _others(self, tokens: Tensor, token_mask: Tensor | None, generator: torch.Generator) -> Int[Tensor, " batch"]:
        """For each prompt another row of the reference prompts, one that is real wherever the prompt is."""
        batch, n = len(self.tokens), len(tokens)
        if tokens.shape[1] != self.tokens.shape[1]:
            raise ValueError(
                f"Prompts have {self.tokens.shape[1]} tokens and reference prompts {tokens.shape[1]}: resampling takes values at "
                "the same position, so give reference prompts of the same length."
            )
        same = tokens is self.tokens or (tokens.shape == self.tokens.shape and bool((tokens == self.tokens).all()))
        if same and n < 2:
            raise ValueError("There is one prompt, and resampling needs another: give more, or reference=...")
        if token_mask is not None:
            here = torch.ones_like(self.tokens, dtype=torch.bool) if self.token_mask is None else self.token_mask
            fits = (token_mask[None] | ~here[:, None]).all(-1).float().cpu()
            if same:
                fits.fill_diagonal_(0)
            alone = (fits.sum(1) == 0).nonzero().flatten().tolist()
            if alone:
                raise ValueError(
                    f"Prompts {alone} have no other prompt of at least their length to take values from: give prompts of one "
                    "length, or longer reference prompts."
                )
            return torch.multinomial(fits, 1, generator=generator)[:, 0].to(tokens.device)
        if same:
            shift = torch.randint(1, n, (1,), generator=generator).item()
            return ((torch.arange(batch) + int(shift)) % n).to(tokens.device)
        return torch.randint(n, (batch,), generator=generator).to(tokens.device)

    def run(
        self, m: Float[Tensor, "#batch #pos total"], ablated: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits with the pieces' factors ``m``.

        Raises:
            RuntimeError: a hook did not run exactly once.
        """
        hooks = [
            _Hook(place, ablated[place.hook], m[..., own])
            for place, own in zip(self.node_set.places, self._slices, strict=True)
        ]
        with self.model.hooks(fwd_hooks=[(h.place.hook, h) for h in hooks]):  # type: ignore[operator]
            logits = self.adapter.run(self.tokens, self.token_mask)
        self._require([h.place.hook for h in hooks if h.fired != 1])
        return logits

    @staticmethod
    def _require(missing: Sequence[str]) -> None:
        if missing:
            raise RuntimeError(
                f"These hooks did not run exactly once in a pass, so nothing would be ablated: {', '.join(missing)}."
            )
