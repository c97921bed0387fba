"""The checks of a cell. Each takes a Case and raises AssertionError with what differs and by how much.

1. Masks and Δ's at 1, and every hook listening, change no bit of the logits.
2. Masks constant over positions are a model whose weights were edited by hand.
3. Masks of every position are an independent float64 forward.
4. Scaled component activations are an edit along U.
5. Gradients reach V, U and masks, and the model's weights as if nothing were attached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tests.matrix import oracle
from tests.matrix.families import FAMILIES
from tests.matrix.models import Kind, build, plain, tokens, where
from tests.tiny import draw
from tl_vpd import Decomposition
from tl_vpd.adapters import adapt
from tl_vpd.forward import MaskedModel
from tl_vpd.masking import Masks, SiteMask

DELTA = 0.3
LOOSE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
"""Of low precision: how far masked and edited logits may differ (root mean square), as a share of the logits' spread."""


@dataclass
class Case:
    """A model as a cell wants it, its decomposition, and how to make the same model once more."""

    family: str
    kind: Kind
    dtype: torch.dtype
    model: Any
    vpd: Decomposition
    again: Callable[[nn.Module | None], Any]
    """Builds the same model with the same flags, from a given source if there is one."""
    processed: bool

    @cached_property
    def tokens(self) -> Tensor:
        """Two prompts of seven tokens."""
        return tokens()

    @cached_property
    def untouched(self) -> Any:
        """The same model once more, which nothing was ever attached to."""
        return self.again(None)

    @cached_property
    @torch.no_grad()
    def clean(self) -> Tensor:
        """The untouched model's logits."""
        return self.logits(self.untouched)

    @cached_property
    def tolerance(self) -> float:
        """1e-10 in float64 throughout, 1e-4 where anything is in float32; low precision by the logits' spread."""
        if self.dtype in LOOSE:
            return LOOSE[self.dtype]
        exact = self.dtype == torch.float64 and oracle.in_float64_throughout(self.untouched, self.tokens)
        return 1e-10 if exact else 1e-4

    def logits(self, model: Any = None, **arguments: Any) -> Tensor:
        """Logits of the case's model, or of another."""
        return oracle.logits_of((self.model if model is None else model)(self.tokens, **arguments))

    def edited(self, masks: Mapping[str, tuple[Tensor, float]]) -> Any:
        """The same model with ``V diag(m) U + m_Δ (W − V U)`` for every weight.

        A bridge's weights are edited in transformers' (or the native) model before it is wrapped, unless they are processed.
        """
        family = FAMILIES[self.family]
        new = {
            site: oracle.edit(oracle.read(self.model, site), self.vpd.V[site], self.vpd.U[site], mask, delta)
            for site, (mask, delta) in masks.items()
        }
        if self.kind == "HookedTransformer" or self.processed:
            model = self.again(None)
            for site, W in new.items():
                oracle.write(model, site, W)
            return model
        source, places = plain(family, self.kind, self.dtype), where(family, self.kind)
        for site, W in new.items():
            oracle.write_source(source, places[site], W)
        return self.again(source)

    def masks(self, shape: tuple[int, ...] | None, seed: int = 0) -> Masks:
        """Random masks: constant over positions with Δ at 0.3 (shape None), or of every position."""
        results = {}
        for i, (site, C) in enumerate(self.vpd.counts.items()):
            if shape is None:
                delta = torch.full(self.tokens.shape, DELTA, dtype=torch.float64)
                results[site] = SiteMask(draw(C, seed=seed + i).expand(*self.tokens.shape, C), delta)
            else:
                results[site] = SiteMask(draw(*shape, C, seed=seed + i), draw(*shape, seed=seed + 100 + i))
        return Masks(results)

    def parameters(self) -> list[nn.Parameter]:
        """The weights the model trains."""
        return list(getattr(self.model, "original_model", self.model).parameters())


