"""The chain of ``tl-vpd fact`` on the bundled model, and what ships of the real run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from tests.viz.test_panel import addresses
from tl_vpd import bundled
from tl_vpd.cli import app
from tl_vpd.editing import bake, remove
from tl_vpd.fact import data, edits
from tl_vpd.fact.edits import ERASED, MOST, STRENGTHS, ablations, erasing, just_enough, swapping
from tl_vpd.fact.elsewhere import kl_elsewhere
from tl_vpd.fact.measures import IN_PART, measure, probabilities
from tl_vpd.fact.page import after_edits, marks
from tl_vpd.fact.run import decomposed, report
from tl_vpd.fact.settings import FACTS, Facts, config
from tl_vpd.training import TargetedConfig

SITES = ("blocks.1.attn.*", "blocks.1.mlp.W_out")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return bundled.model()


@pytest.fixture(scope="module")
def facts(model):
    """Two names and the likeliest tokens after them."""
    subjects, template = ("os", "self"), "return {}."
    tops = [model(template.format(subject))[0, -1].argmax() for subject in subjects]
    words = tuple(model.tokenizer.decode(int(top)) for top in tops)
    assert words[0] != words[1]
    return Facts(template, subjects, words, paraphrases=("print({}.",), others=("get", "name"))


@pytest.fixture(scope="module")
def text():
    rows = bundled.tokens("validation")
    return {"one": rows[:3, :16], "two": rows[3:5, :24]}


@pytest.fixture(scope="module")
def rows():
    return bundled.tokens("training")[:, :24]


@pytest.fixture(scope="module")
def runs(model, facts, rows, tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("fact"), []
    for naive in (False, True):
        settings = TargetedConfig(**{**config(steps=2, naive=naive).model_dump(), "sites": SITES, "C": 8})
        assert settings.init == ("normal" if naive else "target")
        where, stream = folder / str(naive), None if naive else rows
        one, other = (decomposed(model, facts, settings, where, rows=stream, resume=again) for again in (False, True))
        assert all(torch.equal(one.V[name], other.V[name]) for name in one.sites)
        found.append(one)
    return found


@pytest.fixture(scope="module")
def table(model, facts, runs):
    return ablations(runs[0], model, facts, batch=5)


def test_each_ablation_is_that_of_a_model_without_the_subcomponent(model, facts, runs, table):
    vpd = runs[0]
    assert len(table) and set(table["site"]) <= set(vpd.sites)
    for _, row in table.sample(3, random_state=0).iterrows():
        baked = bake(remove(vpd, row["subcomponent"]), model)
        p = [
            model(prompt)[0, -1].softmax(-1)[model.to_single_token(word)]
            for prompt, word in zip(facts.prompts, facts.answers, strict=True)
        ]
        baked.undo()
        assert [row[f"p {word.strip()}"] for word in facts.answers] == pytest.approx([float(x) for x in p], rel=1e-3)


def test_edits_erase_and_exchange(model, facts, runs, table, rows):
    vpd = runs[0]
    for i in range(2):
        edit = erasing(vpd, model, facts, table, i)
        p = probabilities(vpd, model, facts, {"model": None, "erased": edit}).query("trained")
        p = p[p["subject"] == facts.subjects[i]].set_index("edit")["answer"]
        before, after = p["model"], p["erased"]
        assert after < before and (after <= ERASED * before * 1.001 or len(edit) == min(MOST, len(table)))
    edit = swapping(vpd, model, facts, table, rows[:4])
    c, d = edit.subcomponents
    assert c.site == d.site and c != d
    p = probabilities(vpd, model, facts, {"model": None, "exchanged": edit})
    assert len(p) == 2 * 2 * 2 and set(p["prompt"]) == {"return os.", "return self.", "print(os.", "print(self."}
    before, after = (p[p["edit"] == name]["other"].sum() for name in ("model", "exchanged"))
    assert after > before


def test_nothing_is_erased_where_nothing_is_important(model, facts, runs, table):
    with pytest.raises(ValueError, match="No subcomponent is important on the prompts"):
        erasing(runs[0], model, facts, table[:0], 0)


def test_no_more_is_exchanged_than_rewires(model, facts, runs, table, rows, monkeypatch):
    vpd = runs[0]
    whole = swapping(vpd, model, facts, table, rows[:4])

    parts = {
        str(x): replace(whole, pieces=tuple(replace(piece, change=x * piece.change) for piece in whole.pieces))
        for x in STRENGTHS
    }
    p = probabilities(vpd, model, facts, parts).query("trained").groupby("edit", sort=False)["other"].min().tolist()
    monkeypatch.setattr(edits, "REWIRED", sum(p[9:11]) / 2)
    first = next(i for i, value in enumerate(p) if value > edits.REWIRED)
    part = just_enough(vpd, model, facts, whole)
    for piece, of_whole in zip(part.pieces, whole.pieces, strict=True):
        torch.testing.assert_close(piece.change, STRENGTHS[first] * of_whole.change)
        assert piece.about == f"{STRENGTHS[first]:.2g} of the way: {of_whole.about}"
    monkeypatch.setattr(edits, "REWIRED", 1.0)
    assert just_enough(vpd, model, facts, whole) is whole


def test_kl_elsewhere_is_that_of_the_edited_weights(model, runs, table, text):
    vpd, name = runs[0], table["subcomponent"][0]
    edit = remove(vpd, name)
    kl = kl_elsewhere(vpd, model, text, {"edit": edit.site_edits(vpd)}, batch=2).set_index("text")
    clean = {kind: model(rows).log_softmax(-1) for kind, rows in text.items()}
    baked = bake(edit, model)
    after = {kind: model(rows).log_softmax(-1) for kind, rows in text.items()}
    baked.undo()
    values = {kind: (clean[kind].exp() * (clean[kind] - after[kind])).sum(-1).flatten() for kind in text}
    values["all"] = torch.cat(list(values.values()))
    for kind, expected in values.items():
        assert kl.loc[kind, "kl"] == pytest.approx(float(expected.mean()), rel=1e-2, abs=1e-6)
        assert kl.loc[kind, "p99"] == pytest.approx(float(expected.quantile(0.99)), rel=1e-2, abs=1e-6)
        assert kl.loc[kind, "tokens"] == len(expected)


def test_the_page_has_every_figure_and_nothing_active(model, facts, runs, text, rows, tmp_path):
    said, figures = [], measure(runs[0], model, text, facts, rows[:4], naive=runs[1])
    report(runs[0], model, figures, facts, tmp_path, say=said.append)
    stored = json.loads((tmp_path / "figures.json").read_text())
    assert stored["marks"] == json.loads(json.dumps(figures["marks"])) and stored["tokens"] == 3 * 16 + 2 * 24
    html = (tmp_path / "index.html").read_text()
    assert "return os." in html and all(
        address.startswith("#") for address in addresses(re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL))
    )
    assert all(row["figure"].split(":")[0] in html for row in stored["marks"]) and any(
        "index.html" in line for line in said
    )
    assert len(stored["marks"]) == 11 and {row["met"] for row in stored["marks"]} <= {"yes", "no"}


def test_marks_by_hand():
    facts = {"prompts": ["a", "b"], "answers": ["A", "B"]}
    rows = [("model", "a", 0.8, "A"), ("model", "b", 0.5, "B"), ("without a", "a", 0.04, "x"), ("without b", "b", 0.05, "x"),
            ("exchanged", "a", 0.0, "B"), ("exchanged", "b", 0.0, "x"),
            (IN_PART, "a", 0.1, "B"), (IN_PART, "b", 0.1, "A")]  # fmt: skip
    answers = [{"edit": e, "subject": s, "answer": p, "top": t, "first": t, "trained": True} for e, s, p, t in rows]
    elsewhere = [{"edit": e, "text": "all", "kl": kl, "p99": 10 * kl} for e, kl in
                 (("without a", 0.002), ("without b", 0.02), ("exchanged", 0.001),
                  (IN_PART, 0.0005), ("without a, naive", 0.03))]  # fmt: skip
    alone = [
        {"subject": "a", "model": 0.8, "rounded": 0.72, "attacked": 0.4},
        {"subject": "b", "model": 0.5, "rounded": 0.5, "attacked": 0.5},
    ]
    table = marks({"facts": facts, "answers": answers, "elsewhere": elsewhere, "alone": alone})
    assert table["reached"].tolist() == pytest.approx([0.9, 0.5, 0.1, 0.02, 0.2, 0.5, 0.5, 0.001, 1.0, 0.0005, 15.0])
    assert table["met"].tolist() == ["yes", "no", "no", "no", "no", "no", "no", "yes", "yes", "yes", "yes"]
    assert isinstance(table, pd.DataFrame)
    shown = [row | {"prompt": f"of\n{row['subject']}", "other": row["answer"] / 2} for row in answers]
    likeliest, right, other = after_edits(pd.DataFrame([row for row in shown if "without" not in row["edit"]]))
    assert likeliest.loc["of⏎ b"].tolist() == ["B", "x", "A"]
    assert likeliest.columns.tolist() == ["model", "exchanged", IN_PART]
    assert right.loc["of⏎ a"].tolist() == [0.8, 0.0, 0.1] and other.loc["of⏎ a"].tolist() == [0.4, 0.0, 0.05]
    assert right.index.tolist() == ["of⏎ a", "of⏎ b"]


def test_what_ships_agrees_with_its_record():
    figures, vpd, text = data.finished_figures(), data.finished(), data.other_text()
    assert marks(figures).to_dict("records") == figures["marks"]
    assert figures["facts"] == {"prompts": FACTS.prompts, "answers": list(FACTS.answers)}
    assert sum(figures["alive"].values()) == vpd.site_axis.total and set(figures["alive"]) == set(vpd.sites)
    assert {c for names in figures["edits"].values() for c in names} and "targeted" in vpd.record
    assert len(text) == 4 and figures["tokens"] == sum(rows.numel() for rows in text.values()) >= 20_000
    assert sum(path.stat().st_size for path in data.FOLDER.rglob("*") if path.is_file()) < 5_000_000
    trained = {tuple(row) for row in data.training_rows().tolist()}
    assert not any(tuple(row[:24]) in trained for rows in text.values() for row in rows.tolist())
    assert {kind: len(rows) for kind, rows in data.other_text(2).items()} == dict.fromkeys(text, 2)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["fact", "--finished", "--out", str(tmp_path / "file" / "fact")])
    assert result.exit_code == 2 and "SmolLM2" not in result.output


def test_the_documentation_has_the_shipped_figures():
    text = (Path(__file__).parents[2] / "docs" / "targeted.md").read_text(encoding="utf8")
    for row in data.finished_figures()["marks"]:
        asked = row["asked"].replace(">=", "at least").replace("<=", "at most")
        assert f"| {row['figure']} | {row['reached']:.3g} | {asked} | {row['met']} |" in text
