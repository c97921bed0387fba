"""The notebooks in ``examples/`` run from top to bottom, offline, and what is checked in is what they give."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tl_vpd.adapters.versions import HookedTransformer, transformer_bridge

EXAMPLES = Path(__file__).parents[1] / "examples"


def runnable() -> list[str]:
    """The notebooks whose model class the installed TransformerLens has."""
    names = ["ablation_experiments.ipynb", "attention_without_heads.ipynb", "closing_a_bracket.ipynb", "editing.ipynb"]
    names += ["reading_a_decomposition.ipynb", "rewire_a_fact.ipynb"]
    if HookedTransformer is not None:
        names += ["three_lines_hooked_transformer.ipynb", "auditing_a_circuit.ipynb", "released_run.ipynb"]
        names.append("other_peoples_circuits.ipynb")
    try:
        transformer_bridge()
    except ImportError:
        return names
    return [*names, "three_lines_bridge.ipynb"]


@pytest.mark.parametrize("name", runnable())
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    book = nbformat.read(EXAMPLES / name, as_version=4)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) > 8 and all(cell.execution_count for cell in code)
    if name.startswith("three_lines"):
        assert 'src="https://' not in (tmp_path / "importance.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_is_checked_in_with_its_results_and_small(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert path.stat().st_size < 200_000
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is not None
            assert all(o.get("name") != "stderr" and o.output_type != "error" for o in cell.outputs), cell.source
            assert "/site-packages/" not in str(cell.outputs) and "/home/" not in str(cell.outputs)


def test_every_notebook_is_run_somewhere():
    assert {p.name for p in EXAMPLES.glob("*.ipynb")} == {
        "ablation_experiments.ipynb",
        "attention_without_heads.ipynb",
        "auditing_a_circuit.ipynb",
        "closing_a_bracket.ipynb",
        "editing.ipynb",
        "other_peoples_circuits.ipynb",
        "reading_a_decomposition.ipynb",
        "released_run.ipynb",
        "rewire_a_fact.ipynb",
        "three_lines_bridge.ipynb",
        "three_lines_hooked_transformer.ipynb",
    }
