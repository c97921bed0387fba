"""A model in which a circuit runs whole and every other node lies somewhere between its value and an ablated one.

    value = ablated + m · (value in this pass − ablated),       m = 1 for the circuit, r ∈ [0, 1] for every other node

r = 0 is plain ablation. A node's value is that of this pass, downstream of the other ablations. Ablated values: 0; the mean
over the reference prompts' real tokens; those of another reference prompt at the same position, drawn (resample) or of the same
row (corrupted).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.analysis.audit.config import Reference
from tl_vpd.analysis.audit.edge_set import EdgeSet
from tl_vpd.analysis.audit.node_set import HookSite, NodeSet
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.quiet import frozen, users_hooks_aside
from tl_vpd.hooks import attached_to, attachment_of


def interpolated(
    value: Float[Tensor, "batch pos *rest"], ablated: Tensor, m: Float[Tensor, "#batch #pos node"], hook_site: HookSite
) -> Float[Tensor, "batch pos *rest"]:
    """``ablated + m (value − ablated)`` with every node's factor where the node lies; at m = 1 ``value`` to the bit."""
    if hook_site.kind == "delta":
        return m.to(value).expand_as(value).clone()
    if hook_site.kind == "head":
        heads, ablated_heads = (_by_head(t.to(value), hook_site.count) for t in (value, ablated))
        factors = m.to(value).unsqueeze(-1).expand_as(heads)
        return torch.lerp(ablated_heads.expand_as(heads), heads, factors).reshape(value.shape)
    return torch.lerp(ablated.to(value).expand_as(value), value, m.to(value).expand_as(value))


def _by_head(z: Tensor, heads: int) -> Tensor:
    """``[batch, pos, head, d_head]``, which some models flatten (a single number stays one)."""
    return z.unflatten(-1, (heads, -1)) if z.ndim == 3 else z


