"""YAML as data: scalars as YAML 1.2 reads them, every key once, no tags, no anchors.

PyYAML reads YAML 1.1, where ``no`` is False, ``1e-3`` a string, ``010`` eight and ``1:30`` ninety. Here they are the string
``no``, 0.001, ten and the string ``1:30``.

>>> yaml_data("a: 1e-3\\nb: no\\nc: 010\\nd: {e: [1, 2.5, null, true]}", "The text")
{'a': 0.001, 'b': 'no', 'c': 10, 'd': {'e': [1, 2.5, None, True]}}
>>> yaml_data("a: 1\\na: 2", "The text")
Traceback (most recent call last):
ValueError: The text is not a recipe: the key 'a' is there twice (line 2).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml


class _Data(yaml.SafeLoader):
    """Mappings, lists and plain scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (as PyYAML declares it)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise _refused("anchors and aliases (& and *) are not read, write the values out", event)
        if getattr(event, "tag", None) is not None:
            raise _refused(f"the tag {event.tag!r} is not read, write a plain value", event)
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        result: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refused(f"the key {key!r} is not a name, put it in quotes", key_node)
            if key in result:
                raise _refused(f"the key {key!r} is there twice", key_node)
            result[key] = self.construct_object(value_node, deep=True)
        return result

    def flatten_mapping(self, node: Any) -> None:
        """Merge keys are keys like others."""


def _refused(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?[0-9][0-9_]*", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Data.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))  # type: ignore[no-untyped-call]
_Data.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Data.add_constructor(
    "tag:yaml.org,2002:float", lambda _, node: float(node.value.replace(".inf", "inf").replace(".nan", "nan"))
)


def yaml_data(text: str, name: str) -> Any:
    """The content of a YAML text; raises ValueError, with ``name`` and the line, where it is not YAML, or more than data."""
    try:
        return yaml.load(text, Loader=_Data)
    except yaml.MarkedYAMLError as error:
        problem, mark = error.problem or error.context or "it cannot be read", error.problem_mark or error.context_mark
        kind = "a recipe" if type(error) is yaml.MarkedYAMLError else "YAML"
        line = "" if mark is None else f" (line {mark.line + 1})"
        raise ValueError(f"{name} is not {kind}: {' '.join(problem.split())}{line}.") from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply to be a recipe.") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{name} has a number that cannot be read: {str(error).split(';')[0].rstrip('.')}.") from error
