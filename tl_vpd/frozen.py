"""Configs that are right or refused in one sentence: frozen, strict about types, and without unknown names.

>>> class Options(Frozen):
...     steps: int = 1
>>> Options(steps="2")
Traceback (most recent call last):
ValueError: Options: steps='2': Input should be a valid integer.
>>> Options(step=3)
Traceback (most recent call last):
ValueError: Options has no 'step' (did you mean 'steps'?): its fields are steps.

NumPy's numbers and tensors of one number count as numbers, lists as tuples; bools and strings do not count as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from tl_vpd.checks import sentence_of, shown
from tl_vpd.site import nearest

F = TypeVar("F", bound="Frozen")


if TYPE_CHECKING:  # type checkers see pydantic's, and with it the fields
    from pydantic._internal._model_construction import ModelMetaclass as _OneSentence
else:

    class _OneSentence(type(BaseModel)):
        """Raises one sentence where a config is made, in place of pydantic's lines."""

        def __call__(cls, *arguments: Any, **fields: Any) -> Any:
            try:
                return super().__call__(*arguments, **fields)
            except ValidationError as error:
                text = sentence_of(error)
                raise ValueError(text if text.startswith(f"{cls.__name__} ") else f"{cls.__name__}: {text}") from None


class Frozen(BaseModel, metaclass=_OneSentence):
    """A config: its fields cannot be changed, unknown ones are refused, and copies are checked as new ones are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        for name in fields:
            if name not in cls.model_fields:
                near = nearest(str(name), cls.model_fields)
                raise ValueError(f"{cls.__name__} has no {name!r}{near}: its fields are {', '.join(cls.model_fields)}.")
            if getattr(fields[name], "ndim", 0):
                raise ValueError(
                    f"{name}={shown(fields[name])} is a {type(fields[name]).__name__}: give a plain value."
                )
        return {name: _plain(value) for name, value in fields.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError(
            f"{type(self).__name__} cannot be changed: make a copy with .model_copy(update={{{name!r}: {value!r}}})."
        )

    def model_copy(self: F, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> F:
        """A copy with other values.

        Args:
            update: values by field.
            deep: also of what the values hold.

        Raises:
            ValueError: a value is not allowed.
        """
        if not update:
            return super().model_copy(deep=deep)
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | dict(update))

    def refuse_unused(self, names: tuple[str, ...], reason: str) -> None:
        """Raises ValueError if one of these fields differs from its default."""
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} would do nothing: {reason}")


def checked(config: F) -> F:
    """The config, after a check of all its fields: ``model_construct`` and pickles have none.

    Raises:
        ValueError: a value is not allowed.
    """
    type(config)(**config.model_dump())
    return config


def _plain(value: Any) -> Any:
    """Numbers of NumPy and PyTorch as Python's, lists as tuples."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0):
        return value.item()
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return tuple(_plain(entry) for entry in value)
    if type(value) is dict:
        return {key: _plain(entry) for key, entry in value.items()}
    return value