def reference_tokens(
    adapter: Adapter, reference_prompts: Any, tokens: Tensor, token_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The reference prompts' tokens, and their mask: the prompts themselves for None. The argument is named in what is raised."""
    if reference_prompts is None:
        return tokens, token_mask
    try:
        reference = adapter.tokens(reference_prompts)
    except (TypeError, ValueError) as error:
        raise type(error)(f"reference_prompts: {error}") from error
    return reference, adapter.padding(reference, None)


@dataclass(repr=False)
class _Hook:
    """Interpolates one hook's nodes by ``m``; counts how often it ran.

    TransformerLens asks every hook for its ``repr``, which would write out the tensors.
    """

    hook_site: HookSite
    ablated: Tensor
    m: Tensor = field(default_factory=lambda: torch.ones(1, 1, 1))
    fired: int = 0

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        self.fired += 1
        return interpolated(value, self.ablated, self.m, self.hook_site)


class AblatedModel:
    """Runs of a model under factors for every node of a set. A context manager: leaving it puts the model back.

    Args:
        model: the target.
        node_set: the nodes.
        tokens: the prompts.
        token_mask: False at padding (None: no padding).
        decomposition: whose subcomponents the nodes are (None: they are heads, MLPs, neurons or residual positions).
    """

    def __init__(
        self,
        model: nn.Module,
        node_set: NodeSet | EdgeSet,
        tokens: Int[Tensor, "batch pos"],
        token_mask: Bool[Tensor, "batch pos"] | None,
        decomposition: Decomposition | None = None,
    ) -> None:
        self.model, self.node_set, self.tokens, self.token_mask = model, node_set, tokens, token_mask
        self.decomposition = decomposition
        self.adapter = adapt(model)
        self._stack = ExitStack()

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

    @torch.no_grad()
    def clean(self) -> Float[Tensor, "batch pos vocab"]:
        """Logits of the model itself on the prompts."""
        return self.adapter.run(self.tokens, self.token_mask)

    @torch.no_grad()
    def references(
        self, reference: Reference, tokens: Tensor, token_mask: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Ablated values by hook.

        Args:
            reference: which values.
            tokens: the reference prompts.
            token_mask: False at their padding (None: no padding).
            generator: chooses the other prompts of resampling.

        Raises:
            ValueError: resampling needs another prompt of the same length, and corrupted values one for each prompt.
        """
        zero = torch.zeros((), device=tokens.device)
        if reference == "zero":
            return {site.hook: zero for site in self.node_set.hook_sites}
        if reference == "corrupted":
            self._require_pairs(tokens, token_mask)
        values = self.values(tokens, token_mask)
        if reference == "mean":
            real = torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask
            values = {hook: value[real].mean(0)[None, None] for hook, value in values.items()}
        elif reference == "resample":
            rows = self._other_prompts(tokens, token_mask, generator)
            values = {hook: value[rows] for hook, value in values.items()}
        return {site.hook: values.get(site.hook, zero) for site in self.node_set.hook_sites}

    def values(self, tokens: Tensor, token_mask: Tensor | None) -> dict[str, Tensor]:
        """The output of every hook but Δs' factors on these prompts."""
        values: dict[str, Tensor] = {}

        def read(name: str, value: Tensor, hook: Any) -> None:
            values[name] = value.detach().clone()

        names = [site.hook for site in self.node_set.hook_sites if site.kind != "delta"]
        with self.model.hooks(fwd_hooks=[(name, partial(read, name)) for name in names]):  # type: ignore[operator]
            self.adapter.run(tokens, token_mask)
        self._require([name for name in names if name not in values])
        return values

    def _require_pairs(self, tokens: Tensor, token_mask: Tensor | None) -> None:
        """Raises ValueError unless there is a reference prompt for every prompt, real wherever the prompt is."""
        if tokens.shape != self.tokens.shape or tokens is self.tokens:
            came = (
                "no reference_prompts" if tokens is self.tokens else f"reference_prompts of shape {tuple(tokens.shape)}"
            )
            raise ValueError(
                "Corrupted values are those of a reference prompt for every prompt, and prompts of shape "
                f"{tuple(self.tokens.shape)} came with {came}: give one for each row, of the same length, or a config with "
                "another reference."
            )
        if token_mask is not None and bool(
            (~token_mask & (True if self.token_mask is None else self.token_mask)).any()
        ):
            raise ValueError(
                "A reference prompt is padding where its prompt is not: give reference prompts as long as theirs."
            )

    def _other_prompts(
        self, tokens: Tensor, token_mask: Tensor | None, generator: torch.Generator
    ) -> Int[Tensor, " batch"]:
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
            real = torch.ones_like(self.tokens, dtype=torch.bool) if self.token_mask is None else self.token_mask
            fits = (token_mask[None] | ~real[:, None]).all(-1).float().cpu()
            if same:
                fits.fill_diagonal_(0)
            unmatched = (fits.sum(1) == 0).nonzero().flatten().tolist()
            if unmatched:
                raise ValueError(
                    f"Prompts {unmatched} have no other prompt of at least their length to take values from: give prompts of one "
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
        """Logits with the nodes' factors ``m``.

        Args:
            m: the factors, in the order of the node set.
            ablated: values by hook.

        Raises:
            RuntimeError: a hook did not run exactly once.
        """
        assert isinstance(self.node_set, NodeSet)
        hooks = [
            _Hook(hook_site, ablated[hook_site.hook], m[..., where])
            for hook_site, where in zip(self.node_set.hook_sites, self.node_set.slices(), strict=True)
        ]
        with self.model.hooks(fwd_hooks=[(h.hook_site.hook, h) for h in hooks]):  # type: ignore[operator]
            logits = self.adapter.run(self.tokens, self.token_mask)
        self._require([h.hook_site.hook for h in hooks if h.fired != 1])
        return logits

    @staticmethod
    def _require(missing: Sequence[str]) -> None:
        if missing:
            raise RuntimeError(
                f"These hooks did not run exactly once in a pass, so nothing would be ablated: {', '.join(missing)}."
            )
