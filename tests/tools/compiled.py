"""Compiles an attached model and compares it with itself: ``python -m tests.tools.compiled KIND``.

A separate process, because the shape checks that tests put on every function of the package cannot be traced.
"""

from __future__ import annotations

import sys

import torch
from torch.testing import assert_close

from tests.tools.conftest import Case, case_of
from tl_vpd.masking import Masks

TIGHT = dict(rtol=1e-9, atol=1e-10)


def main(kind: str) -> None:
    """Idle, masked and idle again; raises where compiled and plain differ, masks do nothing, or a pass has graph breaks."""
    case = case_of(kind)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compare(case, backend)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert kind != "hooked_transformer" or not breaks, breaks


def compare(case: Case, backend: str) -> None:
    """One backend."""
    sites = ("blocks.0.attn.W_V", "blocks.1.mlp.W_in")
    masks = Masks({site: case.masks[site] for site in sites})
    with torch.no_grad(), case.vpd.attach(case.model) as attached:
        compiled = torch.compile(case.model, backend=backend)
        clean = case.model(case.tokens)
        assert_close(compiled(case.tokens), clean, **TIGHT)
        with attached.masked(masks):
            masked = case.model(case.tokens)
            assert_close(compiled(case.tokens), masked, **TIGHT)
        assert_close(compiled(case.tokens), clean, **TIGHT)
    assert not torch.allclose(masked, clean)


if __name__ == "__main__":
    main(*sys.argv[1:])
