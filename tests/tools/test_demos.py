"""An existing notebook with three lines added: TransformerLens's demos on the bundled model, plain, attached and masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.tools.demos import DEMOS
from tests.tools.models import KINDS, as_masks, drawn_masks, edit
from tl_vpd import Decomposition, bundled

CLASSES = [kind for kind in ("hooked_transformer", "bridge") if kind in KINDS]


def new_model(kind: str) -> Any:
    """The bundled model in float64, so that a different order of additions shows in the last digits alone."""
    return bundled.model(kind=kind).to(torch.float64).eval()


def run(demo: str, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    torch.manual_seed(0)
    with torch.no_grad():
        return DEMOS[demo](model)


@pytest.mark.parametrize("demo", DEMOS)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_known_notebook_with_three_lines_added(kind, demo):
    vpd = Decomposition.bundled()
    masks = drawn_masks(vpd)
    expected, pictures = run(demo, new_model(kind))
    edited, _ = run(demo, edit(new_model(kind), vpd, masks))
    assert len(expected) > 5

    model = new_model(kind)
    with vpd.attach(model) as attached:
        result, drawn = run(demo, model)
        with attached.masked(as_masks(masks)):
            masked, _ = run(demo, model)

    assert drawn == pictures
    for name, value in expected.items():
        assert torch.equal(result[name], value), name
    for name, value in edited.items():
        assert_close(masked[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    changed = [
        name for name in expected if not torch.allclose(edited[name].double(), expected[name].double(), atol=1e-3)
    ]
    assert len(changed) > len(expected) / 2
    again, _ = run(demo, model)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
