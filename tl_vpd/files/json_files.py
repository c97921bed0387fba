"""JSON that other programs can read, and JSON from anywhere: read as data, or refused in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tl_vpd.files.atomic import write_text


def json_text(content: Any, *, indent: int | None = None) -> str:
    """The content as JSON; raises TypeError where it is not data, ValueError for NaN, infinite numbers and endless nesting."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except TypeError as error:
        raise TypeError(f"What is stored as JSON must be strings, numbers, lists and dicts ({error}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"What is stored as JSON must be finite numbers, without endless nesting ({error})."
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file; errors as for ``json_text`` and ``write_file``."""
    write_text(path, json_text(content, indent=1) + "\n")


def parse_json(text: str | bytes, name: str) -> Any:
    """Reads JSON in UTF-8; raises ValueError where it is not JSON, has a key twice or NaN, or is too long or deep to be read."""
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(decoded, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply to be read.") from error
    except ValueError as error:  # JSONDecodeError, integers of thousands of digits, keys and constants refused below
        raise ValueError(f"{name} is not JSON: {str(error).split(';')[0]}.") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises FileNotFoundError where there is no ordinary file of this name, or as ``parse_json``."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is not an ordinary file' if path.exists() else 'does not exist'}.")
    return parse_json(path.read_bytes(), str(path))


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} is there twice")
        result[key] = value
    return result


def _refuse(number: str) -> Any:
    raise ValueError(f"{number[:80]} is not a number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)
