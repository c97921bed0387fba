"""Calls of the rooms that act on a model: attaching, masks, ablations, importances, files of decompositions."""

from __future__ import annotations

from typing import Any

import torch

import tl_vpd
from tests.campaigns.calls.kinds import (
    SEED,
    Kind,
    any_module,
    any_of,
    boolean,
    choice,
    device,
    either,
    factor,
    factor_or_tensor,
    floating_dtype,
    folder_to_write,
    how_many,
    integer,
    number,
    only,
    optional,
    own,
    path_to_read,
    positions,
    sequence,
    subcomponents,
    text,
)
from tests.campaigns.calls.world import IN, Call, Q, World, call
from tl_vpd import Masks, SiteMask, hooks, masking

KINDS = ("component_acts", "ci", "mask", "delta_mask")


def calls(w: World) -> list[Call]:
    """The table."""
    return [*_attached(w), *_hook_functions(w), *_measured(w), *_files(w), *_masks(w), *_addresses(w)]


def _attached(w: World) -> list[Call]:
    where = {"sites": (None, w.sites), "pos": (None, positions(7))}

    def attach(model: Any, **options: Any) -> Any:
        with w.vpd.attach(model, **options), torch.no_grad():
            return w.model(w.tokens)

    def masked(mode: Any, **options: Any) -> Any:
        def inside(attached: Any) -> Any:
            with attached.masked(mode, **options):
                return w.model(w.tokens)

        return w.attached(inside)

    def of_mode(name: str, **arguments: Any) -> Call:
        return call(lambda **o: masked(name, **o), f"hooks: masked({name!r})", **arguments, **where)

    def keep_only(subcomponents: Any, **options: Any) -> Any:
        def inside(attached: Any) -> Any:
            with attached.keep_only(subcomponents, **options):
                return w.model(w.tokens)

        return w.attached(inside)

    def ablated(subcomponents: Any, **options: Any) -> Any:
        def inside(attached: Any) -> Any:
            with attached.ablated(subcomponents, **options):
                return w.model(w.tokens)

        return w.attached(inside)

    masks = {Q: torch.full((6,), 0.5, dtype=torch.float64)}
    function = lambda site, acts: torch.ones_like(acts)  # noqa: E731
    modes = choice("unmasked", "stochastic", "rounded", "ci", "adversarial", "zero")
    delta = optional(any_of(factor, choice("drawn")))
    address = subcomponents(w.counts)
    return [
        call(
            attach,
            "hooks: attach",
            model=(w.model, only(w.model)),
            sites=(None, w.sites),
            hooks=(KINDS, sequence(choice(*KINDS), minimum=0, other=choice(*KINDS))),
            check_weights=(True, boolean),
        ),
        call(masked, "hooks: masked", mode=("ci", modes)),
        call(masked, "hooks: masked(masks)", mode=(masks, own(masks)), sites=(None, w.sites)),
        call(masked, "hooks: masked(function)", mode=(function, own(function)), **where),
        of_mode("rounded", threshold=(0.25, optional(number(0, 1))), delta=(0.5, delta)),
        of_mode("ci", delta=(0.5, delta)),
        of_mode("stochastic", seed=(3, optional(SEED))),
        of_mode(
            "adversarial",
            seed=(3, optional(SEED)),
            steps=(2, optional(integer(1))),
            step_size=(0.5, optional(number(above=0))),
        ),
        call(
            keep_only,
            "hooks: keep_only",
            subcomponents=([f"{Q}:1"], either(address)),
            rest=("zero", choice("zero", "stochastic", "adversarial")),
            **where,
        ),
        call(
            lambda **o: keep_only(f"{Q}:1", rest="stochastic", **o),
            "hooks: keep_only(stochastic)",
            seed=(3, optional(SEED)),
        ),
        call(
            ablated,
            "hooks: ablated",
            subcomponents=([f"{Q}:1"], address),
            pos=(None, positions(7)),
            amount=(0.5, factor),
        ),
        call(hooks.attachment_of, decomposition=w.target["decomposition"], model=(w.model, any_module)),
        call(hooks.attached_to, model=(w.model, any_module)),
    ]


def _hook_functions(w: World) -> list[Call]:
    masks = {Q: torch.full((6,), 0.5, dtype=torch.float64)}
    decomposition = {"decomposition": (w.vpd, only(w.vpd))}
    values = {Q: torch.full((6,), 0.5, dtype=torch.float64)}
    address = subcomponents(w.counts)
    return [
        call(
            lambda **o: w.hooked(lambda: hooks.mask_hooks(**o)),
            "hooks: mask_hooks",
            **decomposition,
            masks=(masks, own(masks)),
        ),
        call(
            lambda **o: w.hooked(lambda: hooks.delta_hooks(**o)),
            "hooks: delta_hooks",
            **decomposition,
            value=(0.5, factor),
            sites=(None, w.sites),
            pos=(None, positions(7)),
        ),
        call(
            lambda **o: w.hooked(lambda: hooks.ablation_hooks(**o)),
            "hooks: ablation_hooks",
            **decomposition,
            subcomponents=(f"{Q}:1", address),
            pos=([2], positions(7)),
            amount=(0.5, factor),
            values=(values, optional(only(values))),
        ),
    ]


