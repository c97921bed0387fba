"""The authors' Γ as ours and back: transposed matrices, and blocks of rows and columns in another order of sites.

    ours = theirs[index]          theirs = ours[index.argsort()]

``index`` takes a concatenation over modules in lexicographic order to one over sites in the order of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from tl_vpd.formats.param_decomp.checkpoint import Checkpoint
from tl_vpd.formats.param_decomp.config import ROPE_BASE
from tl_vpd.formats.param_decomp.names import module_of
from tl_vpd.importance import DecomposedWeights, GammaConfig, build
from tl_vpd.site import Site

HIDDEN, OUTPUT = "layers.0", "layers.2"


class OnDemand(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for."""

    def __init__(self, made_by: Mapping[str, Callable[[], Tensor]]) -> None:
        self._made_by = made_by

    def __getitem__(self, name: str) -> Tensor:
        return self._made_by[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made_by)

    def __len__(self) -> int:
        return len(self._made_by)


def order_index(
    widths: Mapping[str, int], ours: Sequence[str], theirs: Sequence[str] | None = None
) -> Int[Tensor, " total"]:
    """Where each place of our concatenation over modules is in the authors'.

    Args:
        widths: of the modules by name.
        ours: the modules in our order.
        theirs: in theirs (None: lexicographic).
    """
    starts, start = {}, 0
    for module in sorted(widths) if theirs is None else theirs:
        starts[module], start = start, start + widths[module]
    return torch.cat([torch.arange(starts[m], starts[m] + widths[m]) for m in ours])


def our_gamma(
    checkpoint: Checkpoint, config: GammaConfig, sites: Sequence[str], d_in: Mapping[str, int]
) -> Mapping[str, Tensor]:
    """Γ's parameters as ours, each made when it is asked for.

    Args:
        checkpoint: the authors'.
        config: what the run's config says of Γ.
        sites: the decomposed sites in our order.
        d_in: input width by module.

    Raises:
        ValueError: Γ is of another kind or size than the config says.
    """
    modules = [module_of(site) or "" for site in sites]
    if config.kind == "per_subcomponent_mlps":
        return _our_mlps(checkpoint, config, modules)
    tensors = dict(checkpoint.transformer)
    if not tensors or checkpoint.mlps:
        raise ValueError(f"{checkpoint.path} has no shared transformer as Γ, which the run's config speaks of.")
    frequencies = {key: tensors.pop(key) for key in list(tensors) if key.endswith(".inv_freq")}
    shapes = _shapes(checkpoint, config, d_in, n_tensors=len(tensors))
    for key in sorted(tensors.keys() - shapes.keys()):
        raise ValueError(f"{checkpoint.path}: Γ has {key}, and by the run's config it does not.")
    for key, shape in shapes.items():
        came = tuple(tensors[key].shape) if key in tensors else "missing"
        if came != shape:
            raise ValueError(f"{checkpoint.path}: Γ's {key} is {came}, and by the run's config {shape}.")
    for key, stored in frequencies.items():
        _check_frequencies(checkpoint, key, stored, config)
    reads, writes = order_index(d_in, modules), order_index(checkpoint.counts, modules)
    made_by: dict[str, Callable[[], Tensor]] = {key: partial(tensors.__getitem__, key) for key in tensors}
    made_by["embed.weight"] = lambda: tensors["embed.weight"][:, reads]
    made_by["unembed.weight"] = lambda: tensors["unembed.weight"][writes]
    made_by["unembed.bias"] = lambda: tensors["unembed.bias"][writes]
    return OnDemand(made_by)


