"""Calls of the configs that pydantic checks: every field, its kind read from its annotation.

What pydantic reads from text may be accepted (recipes are YAML, which reads ``1e-3`` as text); a bool for a number may not.
"""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pydantic

import tl_vpd
from tests.campaigns.calls.kinds import Kind, any_of, boolean, choice, integer, number, text
from tests.campaigns.calls.training import _lax
from tests.campaigns.calls.world import Call, World
from tl_vpd import baselines

CONFIGS = (
    tl_vpd.AdversaryConfig,
    tl_vpd.Coefficients,
    tl_vpd.ExecutionConfig,
    tl_vpd.FaithfulnessConfig,
    tl_vpd.GammaConfig,
    tl_vpd.MinimalityConfig,
    tl_vpd.OptimizerConfig,
    tl_vpd.SavingConfig,
    tl_vpd.VPDConfig,
    baselines.APDConfig,
    baselines.SPDConfig,
    baselines.TranscoderConfig,
)


def calls(w: World) -> list[Call]:
    """The table."""
    return [Call(f"configs: {config.__name__}", config, fields(config)) for config in CONFIGS]


def fields(config: type[pydantic.BaseModel]) -> dict[str, tuple[Any, Kind]]:
    """Every field with its default and its kind; nested configs, tuples and C are anything that is read or refused."""
    return {
        name: (field.get_default(call_default_factory=True), _if_of_use(kind_of(field.annotation, field.metadata)))
        for name, field in config.model_fields.items()
    }


def _if_of_use(kind: Kind) -> Kind:
    """What would do nothing with the other fields at their defaults is refused: then a right value is, too."""
    return lambda value: None if kind(value) else kind(value)


def kind_of(annotation: Any, metadata: list[Any]) -> Kind:
    """The kind of an annotation.

    Args:
        annotation: of a field.
        metadata: its limits.
    """
    if get_origin(annotation) is Annotated:
        inner, *limits = get_args(annotation)
        return kind_of(inner, [*metadata, *limits])
    if get_origin(annotation) in (Union, types.UnionType):
        return any_of(*(kind_of(member, metadata) for member in get_args(annotation)))
    if get_origin(annotation) is Literal:
        return choice(*get_args(annotation))
    if annotation is type(None):
        return lambda value: value is None
    if annotation is bool:
        return _lax_bool
    if annotation is str:
        return lambda value: None if text(value) else False
    if annotation in (int, float):
        return _lax(_number(annotation, metadata))
    return lambda value: None


def _number(annotation: Any, metadata: list[Any]) -> Kind:
    minimum = next((limit.ge for limit in metadata if isinstance(limit, annotated_types.Ge)), None)
    maximum = next((limit.le for limit in metadata if isinstance(limit, annotated_types.Le)), None)
    above = next((limit.gt for limit in metadata if isinstance(limit, annotated_types.Gt)), None)
    if annotation is int:
        return integer(int(above) + 1 if above is not None else minimum, maximum)
    return number(minimum, maximum, above=above)


def _lax_bool(value: Any) -> bool | None:
    read = isinstance(value, str | bytes | float) and value in (0.0, 1.0, "0", "1", "true")
    return None if read else boolean(value)
