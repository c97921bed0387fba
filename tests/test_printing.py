"""Results print in a few lines: shapes in place of numbers, and the figures of an evaluation."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens import HookedTransformer

import tl_vpd
from tl_vpd.printing import Printed, short

HOLDS_DATA = ("Tensor", "ndarray", "DataFrame")
INTERNAL = ("forward", "losses", "importance", "engine")


def public_results() -> Iterator[type]:
    """Dataclasses with tensors or tables among the public fields, by the rooms that name them."""
    packages = [m.name for m in pkgutil.walk_packages(tl_vpd.__path__, "tl_vpd.") if m.ispkg]
    rooms = [name for name in packages if name.rpartition(".")[2] not in INTERNAL]
    seen = set()
    for room in ["tl_vpd", *rooms]:
        for name, thing in vars(importlib.import_module(room)).items():
            public = not name.startswith("_") and inspect.isclass(thing) and is_dataclass(thing)
            if public and thing.__module__.startswith("tl_vpd") and thing not in seen:
                seen.add(thing)
                if any(w in str(f.type) for f in fields(thing) if f.name[0] != "_" for w in HOLDS_DATA):
                    yield thing


@pytest.mark.parametrize("result", public_results(), ids=lambda c: c.__name__)
def test_no_public_result_prints_its_numbers(result: type):
    made_by_dataclass = inspect.unwrap(result.__repr__).__code__.co_filename == "<string>"
    assert not made_by_dataclass, f"{result.__name__} prints whole tensors: give it the base tl_vpd.printing.Printed"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.bfloat16), "bfloat16[2, 3]"),
        (torch.tensor(1.5), "1.5"),
        (np.zeros(4, dtype=np.int32), "int32[4]"),
        (pd.DataFrame({"a": [1], "b": [2]}), "DataFrame[1 rows: a, b]"),
        (("q",), "('q',)"),
        ([1, 2, 3, 4], "[1, 2, 3, 4]"),
        ([1, 2, 3, 4, 5], "[1, 2, 3, … 5 in all]"),
        ({"q": torch.zeros(2)}, "{'q': float32[2]}"),
        ({}, "{}"),
        ("x" * 90, f"'{'x' * 69}…"),
    ],
)
def test_a_value_in_few_words(value: object, text: str):
    assert short(value) == text


def test_a_class_keeps_its_own_repr():
    class Mine(Printed):
        def __repr__(self) -> str:
            return "mine"

    assert repr(Mine()) == "mine"


def test_what_a_notebook_shows_of_importances_and_a_model_with_a_decomposition(
    vpd: tl_vpd.Decomposition, model: HookedTransformer
):
    importances = vpd.causal_importances(model, torch.zeros(2, 5, dtype=torch.long))
    total = sum(vpd.counts.values())
    text = repr(importances)
    assert f"concatenated=float64[2, 5, {total}]" in text
    assert f"ConcatenatedAxis({len(vpd.sites)} sites, {total} subcomponents)" in text
    attached = vpd.attach(model)
    start = f"Attached({len(vpd.sites)} sites of a HookedTransformer, "
    assert repr(attached) == start + "not masked)"
    with attached.masked("rounded"):
        assert repr(attached) == start + "runs masked)"
    attached.detach()
    assert repr(attached) == start + "detached)"


def test_an_evaluation_prints_its_main_figures():
    report = tl_vpd.bundled.evaluation()
    record, text = report.record, repr(report)
    assert f"L0 {record['l0']:.4g} of {record['alive']} alive" in text
    assert f"rounded {record['kl']['rounded']:.4g}" in text
    assert f"PGD-20 {record['pgd_kl']['20']:.4g}" in text
    assert len(text) < 300
    assert repr(tl_vpd.Evaluation({})) == "Evaluation(see .warnings, .table(), .checks())"
    lost = tl_vpd.Evaluation({**record, "kl": {**record["kl"], "rounded": float("nan")}})
    assert "rounded nan" in repr(lost)