def _shapes(
    checkpoint: Checkpoint, config: GammaConfig, d_in: Mapping[str, int], *, n_tensors: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of a shared transformer's parameters by the run's config, no more blocks than there can be."""
    try:
        with torch.device("meta"):
            limited = config.model_copy(update={"n_blocks": min(config.n_blocks, n_tensors)})
            gamma = build(limited, [Site(name, d, 1) for name, d in d_in.items()], checkpoint.counts)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: by the run's config, Γ has sizes that do not fit: {error}") from error
    return {key: tuple(p.shape) for key, p in gamma.named_parameters()}


def their_gamma(decomposition: DecomposedWeights) -> dict[str, Tensor]:
    """Γ's parameters under the authors' keys.

    Raises:
        ValueError: the format has no such Γ.
    """
    config = decomposition.gamma_config
    ours = {name: p.detach() for name, p in decomposition.gamma.named_parameters()}
    modules = {site: module_of(site) or "" for site in decomposition.sites}
    if config.kind == "per_subcomponent_mlps":
        return _their_mlps(decomposition, ours, modules)
    if config.kind != "shared_transformer":
        raise ValueError(
            f"Γ is of kind {config.kind!r}, which the authors' format does not have: it has 'shared_transformer' and "
            "'per_subcomponent_mlps'."
        )
    if config.reads != "sites":
        raise ValueError(
            "Γ reads the residual stream, and the authors' format has one that reads the sites' inputs: train one with "
            "GammaConfig(reads='sites')."
        )
    if config.causal:
        raise ValueError(
            "Γ is causal, which the authors' format does not say: a reader would run it as a bidirectional one."
        )
    d_in = {modules[s.name]: s.d_in for s in decomposition.sites.values()}
    counts = {modules[name]: C for name, C in decomposition.counts.items()}
    reads, writes = (order_index(widths, list(modules.values())).argsort() for widths in (d_in, counts))
    prefix, device = "ci_fn._global_ci_fn.", decomposition.device
    theirs = {
        f"{prefix}_input_projector.W": ours["embed.weight"][:, reads.to(device)].T,
        f"{prefix}_input_projector.b": ours["embed.bias"],
        f"{prefix}_output_head.W": ours["unembed.weight"][writes.to(device)].T,
        f"{prefix}_output_head.b": ours["unembed.bias"][writes.to(device)],
    }
    for i in range(config.n_blocks):
        block, stored = f"blocks.{i}.", f"{prefix}_blocks.{i}."
        for name, key in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
            theirs[f"{stored}attn.{key}.weight"] = ours[f"{block}{name}.weight"]
        theirs[f"{stored}attn.rope.inv_freq"] = _frequencies(config)
        for name, key in (("mlp_in", "mlp.0"), ("mlp_out", "mlp.2")):
            theirs[f"{stored}{key}.W"] = ours[f"{block}{name}.weight"].T
            theirs[f"{stored}{key}.b"] = ours[f"{block}{name}.bias"]
    return theirs


def _our_mlps(checkpoint: Checkpoint, config: GammaConfig, modules: Sequence[str]) -> Mapping[str, Tensor]:
    if checkpoint.transformer or checkpoint.mlps.keys() != checkpoint.V.keys():
        raise ValueError(
            f"{checkpoint.path} does not have the small MLPs of every module, which the run's config speaks of."
        )
    h = config.hidden
    for module in modules:
        C, stored = checkpoint.counts[module], checkpoint.mlps[module]
        shapes = {f"{HIDDEN}.W": (C, 1, h), f"{HIDDEN}.b": (C, h), f"{OUTPUT}.W": (C, h, 1), f"{OUTPUT}.b": (C, 1)}
        wanted = {key.removeprefix("layers."): shape for key, shape in shapes.items()}
        came = {key: tuple(t.shape) for key, t in stored.items()}
        if came != wanted:
            raise ValueError(
                f"{checkpoint.path}: the small MLPs of {module} are {came}, and by the run's config {wanted}."
            )

    def joined(key: str, axis: int) -> Callable[[], Tensor]:
        return lambda: torch.cat([checkpoint.mlps[m][key].squeeze(axis) for m in modules])

    return OnDemand(
        {
            "w_in": joined("0.W", 1),
            "b_in": lambda: torch.cat([checkpoint.mlps[m]["0.b"] for m in modules]),
            "w_out": joined("2.W", 2),
            "b_out": joined("2.b", 1),
        }
    )


def _their_mlps(
    decomposition: DecomposedWeights, ours: Mapping[str, Tensor], modules: Mapping[str, str]
) -> dict[str, Tensor]:
    theirs = {}
    for site, where in decomposition.site_axis.slices.items():
        prefix = f"ci_fn._ci_fns.{modules[site].replace('.', '-')}."
        theirs[f"{prefix}{HIDDEN}.W"] = ours["w_in"][where].unsqueeze(1)
        theirs[f"{prefix}{HIDDEN}.b"] = ours["b_in"][where]
        theirs[f"{prefix}{OUTPUT}.W"] = ours["w_out"][where].unsqueeze(2)
        theirs[f"{prefix}{OUTPUT}.b"] = ours["b_out"][where].unsqueeze(1)
    return theirs


def _frequencies(config: GammaConfig) -> Tensor:
    d_head = (config.d_ci or 0) // config.n_heads
    return 1.0 / ROPE_BASE ** (torch.arange(0, d_head, 2).float() / d_head)


def _check_frequencies(checkpoint: Checkpoint, key: str, stored: Tensor, config: GammaConfig) -> None:
    expected = _frequencies(config)
    if stored.shape != expected.shape or not torch.allclose(stored.float(), expected, rtol=1e-2):
        raise ValueError(
            f"{checkpoint.path}: Γ's {key} are not the rotary frequencies of {config.n_heads} heads and base {ROPE_BASE:g}, "
            "which the run's config speaks of."
        )
