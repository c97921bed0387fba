"""What a card says is what record and report say, whatever text they hold."""

from __future__ import annotations

import ast
import copy
import math

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from tests.tiny import decomposition_of, tiny_model
from tl_vpd import CardConfig, Evaluation, GammaConfig
from tl_vpd.publishing.text import block, plain

HOSTILE = "a](http://evil.example) <script>alert(1)</script> | `b` ```\n# Heading\n---\n![i](u) *x* &lt; www.evil.example \u202e"


def parsed(card: ModelCard):
    return MarkdownIt("commonmark").enable("table").parse(card.text)


def inline(tokens):
    return [child for token in tokens for child in token.children or []]


def rows_of(card: ModelCard, title: str) -> list[list[str]]:
    """The cells of the first table below a heading, without escapes."""
    lines = card.text.split(f"{title}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| "))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.replace("\\", "").strip("|").split(" | ")])
    return table


def code_of(card: ModelCard, language: str) -> list[str]:
    return [token.content for token in parsed(card) if token.type == "fence" and token.info == language]


def test_the_figures_are_those_of_the_report(vpd, report):
    card = vpd.model_card("user/repo", report=report)
    modes = report.table()
    header, _, *rows = rows_of(card, "## Evaluation")
    assert header == ["mode", *modes.columns] and {"random pieces", "singular pieces", "shuffled pieces"} <= set(header)
    assert [row[0] for row in rows] == list(modes.index)
    for row in rows:
        for name, cell in zip(header[1:], row[1:], strict=True):
            figure = modes.loc[row[0], name]
            assert cell == "–" if math.isnan(figure) else float(cell) == pytest.approx(figure, rel=1e-3, abs=1e-12), (
                name
            )
    header, _, *attacks = rows_of(card, "### Attacks")
    adversaries = report.record["tables"]["adversaries"]
    assert len(attacks) == len(adversaries) and {row[header.index("pieces")] for row in attacks} > {"learned", "random"}
    assert {float(row[header.index("kl")]) for row in attacks} == {float(f"{row['kl']:.4g}") for row in adversaries}
    assert len(rows_of(card, "### Future leakage")) == len(report.record["tables"]["future_leakage"]) + 2
    sites = rows_of(card, "# Parameter decomposition of a model")
    assert [(row[0], int(row[3]), int(row[4])) for row in sites[2:]] == [
        (name, C, report.record["alive_by_site"][name]) for name, C in vpd.counts.items()
    ]
    warnings = card.text.split("### Faults\n")[1].split("\n## ")[0]
    assert warnings.count("\n* ") == len(report.warnings) and "attacks of up to 2 steps" in card.text


def test_what_was_not_measured_is_said(vpd, report):
    assert "**Not evaluated.**" in vpd.model_card().text and "nothing may be claimed" in vpd.model_card().text
    record = copy.deepcopy(report.record)
    null = {"decomposition": "this", "l0": 3.5, "share_of_zero": 0.01}
    record["tables"] = {"nulls": [null, {"decomposition": "shuffled weights", "l0": 9.0, "share_of_zero": 0.5}]}
    record["left_out"] = {"future_leakage": "the rows are shorter than three tokens"}
    record |= {"pgd_kl": {}, "pgd_kl_starts": {}, "controls": {}}
    card = vpd.model_card(report=Evaluation(record))
    assert rows_of(card, "### Nulls")[2:] == [["this", "3.5", "0.01"], ["shuffled weights", "9", "0.5"]]
    text = card.text
    assert "**Not attacked.**" in text and "it was not attacked" in text
    assert "**Not measured**: the rows are shorter than three tokens." in text


def test_metadata_is_what_the_config_says(vpd):
    config = CardConfig(
        licence="mit", base_model="org/model", datasets=("org/text", "more-text"), text_licence="odc-by"
    )
    card = vpd.model_card("user/repo", card=config)
    data = card.data.to_dict()
    assert data["library_name"] == "tl_vpd" and "mechanistic-interpretability" in data["tags"]
    assert (data["license"], data["base_model"], data["datasets"]) == ("mit", "org/model", ["org/text", "more-text"])
    assert rows_of(card, "## Licences")[2:] == [
        ["this decomposition", "", "mit"],
        ["the target", "org/model", "not stated"],
        ["the text it was trained on", "org/text, more-text", "odc-by"],
    ]
    bare = vpd.model_card().data.to_dict()
    assert not {"license", "base_model", "datasets"} & bare.keys()


