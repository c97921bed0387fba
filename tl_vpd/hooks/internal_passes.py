"""Runs of an attached model on the package's behalf: clean passes and what is computed from them.

Users' temporary hooks are not called in them, nor are this package's HookPoints, and the model is in eval mode. What is known of
a user's call (its tokens, its attention mask) travels with the call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.versions import HookPoint
from tl_vpd.forward import CastWeights, SitePass, SiteTaps
from tl_vpd.forward.quiet import in_eval_mode, users_hooks_aside
from tl_vpd.hooks.prefixes import CleanPrefix
from tl_vpd.hooks.site_hooks import listening, returned
from tl_vpd.masking import Masks

HookPoints = Mapping[str, Mapping[str, HookPoint]]
"""HookPoints by site and kind."""


@dataclass
class Call:
    """One call of the model's ``forward`` by its user.

    Attributes:
        arguments: of the call.
        keywords: of the call.
        tokens: as the layers get them, noted in the pass.
        attention_mask: as the layers get it, noted in the pass.
        masks: those of a mode that needs a clean pass.
        padding: the token mask, once it is known, in a tuple.
        prefix: of the KV cache that the call uses, where importances are needed (None: there is no cache).
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    tokens: Tensor | None = None
    attention_mask: Tensor | None = None
    masks: Masks | None = None
    padding: tuple[Tensor | None] | None = None
    prefix: CleanPrefix | None = None


class InternalPasses:
    """An attached model as the package runs it.

    Args:
        adapter: of the model.
        weights: V, U and Γ in the model's dtype and on its device.
        hook_points: what is not there is never listened to.
    """

    def __init__(self, adapter: Adapter, weights: CastWeights, hook_points: HookPoints) -> None:
        self.adapter, self.weights, self.hook_points = adapter, weights, hook_points
        self.taps = SiteTaps(adapter, list(weights.sites), weights.streams)
        self._call: Call | None = None
        self._inside = False

    def forget(self) -> None:
        """Forgets what a pass has left that was interrupted while it ended."""
        self._call, self._inside, self.taps.current = None, False, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model runs as if nothing were attached, even from a hook in the middle of a forward pass."""
        before = self._call, self._inside
        self._call, self._inside = None, True
        try:
            with self.taps.during(None):
                yield
        finally:
            self._call, self._inside = before

    @contextmanager
    def internal(self, run: SitePass) -> Iterator[None]:
        """Inside, calls of the model are on the package's behalf, and their sites are read and replaced as ``run`` says."""
        before, self._inside = self._inside, True
        try:
            with in_eval_mode(self.adapter), users_hooks_aside(self.adapter), self.taps.during(run):
                yield
        finally:
            self._inside = before

    def see_tokens(self, tokens: Tensor | None) -> None:
        """Notes the tokens that the layers get."""
        if self._call is not None:
            self._call.tokens = tokens

    def see_attention_mask(self, attention_mask: Tensor | None) -> None:
        """Notes the attention mask that the layers get."""
        if self._call is not None:
            self._call.attention_mask = attention_mask

    def clean(self, call: Call, return_type: str | None = None) -> tuple[Any, SitePass]:
        """A clean pass on a call's arguments: its output, and its pass with every site's input."""
        run, arguments, keywords = SitePass(collect=True), call.arguments, call.keywords
        if call.prefix is not None:
            if call.prefix.cache is None:
                call.prefix.cache = copy.deepcopy(self.adapter.kv_cache(arguments, keywords))
            arguments, keywords = self.adapter.with_kv_cache(arguments, keywords, call.prefix.cache)
        with self.internal(run), torch.no_grad():
            output = self.adapter.call(arguments, keywords, return_type)
        self.taps.check_each_once(run)
        self.extend_prefix(call, run)
        return output, run

    def extend_prefix(self, call: Call, run: SitePass) -> None:
        """Notes the tokens of a clean pass as those of the call's KV cache, if it uses one."""
        if call.prefix is not None:
            batch, n = next(iter(run.inputs.values())).shape[:2]
            token_mask = self.token_mask(call)  # where a call starts from embeddings, of the whole prefix
            call.padding = (None if token_mask is None else token_mask[:, -n:],)
            call.prefix.extend(batch, n, call.padding[0])

    def importances(self, call: Call, run: SitePass) -> Float[Tensor, "batch *pos C_total"]:
        """Γ on the inputs of a clean pass, sent through the users' hooks on ``hook_ci``."""
        if call.prefix is None:
            g = self.weights.importances(run.inputs, self.token_mask(call))
        else:
            g = self.weights.importances(run.inputs, call.prefix.token_mask, call.prefix.gamma)
            call.prefix.check_gamma()
        listeners = {name: self.listening(name, "ci") for name in self.weights.sites}
        if not any(listeners.values()):
            return g
        by_site = self.weights.site_axis.split_sites(g)
        for name, point in listeners.items():
            if point is not None:
                ci = by_site[name]
                by_site[name] = returned(f"the importances of {name}", point(ci.clone()), ci)
        return torch.cat(list(by_site.values()), dim=-1)

    def token_mask(self, call: Call) -> Bool[Tensor, "batch pos"] | None:
        """False at the call's padding (None: no padding); to be read when the layers have their tokens."""
        if call.padding is None:
            by_user = self.adapter.by_name(call.arguments, call.keywords).get("attention_mask") is not None
            cached = self.adapter.kv_cache(call.arguments, call.keywords) is not None
            mask = self.adapter.padding_of_call(call.tokens, call.attention_mask, by_user=by_user, cached=cached)
            call.padding = (mask,)
        return call.padding[0]

    def listening(self, name: str, kind: str) -> HookPoint | None:
        """A site's HookPoint if anybody listens to it."""
        return listening(self.hook_points.get(name, {}), kind)

    def wants_importances(self) -> bool:
        """Whether anybody listens to a ``hook_ci``."""
        return any(self.listening(name, "ci") for name in self.hook_points)
