"""The decomposition that training starts from: freshly initialised, or with V, U and Γ of another one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.checks import config_of
from tl_vpd.components.initialise import start_at_channels
from tl_vpd.decomposition import Decomposition
from tl_vpd.files.versions import library_versions
from tl_vpd.forward.target_check import check_target, fingerprints
from tl_vpd.frozen import checked
from tl_vpd.site import select
from tl_vpd.training.config import VPDConfig, counts_for
from tl_vpd.training.ties import Ties, check_ties


def new_decomposition(model: nn.Module, config: VPDConfig) -> Decomposition:
    """A freshly initialised decomposition of a model, on its device.

    Args:
        model: the target.
        config: what is learned; ``sites``, ``C``, ``gamma``, ``init`` and ``seed`` matter here.

    Raises:
        Unsupported: the model has a layer or flag that cannot be decomposed.
        TypeError: it is not a model that an adapter knows.
        KeyError: a pattern of ``sites``, ``C`` or ``tied`` matches no site.
        ValueError: C or ties do not fit the model, or a weight is not finite.
    """
    config = checked(config_of(VPDConfig, config))
    adapter = adapt(model)
    names = select(config.sites, adapter.sites)
    sites = [adapter.sites[name] for name in names]
    weights = {name: _finite(name, adapter.weight(name)) for name in names}
    check_ties(config.tied, weights)
    decomposition = Decomposition(
        sites,
        counts_for(config, {s.name: s for s in sites}),
        config.gamma.resolved(adapter.d_model),
        fingerprints=fingerprints(adapter, names),
        record={
            "training": config.model_dump(mode="json"),
            "target": {
                "class": type(model).__name__,
                "name": str(getattr(getattr(model, "cfg", None), "model_name", "")),
                "processing": adapter.processing(),
            },
            "versions": library_versions(),
        },
        seed=config.seed,
    ).to(adapter.device)
    if config.init == "channels":
        for name in names:
            start_at_channels(decomposition.components, name, weights[name])
    if config.init_scale != 1:
        with torch.no_grad():
            for parameter in decomposition.components.parameters():
                parameter.mul_(config.init_scale)
    Ties(decomposition.components, config.tied).follow()
    return decomposition


def go_on_from(start: Decomposition, decomposition: Decomposition, model: nn.Module) -> None:
    """Gives a new decomposition V, U and Γ of another one of the same model, whose record it keeps under ``start``
    (without metrics).

    Args:
        start: of the same sites, with the same C and Γ.
        decomposition: as ``new_decomposition`` makes it.
        model: the target.

    Raises:
        ValueError: ``start`` is of other sites or weights, or has another C or Γ.
    """
    check_target(start, adapt(model))
    for name in {**decomposition.counts, **start.counts}:
        C, other = decomposition.counts.get(name, 0), start.counts.get(name, 0)
        if other != C:
            raise ValueError(
                f"{name} has {other} subcomponents in the decomposition to go on from, and {C} by the config: train with "
                "sites=tuple(vpd.sites) and C=vpd.counts."
            )
    if decomposition.gamma_config != start.gamma_config:
        raise ValueError(
            "The config has another Γ than the decomposition to go on from: train with gamma=vpd.gamma_config."
        )
    decomposition.load_state_dict(start.state_dict())
    decomposition.record["start"] = {name: entry for name, entry in start.record.items() if name != "metrics"}


def _finite(name: str, W: Tensor) -> Tensor:
    if not bool(W.isfinite().all()):
        raise ValueError(
            f"The weight of {name} holds values that are not finite; a model with NaNs cannot be decomposed."
        )
    return W