@pytest.mark.parametrize(
    ("name", "base_model"), [("org/model-70m", "org/model-70m"), ("gpt2", None), ("a/b/c", None), ("x y/z", None)]
)
def test_the_target_is_a_base_model_where_its_name_is_one_of_the_hub(vpd, name, base_model):
    vpd.record["target"] = {"class": "HookedTransformer", "name": name}
    assert vpd.model_card().data.base_model == base_model


def test_a_folder_is_not_a_base_model(vpd, tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    vpd.record["target"] = {"class": "TransformerBridge", "name": "runs/mine"}
    assert vpd.model_card().data.base_model is None


@pytest.mark.parametrize(
    ("target", "lines"),
    [
        (
            {
                "class": "HookedTransformer",
                "name": "gpt2",
                "processing": {"fold_ln": True, "center_writing_weights": True},
            },
            [
                "HookedTransformer.from_pretrained('gpt2', fold_ln=True, center_writing_weights=True)",
                "TransformerBridge.boot_transformers('gpt2')\nmodel.enable_compatibility_mode()",
            ],
        ),
        (
            {
                "class": "TransformerBridge",
                "name": "gpt2",
                "processing": {"fold_ln": False, "center_writing_weights": False},
            },
            [
                "TransformerBridge.boot_transformers('gpt2')\nvpd",
                "HookedTransformer.from_pretrained_no_processing('gpt2')",
            ],
        ),
    ],
)
def test_the_lines_that_load_it_are_those_of_its_target(vpd, target, lines):
    vpd.record["target"] = target
    blocks = code_of(vpd.model_card("user/repo"), "py")
    assert len(blocks) == 2
    for text, line in zip(blocks, lines, strict=True):
        ast.parse(text)
        assert line in text and "vpd = tl_vpd.Decomposition.from_hub('user/repo')" in text


def test_the_lines_of_a_custom_target_run(vpd, model, tokens, tmp_path):
    vpd.record["target"] = {"class": "HookedTransformer", "name": "custom"}
    vpd.save(tmp_path / "d")
    (text,) = code_of(vpd.model_card(), "py")
    text = text.replace("model = ...", "model = target").replace("'path/to/this/folder'", repr(str(tmp_path / "d")))
    model.to(torch.float32)
    namespace = {"target": model, "tokens": tokens}
    exec(text, namespace)
    assert namespace["cache"]["blocks.0.hook_q_ci"].shape == (2, 7, 6)


def test_an_imported_one_has_its_certificate_and_the_command(vpd):
    vpd.record.clear()
    vpd.record |= {
        "source": {
            "format": "param_decomp",
            "run": "s-1",
            "checkpoint": "model_9.pth",
            "step": 9,
            "settings": {"C": 6},
        },
        "certificate": {
            "tokens": "text",
            "kl_ci": 0.25,
            "kl_other_orders": {"forward": 0.5},
            "own_metrics": {"l0": 7.5},
            "alive": 70,
        },
    }
    card = vpd.model_card("user/repo")
    assert "It was imported, not trained with this library: format param\\_decomp, run s-1" in card.text
    assert rows_of(card, "## Certificate of the import")[2:] == [
        ["measured", "tokens", "text"],
        ["measured", "kl_ci", "0.25"],
        ["kl_other_orders", "forward", "0.5"],
        ["run's own", "l0", "7.5"],
        ["measured", "alive", "70"],
    ]
    assert code_of(card, "sh") == ["tl-vpd import s-1 --out DIR\n"] and code_of(card, "yaml") == ["C: 6\n"]
    assert "model, _ = tl_vpd.formats.load_param_decomp('s-1')" in card.text and "70 of them alive" in card.text


def test_targeted_and_compacted_ones_say_so(vpd, report):
    vpd.record |= {"targeted": {"target": {"rows": 12}, "nontarget": {"rows": 900}}, "training": {"steps": 5}}
    entry = {"threshold": 0.0, "tokens": 1000, "before": {"a": 9, "b": 9}, "after": {"a": 6, "b": 7}}
    vpd.record["compact"] = [entry]
    card = vpd.model_card(report=report)
    text = card.text
    assert code_of(card, "yaml") == ["targeted:\n  steps: 5\n"]
    assert "for chosen prompts only (12 target rows, 900 others)" in text and "output on the chosen prompts" in text
    assert "5 subcomponents were dropped afterwards, whose importance was nowhere above 0 on 1,000 tokens" in text
    vpd.record.clear()
    assert "Its record does not say how it was made." in vpd.model_card().text


@pytest.mark.parametrize(
    ("gamma", "words"),
    [
        ({"causal": False}, "**bidirectional**"),
        ({"causal": True}, "**causal**"),
        ({"kind": "per_subcomponent_mlps"}, "**each token alone**"),
    ],
)
def test_what_gamma_reads_is_said(gamma, words):
    vpd = decomposition_of(tiny_model(), gamma=GammaConfig(d_ci=8, n_blocks=1, n_heads=2, **gamma))
    assert words in vpd.model_card().text


def test_no_text_of_record_or_report_becomes_markup(vpd, report):
    fence = "x\n````\n# H\n<b>\n"
    vpd.record |= {
        "target": {"class": "HookedTransformer", "name": "plain", "processing": {"fold_ln": False}},
        "versions": {"torch": "2"},
        "training": {"sites": "all"},
        "certificate": {"tokens": "text", "own_metrics": {"l0": 1}},
    }
    record = copy.deepcopy(report.record)
    record["left_out"] = {}
    benign = vpd.model_card("user/repo", report=Evaluation(record))
    hostile = copy.deepcopy(record)
    next(row for row in hostile["tables"]["adversaries"] if row["adversary"] != "shared")["adversary"] = HOSTILE
    hostile["tables"]["future_leakage"][0] = dict.fromkeys(hostile["tables"]["future_leakage"][0], HOSTILE)
    vpd.record |= {
        "target": {"class": "HookedTransformer", "name": HOSTILE, "processing": {"fold_ln": HOSTILE}},
        "versions": {"torch": HOSTILE},
        "training": {"sites": fence},
        "certificate": {"tokens": HOSTILE, "own_metrics": {HOSTILE: 1}},
    }
    card = vpd.model_card("user/repo", report=Evaluation(hostile))
    tokens, expected = parsed(card), parsed(benign)
    assert [token.type for token in tokens] == [token.type for token in expected]
    assert not {token.type for token in [*tokens, *inline(tokens)]} & {
        "html_block",
        "html_inline",
        "link_open",
        "image",
    }
    assert "\u202e" not in card.text and "<script" not in "".join(t.content for t in tokens if t.type != "fence")
    assert card.data.to_dict() == benign.data.to_dict()
    for text in code_of(card, "py"):
        ast.parse(text)


@pytest.mark.parametrize(
    "text", ["# x", "- x", "1. x", "> x", "    x", "=", "---", "a_b_c", "<i>x</i>", "![x](y)", "~~x~~", "\\", "`"]
)
def test_plain_text_comes_back_as_it_was(text):
    tokens = MarkdownIt("commonmark").parse(plain(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert "".join(child.content for child in inline(tokens)) == " ".join(text.split())


def test_a_long_block_is_cut_and_a_fence_cannot_be_closed_from_inside():
    assert "5 more characters are in config.json" in block("x" * 20_005, "yaml")
    (token,) = MarkdownIt("commonmark").parse(block("a\n`````\nb", "yaml"))
    assert token.content == "a\n`````\nb\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"licence": "MIT licence"}, "CardConfig: licence='MIT licence': give an identifier of the Hub's list"),
        ({"base_model": "a/b/c"}, "'a/b/c' is not the name of a repository"),
        ({"datasets": ("x y",)}, "'x y' is not the name of a repository"),
        ({"license": "mit"}, r"CardConfig has no 'license' \(did you mean 'licence'\?\)"),
    ],
)
def test_a_wrong_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        CardConfig(**fields)
    assert "\n" not in str(caught.value)
