"""Docstrings say what the signature cannot: a documented name is a parameter, one a line, and every parameter is documented."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tl_vpd"
SECTION = re.compile(r"^(Args|Raises|Returns|Yields|Attributes):$")
ENTRY = re.compile(r"^([*\w]+(?:, [*\w]+)*):")


def documented(docstring: str) -> list[str]:
    """The names of the entries under ``Args:``, as they are written."""
    names, inside, indent = [], False, 0
    for line in docstring.splitlines():
        text = line.strip()
        if SECTION.match(text):
            inside, indent = text == "Args:", len(line) - len(line.lstrip()) + 4
        elif inside and text and len(line) - len(line.lstrip()) == indent:
            entry = ENTRY.match(text)
            names.append(entry[1] if entry else text)
        elif inside and text and len(line) - len(line.lstrip()) < indent:
            inside = False
    return names


def functions() -> list[tuple[str, str, list[str]]]:
    """(where, docstring, parameters) of every function with an ``Args:``; a class's are its ``__init__``'s, or its fields."""
    result = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or "Args:" not in (ast.get_docstring(node) or ""):
                continue
            function = node
            if isinstance(node, ast.ClassDef):
                inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
                if not inits:
                    fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
                    result.append(
                        (f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", ast.get_docstring(node), fields)
                    )
                    continue
                function = inits[0]
            arguments = function.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            names += [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
            names = [name for name in names if name not in ("self", "cls")]
            result.append((f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", ast.get_docstring(node), names))
    return result


FUNCTIONS = functions()


@pytest.mark.parametrize(("where", "docstring", "parameters"), FUNCTIONS, ids=[where for where, *_ in FUNCTIONS])
def test_args_are_the_parameters_one_a_line(where, docstring, parameters):
    entries = [name.lstrip("*") for name in documented(docstring)]
    assert all(re.fullmatch(r"\w+", name) for name in entries), f"{where}: one name a line, not {entries}"
    assert sorted(entries) == sorted(parameters), f"{where}: documents {entries}, takes {parameters}"
