"""Labels: what they are made from, what they may be, their file, and language models as judges."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.analysis.labels.server import KEY, Server, text_reply
from tests.analysis.labels.synthetic import firings_where, ruled, text
from tests.tiny import some_tokens
from tl_vpd import editing, viz
from tl_vpd.analysis import AuditConfig, HarvestConfig, attribution_graph, audit_circuit, harvest
from tl_vpd.analysis.labels import (
    Endpoint,
    Label,
    LabelConfig,
    Labels,
    LanguageJudge,
    LocalModel,
    Question,
    Score,
    ScoreConfig,
    TokenJudge,
    firings,
    label,
    score_labels,
)
from tl_vpd.analysis.labels.evidence import evidence_of
from tl_vpd.analysis.labels.local import Reading
from tl_vpd.analysis.labels.prompts import label_messages, marked, plain
from tl_vpd.analysis.labels.trials import Excerpt


def test_labels_of_known_rules_name_the_tokens():
    labels = label(ruled())
    assert re.fullmatch(
        r"at ' w[01]' 5\d%, ' w[01]' 4\d%|at ' w[01]' 50%, ' w[01]' 50%", labels["blocks.0.mlp.W_in:0"].text
    )
    assert labels.text("blocks.0.mlp.W_in:10").startswith("before ' w2")
    assert labels["blocks.0.mlp.W_in:0"].source == "token statistics"
    hostile = firings_where(text() % 2, {"component:0": text() % 2 == 0})
    hostile.names[0] = "</script>\n\u202e"
    assert label(hostile)["component:0"].text == r"at '</script>\n\u202e' 100%"


def test_a_harvest_and_firings_of_the_same_text_say_the_same(model, vpd):
    tokens, names = some_tokens(shape=(8, 7)), [f"blocks.{i}.mlp.W_in:{c}" for i in range(2) for c in range(6)]
    config = HarvestConfig(samples=3, windows=4, radius=3)
    harvested, fires = harvest(vpd, model, tokens, names, config=config), firings(vpd, model, tokens, names)
    options = {"windows": 4, "radius": 3, "seed": 0}
    of_harvest, of_firings = evidence_of(harvested, None, **options), evidence_of(fires, None, **options)
    assert len(of_harvest) > 8
    by_address = {e.address: e for e in of_firings}
    for one in of_harvest:
        other = by_address[one.address]
        assert one.density == pytest.approx(other.density)
        for a, b in ((one.inputs, other.inputs), (one.outputs, other.outputs)):
            columns = ["token", "count", "recall", "pmi"]
            pd.testing.assert_frame_equal(
                *(t.sort_values("token")[columns].reset_index(drop=True) for t in (a, b)), rtol=1e-5
            )
        assert 1 <= len(one.windows) <= 4 and 1 <= len(other.windows) <= 4
        assert len({(w.row, w.pos) for w in one.windows}) == len(one.windows)
        for window in other.windows:
            assert window.token_ids == tuple(
                tokens[window.row, window.start : window.start + len(window.tokens)].tolist()
            )
            assert float(window.importances[window.peak]) > 0.1
    assert label(harvested).keys() == label(fires).keys()
    with pytest.raises(ValueError, match="radius and seed do nothing for a harvest"):
        label(harvested, config=LabelConfig(radius=3))


def test_what_never_fires_has_no_label_and_is_refused_by_name():
    tokens = text()
    fires = firings_where(tokens, {"component:0": tokens == 3, "component:1": tokens > 99})
    assert list(label(fires)) == ["component:0"]
    with pytest.raises(ValueError, match=r"component:1 fires nowhere"):
        label(fires, ["component:0", "component:1"])


def test_the_question_shows_importances_signs_and_tables_and_no_control_characters():
    tokens = text()
    fires = firings_where(tokens, {"blocks.0.mlp.W_in:0": tokens == 3, "component:7": tokens == 3})
    fires.names[4] = "«\n\x00</b>"
    one, component = evidence_of(fires, None, windows=5, radius=20, seed=0)
    question = label_messages(one, max_words=6, tokens=3)[1]["content"]
    assert "at most 6 words" in question
    assert len(re.findall(r"^Excerpt \d: ", question, re.MULTILINE)) == 5
    assert re.search(r"« w3»\[[01]\.\d\d −\]", question)
    assert "« w3» (100%)" in question and "nats)" in question
    assert f"{float((tokens == 3).mean()):.2%}" in question
    assert "‹⏎�</b>" in question
    assert "\x00" not in question
    assert "sign" not in label_messages(component, max_words=6, tokens=3)[1]["content"]
    assert marked(Excerpt((1, 2), (" a", "b"), (False, True))) == " a«b»"
    assert plain("a\tb\r\n«c»") == "a⇥b␍⏎‹c›"


def test_labels_are_kept_with_their_scores(tmp_path):
    scored = Label("digits of a year", "by hand", {"intruder": Score("intruder", 7, 10)})
    labels = Labels({"blocks.1.mlp.W_in:12": scored, "component:3": Label("x", "y")})
    loaded = Labels.load(labels.save(tmp_path / "labels.json"))
    assert dict(loaded) == dict(labels)
    table = loaded.to_pandas()
    assert table.columns.tolist() == ["subcomponent", "label", "source", "intruder", "detection", "fuzzing"]
    assert table["intruder"].tolist()[0] == 0.7 and np.isnan(table["intruder"][1])
    assert labels.text("component:4") == ""
    with pytest.raises(KeyError, match=r"component:4 has no label \(did you mean 'component:3'"):
        labels["component:4"]
    fires = ruled()
    scores = score_labels(fires, TokenJudge(), fires.addresses[0], config=ScoreConfig(radius=6))
    with_scores = label(fires).with_scores(scores)
    assert set(with_scores[fires.addresses[0]].scores) == {"intruder", "detection", "fuzzing"}
    assert with_scores[fires.addresses[1]].scores == {}
    assert with_scores.top(1)["subcomponent"].tolist() == [fires.addresses[0]]


@pytest.mark.parametrize("wrong", ["", "  ", "two\nlines", "x" * 201, "\x1b[31mred", "a\u2028b"])
def test_a_label_is_one_line_of_plain_text(wrong):
    with pytest.raises(ValueError, match=r"text=.*: give a text of at most 200 characters on one line"):
        Label(wrong, "source")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"format": 2, "labels": {}}',
        '{"format": 1, "labels": {"x": {"text": "a", "source": "b"}}}',
        '{"format": 1, "labels": {"x:1": {"text": "a\\nb", "source": "b"}}}',
        '{"format": 1, "labels": {"x:1": {"text": "a"}}}',
        '{"format": 1, "labels": {"x:1": {"text": "a", "source": "b", "scores": {"guess": [1, 2]}}}}',
        '{"format": 1, "labels": {"x:1": {"text": "a", "source": "b", "scores": {"intruder": [3, 2]}}}}',
        '{"format": 1, "labels": {"x:1": {"text": "a", "source": "b", "scores": {"intruder": [0, 0]}}}}',
        "not JSON",
    ],
)
def test_files_that_hold_no_labels(tmp_path, content):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=r"labels\.json") as error:
        Labels.load(tmp_path / "labels.json")
    assert "\n" not in str(error.value)


@pytest.fixture
def judge(monkeypatch):
    """A judge behind a server that reads rules: it knows what ' wN' in a label means."""
    monkeypatch.setenv("TEST_KEY", KEY)
    server = Server()

    def reply(n, body):
        question = body["messages"][1]["content"]
        excerpts = re.findall(r"^Excerpt \d+: (.*)$", question, re.MULTILINE)
        if "Which excerpt" in question:
            marked = [set(re.findall(r"«( w\d+)»", e)) for e in excerpts]
            alone = [i for i, m in enumerate(marked) if not any(m & other for j, other in enumerate(marked) if i != j)]
            return text_reply(json.dumps({"answer": (alone or [0])[0] + 1}))
        named = set(re.findall(r" w\d+", question.split("Excerpt 1")[0]))
        if "guillemets" in question:
            return text_reply(
                json.dumps({"answer": [int(set(re.findall(r"«( w\d+)»", e)) <= named) for e in excerpts]})
            )
        return text_reply(json.dumps({"answer": [int(bool(named & set(re.findall(r" w\d+", e)))) for e in excerpts]}))

    server.replies = reply
    yield (
        LanguageJudge(
            Endpoint(base_url=server.url, model="reader", key_variable="TEST_KEY", first_pause=0.0, retries=1),
            progress=False,
        ),
        server,
    )
    server.shutdown()
    server.server_close()


def test_a_language_model_that_understands_labels_scores_1_and_one_that_guesses_fails(judge):
    tokens = text()
    fires = firings_where(tokens, {f"component:{i}": tokens == i for i in range(6)})
    right = Labels({f"component:{i}": Label(f"at w{i}", "by hand") for i in range(6)})
    swapped = Labels({f"component:{i}": Label(f"at w{(i + 1) % 6}", "by hand") for i in range(6)})
    reader, server = judge
    config = ScoreConfig(radius=6, per_test=6)
    scores = score_labels(fires, reader, labels=right, config=config)
    assert scores.judge == "reader"
    table = scores.by_site().set_index(["site", "test"])["score"]
    assert table["all"].to_dict() == pytest.approx({"intruder": 1.0, "detection": 1.0, "fuzzing": 1.0}, abs=0.02)
    assert not any(
        "«at w" in b["messages"][1]["content"] for b in server.bodies if "Which excerpt" in b["messages"][1]["content"]
    )
    wrong = score_labels(fires, reader, labels=swapped, config=config).by_site().set_index(["site", "test"])["score"]
    assert wrong["all", "fuzzing"] < 0.6 and wrong["all", "detection"] < 0.7
    assert wrong["all", "intruder"] == table["all", "intruder"]
    few = score_labels(fires, reader, labels={"component:2": "at w2"}, config=config)
    assert list(few.scores) == ["component:2"]
    with pytest.raises(ValueError, match="reads labels: give labels"):
        score_labels(fires, reader)


@pytest.mark.parametrize("answer", [[1], [1] * 11, ["1"] * 10, [2] * 10, [True, 0.5] * 5, "1", None])
def test_answers_of_another_form_are_asked_for_again_and_count_as_wrong(judge, answer):
    reader, server = judge
    server.replies = [text_reply(json.dumps({"answer": answer}))]
    tokens = text()
    fires = firings_where(tokens, {"component:0": tokens == 0})
    reader = LanguageJudge(reader.model.model_copy(update={"max_failures": 1.0}), progress=False)
    config = ScoreConfig(radius=6, per_test=5, tests=("detection",))
    scores = score_labels(fires, reader, labels={"component:0": "x"}, config=config)
    assert (scores["component:0"]["detection"].right, scores["component:0"]["detection"].n) == (0, 10)
    assert len(server.bodies) == 2


def test_labels_stand_beside_addresses_in_any_table():
    labels = Labels({"blocks.0.mlp.W_in:1": Label("colon", "by hand"), "component:2": Label("indent", "by hand")})
    edges = pd.DataFrame(
        {"source": ["embed", "blocks.0.mlp.W_in:1@3"], "target": ["component:2@4", ")@4"], "n": [1, 2]}
    )
    beside = labels.beside(edges)
    assert list(beside) == ["source", "source label", "target", "target label", "n"]
    assert beside["source label"].tolist() == ["", "colon"] and beside["target label"].tolist() == ["indent", ""]
    assert list(edges) == ["source", "target", "n"]
    for column in ("subcomponent", "node"):
        assert labels.beside(pd.DataFrame({column: ["blocks.0.mlp.W_in:1"]}))["label"].tolist() == ["colon"]
    nothing = pd.DataFrame({"node": ["a0.h1"]})
    pd.testing.assert_frame_equal(labels.beside(nothing), nothing)
    with pytest.raises(ValueError, match="has a column 'label': leave it out"):
        labels.beside(labels.to_pandas())


def test_labels_show_in_graphs_audits_and_edits(model, vpd):
    tokens = some_tokens(shape=(1, 5))
    address = "blocks.1.mlp.W_out:0"
    labels = Labels({address: Label("a label of the test", "by hand")})
    graph = attribution_graph(vpd, model, tokens, targets=[0])
    assert address in {label.partition("@")[0] for label in graph.labels}
    assert "a label of the test" in viz.graph(graph, labels=labels).scripts[0]
    config = AuditConfig(ablations=("adversarial",), budgets=(1,), controls=0)
    audit = audit_circuit(vpd, model, tokens, ["blocks.0.mlp.W_in:1"], lambda x: x[:, -1, 0].mean(), config=config)
    assert "a label of the test" in set(labels.beside(audit.top(200))["label"])
    edit = editing.scale(vpd, address, 0.5)
    assert labels.beside(edit.to_pandas())["label"].tolist() == ["a label of the test"]
    assert "a label of the test" in viz.table(labels.beside(edit.to_pandas()), "The edit").body


@pytest.fixture(scope="module")
def local():
    """A random small language model with the bundled tokenizer."""
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    from tl_vpd.bundled.loading import MODEL

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = GPTNeoXConfig(
        vocab_size=768,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LocalModel(GPTNeoXForCausalLM(config), tokenizer, name="random")


def test_a_local_model_takes_the_most_probable_choice(local):
    messages = ({"role": "user", "content": "Answer with a digit."},)
    ids = local.tokenizer("Answer with a digit.\n\nAnswer: ", return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]
    logits = local.model.eval()(ids).logits[0, -1].detach()
    choices = ("0", "1", "2", "3")
    best = max(choices, key=lambda c: float(logits[local.tokenizer.encode(c, add_special_tokens=False)[-1]]))
    local.model.train()
    state = torch.get_rng_state()
    assert local.ask([Question(messages, int, choices=choices)], progress=False) == [int(best)]
    assert local.model.training and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="do not end in different tokens"):
        local.ask([Question(messages, int, choices=("1", "11"))], progress=False)
    written = local.ask([Question(messages, str, answer_tokens=5), Question(messages, int)], progress=False)
    assert isinstance(written[0], str) and written[1] is None
    opened = local.ask([Question(messages, json.loads, answer_tokens=5, opening='{"label": "')], progress=False)
    assert list(opened[0]) == ["label"]
    with pytest.raises(ValueError, match="random reads 2048: show fewer"):
        local.ask([Question(({"role": "user", "content": "word " * 2000},), int)], progress=False)


def test_a_local_model_weighs_a_groups_answers_against_each_other(local):
    """Questions that begin alike, in any order, as each alone; a choice that is preferred everywhere is no answer."""
    choices = ("0", "1")
    texts = [f"Answer with a digit. {x}" for x in ("a", "bc", "bcd", "bc", "e " * 40, "f")]
    asked = [Question(({"role": "user", "content": t},), int, choices=choices) for t in texts]
    last = [local.tokenizer.encode(c, add_special_tokens=False)[-1] for c in choices]
    local.model.eval()
    logits = torch.stack([local.model(local._ids(q)).logits[0, -1, last].detach() for q in asked])
    assert local.ask(asked, progress=False) == logits.argmax(1).tolist()
    grouped = [replace(q, group="x") for q in asked]
    expected = (logits.log_softmax(1) - logits.log_softmax(1).mean(0)).argmax(1).tolist()
    assert set(expected) == {0, 1} and local.ask(grouped, progress=False) == expected
    reading = Reading(local.model)
    weights = torch.stack([local._weights(q, reading) for q in asked])
    torch.testing.assert_close(weights, logits.log_softmax(1))
    assert reading.cache is not None
    apart = [replace(q, group=str(i)) for i, q in enumerate(asked)]
    assert local.ask(apart, progress=False) == logits.argmax(1).tolist()


def test_a_local_model_judges_one_excerpt_at_a_time(local):
    tokens = text()
    fires = firings_where(tokens, {f"component:{i}": tokens == i for i in range(4)})
    labels = Labels({address: Label("x", "by hand") for address in fires.addresses})
    scores = score_labels(
        fires, LanguageJudge(local, progress=False), labels=labels, config=ScoreConfig(radius=4, per_test=4)
    )
    assert {test: score.n for test, score in scores["component:1"].items()} == {
        "intruder": 4,
        "detection": 8,
        "fuzzing": 8,
    }
    totals = scores.by_site().set_index(["site", "test"])["score"]["all"]
    assert abs(totals["detection"] - 0.5) < 0.25 and abs(totals["fuzzing"] - 0.5) < 0.25 and totals["intruder"] < 0.6
