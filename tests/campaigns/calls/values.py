"""Values that people pass by mistake, and other forms of the right one."""

from __future__ import annotations

import decimal
import fractions
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import tl_vpd


def make_paths(folder: Path) -> dict[str, Path]:
    """Paths of several kinds in a folder."""
    paths = {"a file": folder / "a_file", "a folder": folder / "a_folder", "a FIFO": folder / "a_fifo"}
    paths["a file"].write_text("text")
    paths["a folder"].mkdir()
    os.mkfifo(paths["a FIFO"])
    return {**paths, "nothing there": folder / "missing" / "deep", "below a file": folder / "a_file" / "below"}


def bad_values(paths: dict[str, Path]) -> dict[str, Callable[[], Any]]:
    """Values by what they are called in reports; each is made anew, since calls may change them."""
    simple = [
        None,
        "",
        "x",
        "0",
        "a\nb",
        "nul\0",
        True,
        False,
        -1,
        0,
        1,
        2,
        7,
        99,
        1.5,
        -0.5,
        0.0,
        1.0,
        1e300,
        1e-300,
        1j,
        float("nan"),
        float("inf"),
        float("-inf"),
        2**31,
        2**63,
        -(2**63) - 1,
        b"x",
        (),
        ...,
        NotImplemented,
        decimal.Decimal("0.5"),
        fractions.Fraction(1, 2),
        slice(5, 2),
        slice(50, 60),
        slice(None, None, 0),
        range(0),
        int,
        torch.float16,
        torch.int8,
        torch.device("meta"),
        "cuda:99",
        "blocks.0.attn.W_Q",
        "blocks.0.attn.W_Q:99",
        "blocks.9.attn.W_Q:0",
        "blocks.0.attn.W_Q:-1",
        "blocks.0.attn.W_Q:0",
    ]
    values: dict[str, Callable[[], Any]] = {repr(v): lambda v=v: v for v in simple}
    values |= {f"Path of {name}": lambda p=path: p for name, path in paths.items()}
    values |= {f"str of the path of {name}": lambda p=path: str(p) for name, path in paths.items()}
    return values | {
        "10**5000": lambda: 10**5000,
        "-10**5000": lambda: -(10**5000),
        "a string of a million characters": lambda: "x" * 1_000_000,
        "[]": list,
        "{}": dict,
        "set()": lambda: set(),
        "[None]": lambda: [None],
        "['x']": lambda: ["x"],
        "[-1]": lambda: [-1],
        "[0]": lambda: [0],
        "[nan]": lambda: [float("nan")],
        "[1.5]": lambda: [1.5],
        "[[]]": lambda: [[]],
        "[[[1]]]": lambda: [[[1]]],
        "[0, 'x']": lambda: [0, "x"],
        "{'x': 1}": lambda: {"x": 1},
        "{0: None}": lambda: {0: None},
        "{'blocks.0.attn.W_Q': None}": lambda: {"blocks.0.attn.W_Q": None},
        "{'blocks.0.attn.W_Q': nan}": lambda: {"blocks.0.attn.W_Q": torch.full((6,), float("nan"))},
        "{'blocks.0.attn.W_Q': ones of another width}": lambda: {"blocks.0.attn.W_Q": torch.ones(5)},
        "{1, 2}": lambda: {1, 2},
        "a module": lambda: tl_vpd,
        "a function that gives None": lambda: lambda *a, **k: None,
        "a function that raises nothing and gives text": lambda: lambda *a, **k: "x",
        "object()": object,
        "an iterator": lambda: iter([0]),
        "a data frame": lambda: pd.DataFrame({"x": [1]}),
        "nn.Linear": lambda: torch.nn.Linear(2, 2),
        "np.int64(1)": lambda: np.int64(1),
        "np.uint8(255)": lambda: np.uint8(255),
        "np.float32(0.5)": lambda: np.float32(0.5),
        "np.float64('nan')": lambda: np.float64("nan"),
        "np.bool_(True)": lambda: np.bool_(True),
        "np.array([])": lambda: np.array([]),
        "np.array([1, 2])": lambda: np.array([1, 2]),
        "np.array(['x'])": lambda: np.array(["x"]),
        "np.array([None])": lambda: np.array([None]),
        "tensor(1)": lambda: torch.tensor(1),
        "tensor(0.5)": lambda: torch.tensor(0.5),
        "tensor(nan)": lambda: torch.tensor(float("nan")),
        "tensor(True)": lambda: torch.tensor(True),
        "tensor([])": lambda: torch.tensor([]),
        "tensor([1, 2])": lambda: torch.tensor([1, 2]),
        "tensor([0.5])": lambda: torch.tensor([0.5]),
        "tensor(meta)": lambda: torch.empty(2, 7, dtype=torch.long, device="meta"),
        "ones [2, 7]": lambda: torch.ones(2, 7),
        "NaN [2, 7]": lambda: torch.full((2, 7), float("nan")),
        "halves [2, 7]": lambda: torch.full((2, 7), 0.5),
        "zeros int [2, 7]": lambda: torch.zeros(2, 7, dtype=torch.long),
        "minus ones int [2, 7]": lambda: -torch.ones(2, 7, dtype=torch.long),
        "large int [2, 7]": lambda: torch.full((2, 7), 10**6),
        "bools [2, 7]": lambda: torch.ones(2, 7, dtype=torch.bool),
        "additive mask [2, 7]": lambda: torch.tensor([[0.0] * 7, [float("-inf")] * 3 + [0.0] * 4]),
        "int [0, 7]": lambda: torch.zeros(0, 7, dtype=torch.long),
        "int [2, 0]": lambda: torch.zeros(2, 0, dtype=torch.long),
        "int [3, 7]": lambda: torch.zeros(3, 7, dtype=torch.long),
        "int [2, 40]": lambda: torch.zeros(2, 40, dtype=torch.long),
        "int [1, 2, 7]": lambda: torch.zeros(1, 2, 7, dtype=torch.long),
        "complex [2, 7]": lambda: torch.zeros(2, 7, dtype=torch.complex64),
        "sparse [2, 7]": lambda: torch.eye(2, 7, dtype=torch.long).to_sparse(),
    }