def close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises AssertionError unless the largest difference is within the tolerance (times 1 + the size); see ``LOOSE``."""
    difference = (got - expected).abs() / (1 + expected.abs())
    largest = float(difference.max())
    if got.dtype in LOOSE:
        largest = float((got - expected).float().square().mean().sqrt() / (expected.max() - expected.min()))
    assert largest <= tolerance, f"{what}: differs by {largest:.3g}, allowed {tolerance:.3g}"


def moved(what: str, got: Tensor, clean: Tensor) -> None:
    """Raises AssertionError if the logits hardly moved: then agreement would say nothing."""
    assert float((got - clean).abs().max()) > 1e-2 * float(clean.std()), f"{what}: the logits did not move"


@torch.no_grad()
def weights_are_read(case: Case) -> None:
    """The adapter's weights are the model's own."""
    adapter = adapt(case.model)
    for site in case.vpd.sites:
        W = oracle.read(case.model, site)
        assert torch.equal(adapter.weight(site), W), f"{site}: the adapter reads another weight"


@torch.no_grad()
def ones_change_no_bit(case: Case) -> None:
    """Check 1."""
    model, vpd, clean = case.model, case.vpd, case.clean
    assert torch.equal(case.logits(), clean), "the model itself is not the same twice"
    _, plain_cache = model.run_with_cache(case.tokens)
    plain_cache = dict(plain_cache)
    ones = Masks(
        {n: SiteMask(torch.ones(*case.tokens.shape, C), torch.ones(case.tokens.shape)) for n, C in vpd.counts.items()}
    )
    with vpd.attach(model) as attached:
        assert torch.equal(case.logits(), clean), "attached and idle"
        logits, cache = model.run_with_cache(case.tokens)
        assert torch.equal(oracle.logits_of(logits), clean), "with every hook listening"
        other = [k for k in plain_cache if not _same(cache[k], plain_cache[k])]
        assert not other, f"attached, these activations are others: {other[:4]}"
        missing = {
            s.hook_name(k) for s in vpd.sites.values() for k in ("component_acts", "ci", "mask", "delta_mask")
        } - set(cache)
        assert not missing, f"not in the cache: {sorted(missing)[:4]}"
        for site, C in vpd.counts.items():
            shape = tuple(cache[vpd.sites[site].hook_name("component_acts")].shape)
            assert shape == (*case.tokens.shape, C), f"{site}: component_acts are {shape}"
        with attached.masked("unmasked", delta=1.0):
            assert torch.equal(case.logits(), clean), "masked with ones"
            assert torch.equal(oracle.logits_of(model.run_with_cache(case.tokens)[0]), clean), (
                "masked with ones, cached"
            )
        hooked = model.run_with_hooks(case.tokens, fwd_hooks=vpd.mask_hooks(ones))
        assert torch.equal(oracle.logits_of(hooked), clean), "hooks that set ones"
    with MaskedModel(vpd, model) as masked_model:
        assert torch.equal(masked_model.masked(case.tokens, ones), clean), "tapped with ones"
    assert torch.equal(case.logits(), clean), "after detaching"


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


@torch.no_grad()
def constant_masks_are_edited_weights(case: Case) -> None:
    """Check 2."""
    masks = case.masks(None)
    expected = case.logits(case.edited({site: (site_mask.mask[0, 0], DELTA) for site, site_mask in masks.items()}))
    moved("edited weights", expected, case.clean)
    for how, got in masked_logits(case, masks).items():
        close(f"constant masks, {how}", got, expected, case.tolerance)


def masked_logits(case: Case, masks: Masks) -> dict[str, Tensor]:
    """Logits under masks in every way there is to set them."""
    results: dict[str, Tensor] = {}
    with case.vpd.attach(case.model) as attached:
        with attached.masked(masks):
            results["as a context"] = case.logits()
        results["as hooks"] = oracle.logits_of(
            case.model.run_with_hooks(case.tokens, fwd_hooks=case.vpd.mask_hooks(masks))
        )
    with MaskedModel(case.vpd, case.model) as masked_model:
        results["tapped"] = masked_model.masked(case.tokens, masks)
    return results


@torch.no_grad()
def masks_of_positions_are_an_independent_forward(case: Case) -> None:
    """Check 3 (in float64; a bridge's processed weights are written into a transformers model)."""
    family, masks = FAMILIES[case.family], case.masks(tuple(case.tokens.shape))
    if family.convert is None and case.kind == "HookedTransformer":
        ones = Masks({n: SiteMask(torch.ones_like(m.mask), torch.ones_like(m.delta)) for n, m in masks.items()})
        unmasked, expected = (oracle.hand_written(case.model, case.tokens, case.vpd, m) for m in (ones, masks))
    else:
        source, places = plain(family, case.kind, torch.float64), where(family, case.kind)
        if case.processed:
            oracle.write_processed(source, places, case.model)
        unmasked = case.logits(source)
        with oracle.masked_source(source, places, case.vpd, masks):
            expected = case.logits(source)
    apart = float((unmasked - case.clean).abs().max())
    assert apart < 1e-5, f"the independent forward differs by {apart:.3g} without masks"
    moved("an independent forward", expected, case.clean)
    for how, got in masked_logits(case, masks).items():
        close(f"masks of positions, {how}", got, expected, 1e-10 if apart < 1e-12 else 1e-4)


@torch.no_grad()
def scaled_acts_are_an_edit_along_u(case: Case) -> None:
    """Check 4: ``a ← a ⊙ s`` at every site is ``W + V diag(s − 1) U``, which is ``m = s``, ``m_Δ = 1``."""
    scales = {site: 0.5 + draw(C, seed=40 + i) for i, (site, C) in enumerate(case.vpd.counts.items())}
    expected = case.logits(case.edited({site: (s, 1.0) for site, s in scales.items()}))
    moved("edit along U", expected, case.clean)

    def scaled(scale: Tensor) -> Callable[..., Tensor]:
        return lambda acts, hook: acts * scale.to(acts)

    with case.vpd.attach(case.model):
        hooks = [(case.vpd.sites[site].hook_name("component_acts"), scaled(s)) for site, s in scales.items()]
        got = oracle.logits_of(case.model.run_with_hooks(case.tokens, fwd_hooks=hooks))
    close("scaled activations", got, expected, case.tolerance)


def gradients_go_where_they_should(case: Case) -> None:
    """Check 5."""
    model, vpd = case.model, case.vpd
    weights = draw(*case.clean.shape, seed=9).to(case.dtype) - 0.5
    leaves = {
        site: parameters.mask.to(case.dtype).clone().requires_grad_() for site, parameters in case.masks((2, 7)).items()
    }
    masks = Masks({site: SiteMask(mask, None) for site, mask in leaves.items()})
    parameters = case.parameters()
    flags = [p.requires_grad for p in parameters]
    vpd.zero_grad()
    with MaskedModel(vpd, model) as masked_model:
        (masked_model.masked(case.tokens, masks) * weights).sum().backward()
    assert all(p.grad is None for p in parameters), "a tapped pass gave the model's weights gradients"
    assert [p.requires_grad for p in parameters] == flags, "requires_grad was left changed"
    for what, parts in (("V", vpd.V), ("U", vpd.U), ("masks", leaves)):
        without = [n for n in vpd.sites if parts[n].grad is None or not bool(parts[n].grad.any())]
        assert not without, f"no gradient reached {what} of {without[:3]}"
    vpd.zero_grad()

    def of_weights() -> list[Tensor | None]:
        return list(torch.autograd.grad((case.logits() * weights).sum(), parameters, allow_unused=True))

    for p in parameters:
        p.requires_grad_(True)
    try:
        expected = of_weights()
        assert sum(g is not None for g in expected) > len(vpd.sites) / 2, "the model itself has hardly any gradients"
        with vpd.attach(model) as attached:
            for how, context in (("idle", nullcontext()), ("masked with ones", attached.masked("unmasked", delta=1.0))):
                with context:
                    got = of_weights()
                _same_gradients(how, got, expected, case)
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)


