"""Reports on disk: whole, proved or refused; and reports with figures that are not finite numbers."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import pytest

from tl_vpd import Evaluation, bundled
from tl_vpd.viz import evaluation_page


@pytest.fixture(scope="module")
def report() -> Evaluation:
    return bundled.evaluation()


def test_a_changed_figure_is_noticed_wherever_it_is(report: Evaluation, tmp_path: Path):
    path = tmp_path / "report.json"
    report.save(path)
    assert Evaluation.load(path).record == report.record
    text = path.read_text()
    alive, zero = report.record["alive"], report.record["kl"]["zero"]
    for old, new in (
        (f'"alive": {alive}', f'"alive": {alive + 1}'),
        (f'"zero": {zero}', f'"zero": {zero + 0.001}'),
        ('"l0"', '"l1"'),
    ):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match="is damaged: its checksum differs from the one it was written with"):
            Evaluation.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[]", "is not a report: it holds a list"),
        ("{}", "it lacks l0, alive, built"),
        ('{"l0": NaN}', "NaN is not a number of JSON"),
        ('{"l0": 1, "l0": 2}', "there twice"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe{", "is not UTF-8"),
    ],
)
def test_what_is_not_a_report_is_refused_in_a_sentence(tmp_path: Path, content: str | bytes, message: str):
    path = tmp_path / "report.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        Evaluation.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kl", [1.0], "its kl has no figures by name"),
        ("kl", {"rounded": 1.0}, "do not fit together"),
        ("l0", "112", "its l0 is not a number"),
        ("alive", None, "do not fit together"),
        ("pgd_kl", {"20": 0.6}, "do not fit together"),
        ("tables", {"hidden": 3}, "its table hidden is not a list of rows"),
        ("controls", {"random": {}}, "of the control random: it lacks"),
        ("left_out", {"hidden": None}, "its reasons are not text"),
    ],
)
def test_records_without_checksum_are_checked(report: Evaluation, tmp_path: Path, name: str, value, message: str):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**report.record, name: value}))
    with pytest.raises(ValueError, match=message):
        Evaluation.load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "at",
    [
        ("kl", "rounded"),
        ("kl", "zero"),
        ("l0",),
        ("target_ce",),
        ("zero_ce",),
        ("pgd_kl", "20"),
        ("pgd_kl_starts", "20", 0),
        ("l0_by_site", "blocks.0.attn.W_Q"),
        ("controls", "random", "kl", "rounded"),
        ("compute_recovered", "ci"),
        ("delta_share", "blocks.0.attn.W_Q"),
    ],
)
def test_what_is_not_defined_is_named_and_drawn(report: Evaluation, tmp_path: Path, at: tuple, value: float):
    record = copy.deepcopy(report.record) | {"delta_share": dict.fromkeys(report.record["l0_by_site"], 0.01)}
    inner = record
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    changed = Evaluation(record)
    name = ".".join(key for key in at if isinstance(key, str))
    assert name in changed.record["left_out"]
    changed.save(tmp_path / "report.json")
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert Evaluation.load(tmp_path / "report.json").record == changed.record
    assert all(isinstance(sentence, str) for sentence in changed.warnings) and len(changed.table())
    page = evaluation_page(changed, tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Not defined (– in the tables): {name}, as " in page and "nan" not in page.partition("</nav>")[2]


def test_a_page_or_report_that_cannot_be_written_leaves_the_older_one(report: Evaluation, tmp_path: Path, monkeypatch):
    report.save(tmp_path / "report.json")
    evaluation_page(report, tmp_path / "report.html")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (report.save, lambda path: evaluation_page(report, path)):
        for name in before:
            with pytest.raises(
                OSError, match=rf"No space left on the disk of .* for {name}: the older {name} is intact"
            ):
                write(tmp_path / name)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_equal_cross_entropies_have_no_share(report: Evaluation):
    record = copy.deepcopy(report.record)
    record["zero_ce"] = record["target_ce"]
    assert Evaluation(record).table()["share_of_zero"].isna().all()