def random_value(chooses: random.Random, values: list[Callable[[], Any]], depth: int = 0) -> Any:
    """A value put together at random: numbers of any size, text, and lists, tuples and dicts of others.

    Args:
        chooses: the random numbers.
        values: functions that make a value.
        depth: how deep this one lies within others.
    """
    sort = chooses.randrange(8 if depth < 3 else 4)
    if sort == 0:
        return chooses.choice([-1, 1]) * chooses.getrandbits(chooses.choice([1, 4, 40, 80]))
    if sort == 1:
        return chooses.choice([-1, 1]) * 10 ** chooses.uniform(-320, 308)
    if sort == 2:
        return "".join(chooses.choice("ab:.*[]W_Q01\n\0é") for _ in range(chooses.randrange(9)))
    if sort in (3, 4):
        return chooses.choice(values)()
    members = [random_value(chooses, values, depth + 1) for _ in range(chooses.randrange(3))]
    if sort == 5:
        return members
    return tuple(members) if sort == 6 else {f"{i}": member for i, member in enumerate(members)}


def equivalents(value: Any) -> dict[str, Any]:
    """Other forms of a right value, with which the result has to be the same."""
    if isinstance(value, bool) or value is None:
        return {}
    if isinstance(value, int):
        return {
            "as np.int64": np.int64(value),
            "as np.int16": np.int16(value),
            "as a tensor of int32": torch.tensor(value, dtype=torch.int32),
            "as an array of one": np.array(value),
        }
    if isinstance(value, float):
        same = {"as np.float64": np.float64(value), "as a tensor": torch.tensor(value, dtype=torch.float64)}
        return {**same, "as an int": int(value)} if value == int(value) else same
    if isinstance(value, Tensor) and value.dtype == torch.long and value.ndim == 2:
        strided = torch.zeros(value.shape[0], 2 * value.shape[1], dtype=torch.long)[:, ::2]
        return {
            "as int32": value.int(),
            "as int16": value.short(),
            "as uint8": value.to(torch.uint8),
            "not contiguous": strided.copy_(value),
            "transposed storage": value.T.contiguous().T,
            "as a Parameter without gradient": torch.nn.Parameter(value, requires_grad=False),
        }
    if isinstance(value, list):
        return {"as a tuple": tuple(value)}
    if isinstance(value, tuple):
        return {"as a list": list(value)}
    if isinstance(value, Path):
        return {"as a string": str(value)}
    return {}