def _measured(w: World) -> list[Call]:
    modes = choice("unmasked", "stochastic", "rounded", "ci", "zero")
    acts = w.vpd.component_acts(w.model, w.tokens)
    return [
        call(hooks.causal_importances, **w.of_prompts),
        call(hooks.component_acts, **w.of_prompts),
        call(acts.mean, by_position=(False, boolean)),
        call(
            lambda **o: dict(hooks.adversarial_masks(**o)),
            "hooks: adversarial_masks",
            **w.of_prompts,
            node_set=(f"{Q}:1", either(subcomponents(w.counts, none=True))),
            sites=(None, w.sites),
            seed=(3, optional(SEED)),
            steps=(2, optional(integer(1))),
            step_size=(0.5, optional(number(above=0))),
        ),
        call(
            lambda mode: dict(w.importances.masks(mode, seed=None)),
            "hooks: CausalImportances.masks",
            mode=("ci", modes),
        ),
        call(
            lambda **o: dict(w.importances.masks("rounded", **o)),
            "hooks: CausalImportances.masks(rounded)",
            threshold=(0.25, optional(number(0, 1))),
            delta=(0.5, optional(any_of(factor, choice("drawn")))),
        ),
        call(
            lambda **o: dict(w.importances.masks("stochastic", **o)),
            "hooks: CausalImportances.masks(stochastic)",
            seed=(3, optional(SEED)),
        ),
        call(w.importances.to_pandas, above=(0.25, number(maximum=1))),
        call(w.importances.top, k=(3, how_many)),
        call(lambda site: w.importances[site], "hooks: CausalImportances[…]", site=(Q, choice(*w.counts))),
        call(tl_vpd.sites, model=(w.model, only(w.model))),
    ]


def _files(w: World) -> list[Call]:
    V, U = dict(w.vpd.V), dict(w.vpd.U)
    gamma = {k.removeprefix("gamma/"): t for k, t in w.vpd.file_tensors().items() if k.startswith("gamma/")}
    return [
        call(
            lambda folder, dtype: w.vpd.save(folder, dtype=dtype) and None,
            "decomposition: save",
            folder=(w.folder / "new", folder_to_write),
            dtype=(None, floating_dtype),
        ),
        call(
            lambda folder, **o: dict(tl_vpd.Decomposition.load(folder, **o).file_tensors()),
            "decomposition: load",
            folder=(w.saved, path_to_read(w.saved)),
            device=("cpu", device),
            dtype=(None, floating_dtype),
        ),
        call(
            lambda device: tl_vpd.Decomposition.bundled(device=device) and None,
            "decomposition: bundled",
            device=("cpu", device),
        ),
        call(w.vpd.subcomponent, address=(f"{Q}:1", subcomponents(w.counts, lists=False))),
        call(
            lambda **o: dict(tl_vpd.Decomposition.from_tensors(**o).file_tensors()),
            "decomposition: from_tensors",
            model=(w.model, only(w.model)),
            V=(V, only(V)),
            U=(U, only(U)),
            gamma=(w.vpd.gamma_config, only(w.vpd.gamma_config)),
            gamma_tensors=(gamma, only(gamma)),
        ),
    ]


def _start(canonical: torch.Tensor) -> Kind:
    """This tensor; others may fit what else is given."""
    return lambda value: value is canonical or (None if isinstance(value, torch.Tensor) else False)


def _masks(w: World) -> list[Call]:
    mask, routed = torch.full((2, 7, 6), 0.5, dtype=torch.float64), torch.ones(2, 7, dtype=torch.bool)
    masks = {Q: mask}
    held = Masks(masks)
    g = w.importances.concatenated
    sources = torch.rand(g.shape[-1] + len(w.counts), dtype=g.dtype, generator=torch.Generator().manual_seed(0))
    start = sources.clone()
    attack = lambda masks: sum((m.mask.sum() for m in masks.values()), torch.zeros((), dtype=g.dtype))  # noqa: E731
    square = lambda r: (r * r).sum()  # noqa: E731
    axis = w.vpd.site_axis
    ascent = {"steps": (2, integer(0)), "step_size": (0.5, optional(number(above=0)))}
    return [
        call(lambda by_site: dict(Masks(by_site)), "masking: Masks", by_site=(masks, either(only(masks)))),
        call(
            SiteMask,
            "masking: SiteMask",
            mask=(mask, optional(_start(mask))),
            delta=(0.5, optional(factor_or_tensor)),
            routed=(routed, optional(_start(routed))),
        ),
        call(lambda sites: dict(held.only(sites)), "masking: Masks.only", sites=([Q], either(sequence(choice(Q))))),
        call(
            lambda **o: dict(masking.attacked_masks(g, axis, generator=torch.Generator().manual_seed(0), **o)),
            "masking: attacked_masks",
            loss=(attack, own(attack)),
            **ascent,
        ),
        call(
            masking.fresh_pgd,
            loss=(square, own(square)),
            start=(start, _start(start)),
            **ascent,
            momentum=(0.5, lambda v: None if number(1, 1)(v) else number(0, 1)(v)),
        ),
        call(
            lambda delta: dict(masking.constant_masks(g, delta, axis)),
            "masking: constant_masks",
            delta=(0.5, factor_or_tensor),
        ),
    ]


def _addresses(w: World) -> list[Call]:
    name = any_of(choice(Q), lambda v: None if isinstance(v, str) else False)
    return [
        call(tl_vpd.Subcomponent, site=(Q, name), index=(1, integer(0))),
        call(
            lambda text: tl_vpd.Subcomponent.parse(text),
            "site: Subcomponent.parse",
            text=(f"{IN}:1", lambda v: None if isinstance(v, tl_vpd.Subcomponent) else _address(v)),
        ),
        call(
            lambda **o: tl_vpd.Site(**o),
            "site: Site",
            name=(Q, name),
            d_in=(8, integer(1)),
            d_out=(8, integer(1)),
            n_heads=(2, either(integer(2, 2))),
            d_head=(4, either(integer(4, 4))),
        ),
        call(w.vpd.sites[Q].hook_name, what=("ci", either(text))),
    ]


def _address(value: Any) -> bool | None:
    if not isinstance(value, str):
        return False
    site, colon, index = value.rpartition(":")
    return None if colon and site and index.isdecimal() else False
