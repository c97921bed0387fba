"""``tl-vpd eval`` on the bundled model: options, files, and mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tl_vpd import bundled
from tl_vpd.cli import app
from tl_vpd.recipe import evaluating


def call(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(app, ["eval", *(str(a) for a in arguments)])


def test_a_report_with_other_data_and_another_decomposition(tmp_path: Path):
    (tmp_path / "prose.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    bundled.decomposition().save(tmp_path / "other")
    result = call(
        "bundled", "--rows", 2, "--budgets", "1", "--attack-rows", 1, "--no-controls",
        "--measures", "adversaries,union_test,off_distribution",
        "--off-distribution", f"prose={tmp_path / 'prose.txt'}", "--others", f"seed1={tmp_path / 'other'}",
        "--out", tmp_path / "metrics.json", "--html", tmp_path / "report.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["data"] for row in record["tables"]["off_distribution"]] == ["these rows", "scrambled", "prose"]
    assert set(record["tables"]) == {
        "adversaries",
        "union_test",
        "off_distribution",
        "feature_splitting",
        "consistency",
    }
    assert record["tables"]["consistency"][-1]["rank_one"] == pytest.approx(1.0, abs=1e-3)
    assert record["pgd_tokens"] == 128 and record["tokens"] == 256 and "controls" not in record
    for text in ("partial", "adversaries", "off_distribution", "L0"):
        assert text in result.output
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--measures", "mask_transfr"), "did you mean 'mask_transfer'"),
        (("--off-distribution", "prose"), "--off-distribution 'prose': give a name and a path"),
        (("--others", "x=/nowhere/at/all"), "does not exist"),
        (("--out", "/nowhere/at/all.json"), "is not a folder"),
        (("--budgets", "few"), "whole numbers"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments: tuple[str, ...], message: str):
    result = call("bundled", "--rows", 1, *arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_nothing_but_the_mode_table():
    result = call("bundled", "--rows", 1, "--budgets", "", "--measures", "none", "--no-controls")
    assert result.exit_code == 0, result.output
    assert "rounded_0.5" in result.output and "sparsity_sweep" not in result.output


def test_the_ladder_by_name():
    standard, others = evaluating.budgets_of("ladder")
    assert list(standard) == [20, 40, 80, 160, 320, 640, 1280] and list(others) == [20, 80]
    assert evaluating.budgets_of("5,10") == ([5, 10], [5, 10])
