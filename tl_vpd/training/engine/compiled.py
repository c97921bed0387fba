"""The passes of a training step as compiled graphs.

A step's passes do the same operations every time, so each is written down once as a graph of tensor operations, forward and
backward together (``make_fx``), and compiled (``torch.compile``): elementwise work is fused into few loops, masks never reach
memory, and no Python, hook or autograd node runs between operations. The graphs are

    weights     W → faithfulness, gradients of V and U                           Δs are formed, no tokens
    clean       tokens → logits and every site's input                           the target, no gradients
    gamma       inputs → z                                                       Γ, but for the largest MLPs; backward too
    counts      z → the sums s_c, L0                                             one pass over z
    masked      tokens, z, sources → losses, gradients of V, U, g and sources    one for each kind of pass
    pullback    z, gradients of g and of s_c → the gradient of z                 one pass over z
    ascend      sources, moments, gradient → the same, updated                   one pass over sources

Losses, masks and gradients are those of ``EagerEngine`` to rounding. Unlike there, routed tokens have a fixed number of slots (shapes
must not depend on data; the rare pass that has more tokens runs as it does there), and softmax of the whole output is formed at
once (in blocks, where there are too many logits). A graph is made when its shapes are first met, and compared with the model
itself on other numbers before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tl_vpd.adapters import Unsupported
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.forward.traceable import Slots, TraceableMasks, slots
from tl_vpd.importance.chunked import ChunkedTransformers
from tl_vpd.importance.mlps import PerSubcomponentMLPs
from tl_vpd.importance.squash import LOWER_LEAKY, Squash
from tl_vpd.importance.transformer import SharedTransformer
from tl_vpd.losses import Penalty, faithfulness, unembedded_kl
from tl_vpd.losses.precision import at_least_float32
from tl_vpd.masking import PersistentSources
from tl_vpd.training.engine.eager import EVERY, CleanForward, EagerEngine, LossTerm, MaskInputs, Precision
from tl_vpd.training.engine.recording import TOLERANCE, Function, compiled
from tl_vpd.training.micro_batch import MicroBatch

WHOLE = 1 << 62
ROOM = 4.0
"""Standard deviations above the expected number of routed tokens that slots are made for: a site in 30,000 has more."""
UNROLLED = 32
"""Hidden units of Γ's MLPs up to which they are compiled, one after the other."""
SHORT = 128
"""Positions up to which attention on a CPU is written down as products and a softmax, whose loops are fused with others; the
one call that it is elsewhere costs twice as much there at 32 positions, and less from 256 on."""


_Span = tuple[tuple[int | None, int | None], tuple[int | None, int | None], float]
"""Of a loss: rows of the output, rows of the target they are compared with, weight."""


class _Given(NamedTuple):
    """The tensors that a masked graph takes."""

    tokens: Tensor
    token_mask: Tensor | None
    z: Tensor
    target: Tensor
    counted: Tensor | None
    sources: Tensor
    numbers: Tensor | None
    totals: Tensor
    grad_g: Tensor | None
    grad_sources: Tensor | None
    slots: Slots | None
    of_parts: tuple[Tensor, ...]