def _same_gradients(how: str, got: list[Tensor | None], expected: list[Tensor | None], case: Case) -> None:
    names = [n for n, _ in getattr(case.model, "original_model", case.model).named_parameters()]
    relative = {torch.float64: 1e-9, torch.float32: 1e-4}.get(case.dtype, 5e-2)
    if case.tolerance > 1e-9 and case.dtype not in LOOSE:
        relative = max(relative, 1e-4)
    largest = max(float(g.abs().max()) for g in expected if g is not None)
    for name, a, b in zip(names, got, expected, strict=False):
        assert (a is None) == (b is None), f"{how}: {name} has {'no' if a is None else 'a'} gradient"
        if a is None or b is None:
            continue
        apart = float((a - b).abs().max())
        limit = 0.0 if how == "idle" else relative * largest
        assert apart <= limit, f"{how}: the gradient of {name} differs by {apart:.3g}, allowed {limit:.3g}"


CHECKS = (
    weights_are_read,
    ones_change_no_bit,
    constant_masks_are_edited_weights,
    scaled_acts_are_an_edit_along_u,
    gradients_go_where_they_should,
)
"""The checks of every cell; ``masks_of_positions_are_an_independent_forward`` is done once a family and class."""

OF_ACTS_AND_GRADIENTS = (scaled_acts_are_an_edit_along_u, gradients_go_where_they_should)
"""Left out of lean cells without a flag; cells with one run them."""

__all__ = ["CHECKS", "Case", "build", "masks_of_positions_are_an_independent_forward"]
