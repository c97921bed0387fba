"""This package's HookPoints on a model: ``blocks.{i}.hook_{site}_{kind}``, put on and removed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.changes import Later
from tl_vpd.adapters.versions import HookPoint
from tl_vpd.checks import sequence, shown
from tl_vpd.forward.remains import MARK
from tl_vpd.hooks.sparse import SparsePoint
from tl_vpd.site import Site, nearest

KINDS = ("component_acts", "ci", "mask", "delta_mask")


def check_kinds(kinds: str | Sequence[str]) -> list[str]:
    """Kinds of HookPoints as a list.

    Args:
        kinds: one or several.

    Raises:
        TypeError: they are not names.
        KeyError: there is no such kind.
    """
    kinds = [kinds] if isinstance(kinds, str) else sequence("hooks", kinds)
    for kind in kinds:
        if not isinstance(kind, str) or kind not in KINDS:
            raise KeyError(
                f"hooks: {shown(kind)} is not a kind of hook{nearest(kind, KINDS)}. Kinds: {', '.join(KINDS)}."
            )
    return kinds


def put_on(undo: Later, adapter: Adapter, site: Site, kinds: Sequence[str], points: dict[str, HookPoint]) -> None:
    """Puts one site's HookPoints on the model.

    Args:
        undo: notes how to remove them; hooks that users put on them go with them.
        adapter: of the model.
        site: whose they are.
        kinds: which of them.
        points: gets them by kind.

    Raises:
        ValueError: the model has an attribute of that name.
    """
    module: nn.Module = adapter.home(site.name)
    for kind in kinds:
        if hasattr(module, attribute := _attribute(site, kind)):
            raise ValueError(f"The model has a {site.hook_name(kind)} already, which attaching would hide.")
        point = SparsePoint() if kind in ("component_acts", "mask") else HookPoint()
        point.training = module.training
        point.__dict__[MARK] = True
        undo(partial(module._modules.pop, attribute, None))
        module.add_module(attribute, point)
        points[kind] = point


def _attribute(site: Site, kind: str) -> str:
    return site.hook_name(kind).rpartition(".")[2]
