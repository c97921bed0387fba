"""Checks of arguments: the value in the type that is needed, or one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_vpd.checks import (
    check_fields,
    check_threshold,
    flag,
    instance,
    integer,
    number,
    path_of,
    seed_of,
    sequence,
    shown,
    text_of,
)

CHECKS: list[Callable[[Any], Any]] = [
    lambda value: integer("k", value, minimum=0),
    lambda value: number("amount", value, minimum=0, maximum=2),
    lambda value: number("rate", value, above=0),
    check_threshold,
    seed_of,
    lambda value: flag("controls", value),
    lambda value: sequence("budgets", value),
    lambda value: instance("name", value, str, Fraction),
    lambda value: text_of("title", value),
    lambda value: path_of("folder", value),
]
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=True),
    st.text(max_size=100),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.complex_numbers(),
    st.sampled_from([10**400, -(10**5000), Fraction(1, 3), np.int8(3), np.float16("inf"), np.bool_(True), {1, 2}]),
    st.sampled_from([torch.tensor(2), torch.tensor([1.0, 2.0]), torch.tensor(float("nan")), np.arange(3)]),
)


@given(value=ANYTHING)
@pytest.mark.parametrize("check", CHECKS)
def test_any_value_is_checked_or_refused_in_one_sentence(check: Callable[[Any], Any], value: Any):
    try:
        check(value)
    except (TypeError, ValueError) as error:
        (text,) = error.args
        assert text.endswith(".") and "\n" not in text and len(text) < 300


@dataclass(frozen=True)
class Settings:
    """One field of each kind that is checked."""

    k: int = 3
    rate: float | None = None
    budgets: Sequence[int] = (20,)
    names: Sequence[str] = ()
    controls: bool = True
    seed: int = 0
    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, k=1, rate=(0, 2), budgets=0)


def test_fields_are_stored_in_the_type_of_their_annotation():
    of_numpy: Any = Settings(
        k=np.int64(4),  # type: ignore[arg-type]
        rate=torch.tensor(1),  # type: ignore[arg-type]
        budgets=np.array([1, 2]),  # type: ignore[arg-type]
        names=["a"],
        controls=np.bool_(False),  # type: ignore[arg-type]
        seed=np.uint64(2**64 - 1),  # type: ignore[arg-type]
        threshold=np.float32(0.5),  # type: ignore[arg-type]
    )
    assert of_numpy == Settings(4, 1.0, (1, 2), ("a",), False, 2**64 - 1, 0.5)
    assert [type(v) for v in vars(of_numpy).values()] == [int, float, tuple, tuple, bool, int, float]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"k": 0}, ValueError, "k=0: give an integer of at least 1."),
        ({"k": True}, TypeError, "k=True is a bool: give an integer of at least 1."),
        ({"k": None}, TypeError, "k=None is a NoneType: give an integer of at least 1."),
        ({"rate": 3}, ValueError, "rate=3: give a finite number from 0 to 2."),
        ({"rate": float("nan")}, ValueError, "rate=nan: give a finite number from 0 to 2."),
        ({"budgets": (20, -1)}, ValueError, "budgets[1]=-1: give an integer of at least 0."),
        ({"budgets": 20}, TypeError, "budgets=20 is a int: give values in a list."),
        ({"budgets": {20, 40}}, TypeError, "budgets={40, 20} is a set: give values in a list."),
        ({"names": "abc"}, TypeError, "names='abc' is a string: give names in a list, such as ['abc']."),
        ({"names": torch.tensor([])}, TypeError, "names is a tensor: give names in a list."),
        ({"names": [1]}, TypeError, "names[0]=1 is a int: give a string."),
        ({"controls": "no"}, TypeError, "controls='no' is a str: give True or False."),
        ({"seed": 1 << 64}, ValueError, f"seed={1 << 64}: give an integer from {-(1 << 63)} to {(1 << 64) - 1}."),
        ({"threshold": 2}, ValueError, "threshold=2: importances are in [0, 1], give a number from 0 to 1."),
    ],
)
def test_fields_of_another_type_or_range_are_refused(fields: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error) as caught:
        Settings(**fields)
    assert str(caught.value) == message


def test_objects_texts_and_paths():
    assert instance("name", "x", int, str) == "x" and text_of("title", "") == "" and path_of("folder", "a") == Path("a")
    for check, message in [
        (lambda: instance("model", 0.5, str, Fraction), r"model=0.5 is a float: give a str or a Fraction\."),
        (lambda: text_of("title", None), r"title=None is a NoneType: give a string\."),
        (lambda: path_of("folder", b"x"), r"folder=b'x' is a bytes: give a path"),
    ]:
        with pytest.raises(TypeError, match=message):
            check()
    for name in ("", "a\0b", "a" * 256, "\ud800"):
        with pytest.raises(ValueError, match="names no file or folder: give a path"):
            path_of("folder", name)


def test_values_in_messages_are_short_and_on_one_line():
    class Unspeakable:
        def __repr__(self) -> str:
            raise RuntimeError

    values = [
        torch.zeros(3, 4),
        np.zeros((9, 9)),
        "x" * 10**6,
        "a\nb",
        10**5000,
        torch.zeros(3, device="meta"),
        Unspeakable(),
    ]
    assert all(len(shown(v)) <= 80 and "\n" not in shown(v) for v in values)
    assert (
        shown(torch.zeros(3, 4)) == "<Tensor of shape (3, 4)>"
        and shown(torch.tensor(2.0)) == "2.0"
        and shown([1]) == "[1]"
    )