class CompiledEngine(EagerEngine):
    """``EagerEngine`` that run compiled graphs.

    Args:
        masked_model, kind, squash, precision, blocked_logits: as there. backend: of ``torch.compile``, or ``recorded``.

    Raises:
        Unsupported: the model's dtype is not that of V and U.
    """

    def __init__(
        self,
        masked_model: MaskedModel,
        kind: Literal["kl", "mse"] = "kl",
        squash: Squash = LOWER_LEAKY,
        *,
        precision: Precision = "float32",
        blocked_logits: bool | None = None,
        backend: str = "inductor",
    ) -> None:
        super().__init__(masked_model, kind, squash, precision=precision, blocked_logits=blocked_logits)
        own = next(self.decomposition.components.parameters()).dtype
        if masked_model.adapter.dtype != own:
            raise Unsupported(
                f"compile=True needs a target in the dtype of V and U, {own}, and this one is in {masked_model.adapter.dtype}: use "
                "model.float() (with precision='bfloat16' for fast products), or leave compile out."
            )
        self.backend = backend
        self.graphs: dict[Any, Function] = {}
        self.names = list(self.decomposition.site_axis.names)
        self._reads: dict[str, int] = {}
        self._pos = 0

    def faithfulness(
        self, weights: Mapping[str, Float[Tensor, "_ _"]], coefficient: float, *, relative: bool = False
    ) -> Float[Tensor, ""]:
        """The loss; its gradients, times the coefficient, go to V and U."""
        if not coefficient:
            return super().faithfulness(weights, coefficient, relative=relative)

        def squares(c: Tensor, *given: Tensor) -> Tensor:
            own, gathered = dict(zip(weights, given, strict=False)), given[len(weights) :]
            with torch.enable_grad():
                value = faithfulness(self.decomposition.components, own, relative=relative)
                gradients = torch.autograd.grad(c * value, self._parts(self.names))
            for into, gradient in zip(gathered, gradients, strict=True):
                into += gradient
            return value.detach()

        W = next(iter(weights.values()))
        c = torch.tensor(coefficient, dtype=W.dtype, device=W.device)
        found: Tensor = self._run("weights", squares, c, *weights.values(), *self._gradients_of_parts(self.names))
        return found

    def clean(
        self, part: MicroBatch, tokens: Tensor, token_mask: Bool[Tensor, "batch pos"] | None, penalty: Penalty
    ) -> CleanForward:
        """The target's output and Γ's values on a part of the batch."""
        own, kept = part.of(tokens), part.of(token_mask)
        assert own is not None
        self._decide(own, kept)
        self._pos = own.shape[1] if own.ndim > 1 else 0
        output, *inputs = self._run("clean", self._target, own, kept)
        z = self._gamma(inputs, kept)
        counted = z.detach(), kept, self._parameter(penalty)
        sums, l0 = self._run(("counts", penalty.kind), self._counts(penalty), *counted)
        return CleanForward(part, own, kept, self._distance(output, kept), z, sums, l0)

    def attack(
        self,
        seen: CleanForward,
        rows: slice,
        taken: MaskInputs,
        total: Tensor,
        *,
        grad_sources: Float[Tensor, "some C_and_deltas"],
    ) -> None:
        """The adversary's own gradient: that of the rows' share of a mean over ``total`` tokens, V, U and Γ constant."""
        if self._masked_graph(seen, rows, taken, [LossTerm(total, 1.0)], None, grad_sources) is None:
            super().attack(seen, rows, taken, total, grad_sources=grad_sources)

    def reconstruct(
        self,
        seen: CleanForward,
        taken: MaskInputs,
        shares: Sequence[LossTerm],
        *,
        grad_g: Float[Tensor, "batch *pos C_total"],
        grad_sources: Float[Tensor, "some C_and_deltas"] | None = None,
    ) -> list[Float[Tensor, ""]]:
        """The losses of one pass over all rows; the gradients of their weighted sum go to V and U, ``grad_g`` and the sources."""
        found = self._masked_graph(seen, EVERY, taken, shares, grad_g, grad_sources)
        if found is None:
            return super().reconstruct(seen, taken, shares, grad_g=grad_g, grad_sources=grad_sources)
        return found

    def into_gamma(
        self,
        seen: CleanForward,
        grad_g: Float[Tensor, "batch *pos C_total"],
        slope: Float[Tensor, " C_total"],
        penalty: Penalty,
    ) -> None:
        """Γ's gradients, from those of the importances and of the sums that minimality counts."""
        key = ("pullback", penalty.kind)
        arguments = seen.z.detach(), grad_g, slope, seen.token_mask, self._parameter(penalty)
        seen.z.backward(self._run(key, self._pullback(penalty), *arguments))

    def ascend(self, sources: PersistentSources, gradient: Tensor, lr: float, rows: slice, update: int) -> None:
        """Moves some rows of sources along their gradient."""
        sources.ascend(gradient, lr, rows, update=update, by=partial(self._run, "ascend", sources.ascended))

    # -- what is recorded --------------------------------------------------------------------------------------------

    def _target(self, tokens: Tensor, token_mask: Tensor | None) -> list[Tensor]:
        """The output, and the inputs of sites; a tensor that several sites read is there once (``_gamma`` knows which)."""
        with self._autocast(), self._cut():
            output, inputs = self.masked_model.clean(tokens, token_mask)
        found = {id(x): x for x in inputs.values()}
        self._reads = {name: list(found).index(id(x)) for name, x in inputs.items()}
        return [output, *found.values()]

    def _gamma(self, inputs: Sequence[Tensor], token_mask: Tensor | None) -> Tensor:
        def values(*arguments: Tensor | None) -> Tensor:
            *own, kept = arguments
            with self._autocast():
                z = self.decomposition.pre_sigmoid({n: own[i] for n, i in self._reads.items()}, kept)  # type: ignore[misc]
            return z.float() if z.dtype == torch.bfloat16 else z

        gamma = self.decomposition.gamma
        if isinstance(gamma, PerSubcomponentMLPs) and gamma.w_in.shape[1] <= UNROLLED:
            with gamma.computed_by(self._run):
                return values(*inputs, token_mask)
        if not isinstance(gamma, SharedTransformer | ChunkedTransformers):
            return values(*inputs, token_mask)
        return self._run("gamma", values, *inputs, token_mask, gradients=True)

    def _counts(self, penalty: Penalty) -> Function:
        def counts(z: Tensor, token_mask: Tensor | None, parameter: Tensor) -> tuple[Tensor, Tensor]:
            important = (z > 0).sum(-1)
            kept = None if token_mask is None else token_mask.flatten()
            sums = Penalty(penalty.kind, parameter, WHOLE).sums(z.flatten(0, -2), kept)
            return sums, (important if token_mask is None else important * token_mask).sum().float()

        return counts

    def _pullback(self, penalty: Penalty) -> Function:
        def pullback(z: Tensor, grad_g: Tensor, slope: Tensor, token_mask: Tensor | None, parameter: Tensor) -> Tensor:
            kept = None if token_mask is None else token_mask.flatten()
            of_g = grad_g.flatten(0, -2).clone()
            rows = Penalty(penalty.kind, parameter, WHOLE)
            return rows.pullback(z.flatten(0, -2), slope, kept, grad_g=of_g, squash=self.squash).view_as(z)

        return pullback

    def _masked_graph(
        self,
        seen: CleanForward,
        rows: slice,
        taken: MaskInputs,
        shares: Sequence[LossTerm],
        grad_g: Tensor | None,
        grad_sources: Tensor | None,
    ) -> list[Tensor] | None:
        """Losses. Gradients of sources are written, those of g, and with them those of V and U, added to what is there.

        None, and nothing done, if more tokens are routed than there are slots.
        """
        sites = tuple(self.names if taken.sites is None else taken.sites)
        routed: tuple[Tensor, ...] = ()
        if taken.routing is not None:
            routing = torch.stack([taken.routing[name].reshape(-1) for name in sites])
            found = slots(routing, room(taken.expected, routing.shape[1]))
            if found is None:
                return None
            routed = found
        spans = [((s.rows.start, s.rows.stop), (s.compared.start, s.compared.stop), s.weight) for s in shares]

        def masked(*tensors: Any) -> list[Tensor]:
            own, n = tensors[10:], len(routed)
            at = Slots._make(own[:n]) if n else None
            return self._gradients(sites, spans, _Given._make((*tensors[:10], at, own[n:])))

        distance = seen.distance.rows(rows)
        losses: list[Tensor] = self._run(
            ("masked", sites, str(spans)),
            masked,
            seen.tokens[rows],
            None if seen.token_mask is None else seen.token_mask[rows],
            seen.z.detach()[rows],
            distance.target,
            distance.token_mask,
            taken.sources,
            taken.rows,
            torch.stack([s.total for s in shares]),
            grad_g,
            grad_sources,
            *routed,
            *([] if grad_g is None else self._gradients_of_parts(sites)),
        )
        return losses

    def _gradients_of_parts(self, sites: Sequence[str]) -> list[Tensor]:
        """Where the gradients of V and U are gathered."""
        found = []
        for part in self._parts(sites):
            part.grad = torch.zeros_like(part) if part.grad is None else part.grad
            found.append(part.grad)
        return found

    def _gradients(self, sites: Sequence[str], spans: Sequence[_Span], given: _Given) -> list[Tensor]:
        """Losses; gradients go where ``given`` wants them."""
        site_axis, constant, z = self.decomposition.site_axis, given.grad_g is None, given.z
        sources, numbers = given.sources, given.numbers
        columns = {name: site_axis.slices[name] for name in sites}
        places = [site_axis.total + site_axis.names.index(name) for name in sites]
        own, rows = sources if numbers is None else sources[numbers], z.flatten(0, -2)
        at_slots = None if given.slots is None else dict(zip(sites, map(Slots, *given.slots), strict=True))

        def held(name: str, by_token: Tensor) -> Tensor:
            return by_token if at_slots is None else by_token[at_slots[name].token]

        leaves = {
            "g": [self.squash.importances(held(name, rows[:, at])) for name, at in columns.items()],
            "r": [held(name, own[:, at]).detach() for name, at in columns.items()],
            "delta": [held(n, own[:, at : at + 1]).detach() for n, at in zip(sites, places, strict=True)],
        }
        of_r = [] if given.grad_sources is None else [*leaves["r"], *leaves["delta"]]
        of_parts = [] if constant else self._parts(sites)
        asked = [*of_r, *([] if constant else leaves["g"]), *of_parts]
        for leaf in asked[: len(asked) - len(of_parts)]:
            leaf.requires_grad_()
        by_site = {what: dict(zip(sites, tensors, strict=True)) for what, tensors in leaves.items()}
        run = TraceableMasks(
            by_site["g"],
            by_site["r"],
            by_site["delta"],
            z.shape[:-1],
            at_slots,
        )
        with torch.enable_grad():
            with self._autocast(), self._cut():
                output = self.masked_model.masked(given.tokens, run, given.token_mask, constant_weights=constant)
            losses = []
            for (own_rows, compared, _), total in zip(spans, given.totals.unbind(), strict=True):
                at, against = slice(*own_rows), slice(*compared)
                real = None if given.counted is None else given.counted[against]
                losses.append(self._summed(given.target[against], output[at], real) / total)
            whole = torch.stack([weight * loss for (*_, weight), loss in zip(spans, losses, strict=True)]).sum()
        gradients = [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(asked, torch.autograd.grad(whole, asked, allow_unused=True), strict=True)
        ]
        if at_slots is not None:
            # All but those of V and U are of slots, site by site again and again.
            for i in range(len(asked) - len(of_parts)):
                gradients[i] = at_slots[sites[i % len(sites)]].gradient(gradients[i])
        if given.grad_sources is not None:
            concatenated = self._packed_sources(gradients[: len(of_r)], sites, sources, numbers)
            given.grad_sources.copy_(concatenated[: len(given.grad_sources)])
        if given.grad_g is not None:
            of_g, of_weights = gradients[len(of_r) : len(of_r) + len(sites)], gradients[len(of_r) + len(sites) :]
            of_sites, before = dict(zip(sites, of_g, strict=True)), given.grad_g.flatten(0, -2)
            added = [
                before[:, at] + of_sites[n] if n in of_sites else before[:, at] for n, at in site_axis.slices.items()
            ]
            given.grad_g.copy_(torch.cat(added, dim=1).view_as(given.grad_g))
            for gathered, gradient in zip(given.of_parts, of_weights, strict=True):
                gathered += gradient
        return [loss.detach() for loss in losses]

    def _summed(self, target: Tensor, output: Tensor, token_mask: Tensor | None) -> Float[Tensor, ""]:
        """The distance summed over real tokens, as plain operations."""
        if self.unembedding is not None:
            n = output[..., 0].numel() if token_mask is None else token_mask.sum()
            return unembedded_kl(target, output, self.unembedding, token_mask) * n
        if self.kind == "kl":
            each = (target.exp() * (target - at_least_float32(output).log_softmax(-1))).sum(-1)
        else:
            each = (at_least_float32(output) - target).square().mean(-1)
        return (each if token_mask is None else each * token_mask).sum()

    def _packed_sources(
        self, gradients: Sequence[Tensor], sites: Sequence[str], sources: Tensor, numbers: Tensor | None
    ) -> Tensor:
        """The gradients of sites' sources and Δs side by side, as sources are concatenated; added up where tokens share a row."""
        n = len(gradients[0])
        of = dict(zip([*sites, *(("delta", name) for name in sites)], gradients, strict=True))
        blocks = [of.get(name, gradients[0].new_zeros(n, C)) for name, C in self.decomposition.site_axis.counts.items()]
        blocks += [of.get(("delta", name), gradients[0].new_zeros(n, 1)) for name in self.names]
        concatenated = torch.cat(blocks, dim=1)
        return concatenated if numbers is None else torch.zeros_like(sources).index_add(0, numbers, concatenated)

    # -- recording ---------------------------------------------------------------------------------------------------

    def _parts(self, sites: Sequence[str]) -> list[Tensor]:
        V, U = self.decomposition.V, self.decomposition.U
        return [*(V[name] for name in sites), *(U[name] for name in sites)]

    def _attention(self) -> AbstractContextManager[None]:
        """How attention is written down."""
        short = self._pos <= SHORT and self.precision == "float32" and self.decomposition.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if short else nullcontext()

    def _parameter(self, penalty: Penalty) -> Tensor:
        dtype = next(self.decomposition.components.parameters()).dtype
        return torch.tensor(float(penalty.parameter), dtype=dtype, device=self.decomposition.device)

    def _run(self, what: Any, function: Function, *arguments: Tensor | None, gradients: bool = False) -> Any:
        """What a function gives, from its compiled graph; made at the first call with arguments of these shapes."""
        key = what, tuple(None if a is None else (a.shape, a.dtype, a.stride()) for a in arguments)
        if key not in self.graphs:
            with self._attention():
                self.graphs[key] = compiled(
                    function, arguments, self.backend, TOLERANCE[self.precision], gradients=gradients
                )
        with torch.set_grad_enabled(gradients):
            return self.graphs[key](*(a for a in arguments if a is not None))


def room(share: float, tokens: int) -> int:
    """Slots for a share of tokens that is expected to be routed, drawn for each token on its own: a multiple of 8, or all.

    >>> room(0.5, 512), room(0.5, 16), room(1.0, 512)
    (304, 16, 512)
    """
    wanted = share * tokens + ROOM * math.sqrt(share * (1 - share) * tokens)
    return min(tokens, 8 * math.ceil(wanted / 8))
