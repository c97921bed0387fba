"""A part of the matrix that every installed TransformerLens runs: each family as each class, each flag, and what a failure is."""

from __future__ import annotations

import pytest
import torch

from tests.matrix import oracle
from tests.matrix.cells import FLAGS, Cell, Result, cells, run
from tests.matrix.models import Kind, build, has_bridge, kinds_here
from tests.matrix.table import page
from tl_vpd.adapters import sites

EVERY_FAMILY = [cell for cell in cells() if cell.flag == "none"]
FLAGGED: list[Kind] = [kind for kind in kinds_here() if kind != "native"]
EVERY_FLAG = [Cell("Llama", FLAGGED[i % len(FLAGGED)], flag) for i, flag in enumerate(FLAGS) if flag != "none"]
ANY: Kind = "bridge" if has_bridge() else "HookedTransformer"


def settled(result: Result) -> None:
    """A cell holds, is refused by somebody with a message, or does not exist for a reason."""
    assert result.status in ("ok", "refused", "absent"), f"{result.cell}:\n{result.message}"
    assert bool(result.checked) if result.status == "ok" else len(result.message) > 10
    assert result.by in ("tl_vpd", "TransformerLens") if result.status == "refused" else not result.by


@pytest.mark.parametrize("cell", EVERY_FAMILY, ids=str)
def test_every_family_holds_as_every_class(cell):
    result = run(cell, lean=True)
    settled(result)
    exists = result.status == "ok"
    assert exists or cell.kind != "HookedTransformer"
    assert exists or cell.family in ("attention only", "SoLU", "no norm") or cell.kind == "native"


@pytest.mark.parametrize("cell", EVERY_FLAG, ids=str)
def test_every_flag_holds_or_is_refused_by_name(cell):
    settled(run(cell, lean=True))


def test_a_cell_fails_where_masks_do_another_thing_than_edited_weights(monkeypatch):
    right = oracle.edit
    monkeypatch.setattr(oracle, "edit", lambda W, V, U, m, delta: right(W, V, U, m, delta + 1e-6))
    result = run(Cell("GPT-2", ANY, "none"), lean=True)
    assert result.status == "failed" and "constant masks, as a context: differs by" in result.message


def test_a_refusal_that_does_not_name_the_flag_fails_the_cell(monkeypatch):
    from tl_vpd.adapters import Unsupported
    from tl_vpd.hooks import Attached

    def refuse(self, *arguments, **keywords):
        raise Unsupported("This is not possible.")

    monkeypatch.setattr(Attached, "__init__", refuse)
    assert run(Cell("GPT-2", ANY, "use_attn_result")).status == "failed"
    assert "names none of ('use_attn_result',)" in run(Cell("GPT-2", ANY, "use_attn_result")).message


def test_the_table_of_sites_is_the_familys():
    table = sites(build("Llama", ANY, torch.float32))
    assert table["site"].tolist()[:7] == [
        "blocks.0.attn.W_Q",
        "blocks.0.attn.W_K",
        "blocks.0.attn.W_V",
        "blocks.0.attn.W_O",
        "blocks.0.mlp.W_gate",
        "blocks.0.mlp.W_in",
        "blocks.0.mlp.W_out",
    ]
    assert table["d_out"].tolist()[:7] == [16, 8, 8, 16, 24, 24, 16] and not table["refused"].any()


def test_the_page_counts_numbers_refusals_and_says_what_failed():
    base = dict(family="GPT-2", kind="bridge", flag="none", message="", by="", checked=(), version="3.9")
    rows = [
        {**base, "status": "ok"},
        {**base, "flag": "use_attn_in", "status": "refused", "by": "tl_vpd", "message": "cfg.use_attn_in is on."},
        {**base, "family": "OPT", "status": "failed", "message": "x"},
        {**base, "family": "SoLU", "status": "absent", "message": "transformers has no such model"},
    ]
    text = page(rows)
    assert "4 cells: 1 pass, 1 are refused, 1 do not exist, **1 failed**" in text
    assert "| GPT-2 | ✓ [1] |" in text and "| OPT | **1 failed** |" in text and "| SoLU | – |" in text
    assert "1. tl_vpd: “cfg.use_attn_in is on.”\n   *use_attn_in* (3.9 bridge: GPT-2)." in text
    assert "* transformers has no such model: *none* (3.9 bridge: SoLU)." in text
