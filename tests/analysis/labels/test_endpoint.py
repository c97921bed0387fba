"""The endpoint against a server on this machine: good and bad answers, retries, limits, cost, resuming, and the key."""

from __future__ import annotations

import json
import socket
import threading
import time
import warnings

import pytest

from tests.analysis.labels.server import KEY, Server, label_reply, status, text_reply
from tests.analysis.labels.synthetic import ruled
from tl_vpd.analysis.labels import Endpoint, Question, label, label_cost
from tl_vpd.analysis.labels.endpoint import Cost
from tl_vpd.analysis.labels.label import checked_label


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


def endpoint(server, **options):
    settings = {
        "base_url": server.url,
        "model": "small",
        "key_variable": "TEST_KEY",
        "first_pause": 0.01,
        "timeout": 5.0,
    }
    return Endpoint(**{**settings, **options})


def questions(n):
    """Questions that any text answers but 'bad'."""

    def parse(text):
        if text == "bad":
            raise ValueError("The answer is bad.")
        return text

    return [Question(({"role": "user", "content": f"question {i}"},), parse, answer_tokens=10) for i in range(n)]


def echo(n, body):
    return text_reply(body["messages"][-1]["content"].upper())


def test_answers_come_in_order_with_the_key_and_at_most_so_many_at_once(server):
    def slowly(n, body):
        time.sleep(0.02)  # so that questions meet
        return echo(n, body)

    server.replies = slowly
    asked = endpoint(server, concurrency=3, options={"temperature": 0})
    assert asked.ask(questions(12), progress=False) == [f"QUESTION {i}" for i in range(12)]
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert 1 < server.most_at_once <= 3
    body = server.bodies[0]
    assert (body["path"], body["model"], body["max_tokens"], body["temperature"]) == (
        "/v1/chat/completions",
        "small",
        10,
        0,
    )
    assert KEY not in repr(asked) + str(asked.model_dump())


@pytest.mark.parametrize("code", [429, 500, 503, 408])
def test_what_passes_is_asked_again(server, code):
    server.replies = [status(code), status(code), text_reply("yes")]
    assert endpoint(server, retries=2).ask(questions(1), progress=False) == ["yes"]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    "reply",
    [
        (200, {}, b"{half"),
        (200, {}, b"\xff\xfe"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"error": {"message": "overloaded"}}'),
        (200, {}, b"[1]"),
        text_reply(None),
        text_reply(["a", "list"]),
        text_reply("bad"),
    ],
)
def test_broken_answers_are_asked_for_again(server, reply):
    server.replies = [reply, text_reply("yes")]
    assert endpoint(server).ask(questions(1), progress=False) == ["yes"]
    assert len(server.bodies) == 2


def test_half_an_answer_is_none(server):
    server.cut = 20
    with pytest.raises(OSError, match="1 of 1 questions to small have no answer"):
        endpoint(server, retries=1).ask(questions(1), progress=False)
    assert len(server.bodies) == 2


def test_a_server_that_is_slow_is_left(server):
    server.pause = 0.05
    began = time.monotonic()
    with pytest.raises(OSError, match=r"no answer within 0\.2 seconds"):
        endpoint(server, retries=0, timeout=0.2).ask(questions(1), progress=False)
    assert time.monotonic() - began < 2


def test_retry_after_holds_all_questions(server):
    server.replies = lambda n, body: status(429, Retry_After="1") if n == 0 else echo(n, body)
    assert endpoint(server, concurrency=1).ask(questions(3), progress=False) == [f"QUESTION {i}" for i in range(3)]
    assert server.times[1] - server.times[0] >= 0.99
    server.bodies.clear()
    with pytest.raises(OSError, match="asks for a pause of 3600 seconds"):
        server.replies = [status(429, Retry_After="3600")]
        endpoint(server).ask(questions(1), progress=False)
    assert len(server.bodies) == 1


def test_requests_keep_a_pace(server):
    server.replies = echo
    endpoint(server, requests_per_minute=1200.0).ask(questions(5), progress=False)
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert sum(gaps) >= 4 * 0.05 - 0.02


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            status(401, f"Incorrect key provided: {KEY}"),
            r"answers 401 \(Incorrect key provided: …\): check the key in .* TEST_KEY",
        ),
        (status(403), "answers 403"),
        (status(404, "no such model"), r"answers 404 \(no such model\): check base_url and model='small'"),
        ((302, {"Location": "/elsewhere"}, b""), "answers 302"),
    ],
)
def test_what_cannot_pass_stops_at_once_without_the_key(server, reply, message):
    server.replies = [reply]
    with pytest.raises(OSError, match=message) as error:
        endpoint(server, concurrency=1).ask(questions(20), progress=False)
    assert KEY not in str(error.value)
    assert len(server.bodies) <= 2  # one more may have been on its way
    assert not any(body.get("method") == "GET" for body in server.bodies)


def test_more_than_a_fifth_without_an_answer_stops_and_fewer_do_not(server):
    server.replies = lambda n, body: (
        status(400, "long\x1b[31m\nmessage") if "7" in body["messages"][0]["content"] else echo(n, body)
    )
    answers = endpoint(server, retries=0).ask(questions(17), progress=False)
    assert [i for i, answer in enumerate(answers) if answer is None] == [7]
    server.replies, server.bodies[:] = [status(400, "too\x1b[31m\nlong")], []
    with pytest.raises(OSError, match=r"have no answer, more than max_failures=0\.2 allows; the last one") as error:
        endpoint(server, retries=0, concurrency=1).ask(questions(100), progress=False)
    assert str(error.value).isprintable()
    assert "answers 400 (too [31m long)" in str(error.value)
    assert len(server.bodies) <= 5


def test_answers_are_stored_as_they_come_and_not_asked_for_again(server, tmp_path):
    server.replies = lambda n, body: echo(n, body) if n < 6 else status(401)
    asked = endpoint(server, concurrency=1, folder=tmp_path / "answers")
    with pytest.raises(OSError, match="401"):
        asked.ask(questions(10), progress=False)
    file = tmp_path / "answers" / "answers.jsonl"
    assert len(file.read_bytes().splitlines()) == 6
    assert KEY not in file.read_text() and "secret" not in file.read_text()
    with file.open("ab") as stream:
        stream.write(b'{"key": "cut by a ki')
    server.replies, server.bodies[:] = echo, []
    assert asked.ask(questions(10), progress=False) == [f"QUESTION {i}" for i in range(10)]
    assert len(server.bodies) == 4
    other = endpoint(server, folder=tmp_path / "answers", options={"temperature": 1})
    other.ask(questions(1), progress=False)  # another request
    assert len(server.bodies) == 5
    lines = file.read_bytes().splitlines(keepends=True)
    for damaged in (b"not JSON\n", b'{"key": "ab", "answer": "x"}\n', b"[]\n", b'{"key": "a"}\n'):
        file.write_bytes(damaged + lines[0])
        with pytest.raises(ValueError, match=r"Line 1 of .*answers\.jsonl"):
            asked.ask(questions(10), progress=False)


def test_a_stored_answer_that_does_not_parse_is_asked_for_again(server, tmp_path):
    asked = endpoint(server, folder=tmp_path)
    server.replies = [text_reply("once")]
    asked.ask(questions(1), progress=False)
    file = tmp_path / "answers.jsonl"
    file.write_bytes(file.read_bytes().replace(b"once", b"bad"))
    server.replies = [text_reply("again")]
    assert asked.ask(questions(1), progress=False) == ["again"]
    assert asked.ask(questions(1), progress=False) == ["again"]  # the last line counts
    assert len(server.bodies) == 2


def test_cost_is_shown_beforehand_and_a_cap_refuses(server, capsys):
    server.replies = echo
    priced = endpoint(server, input_price=1000.0, output_price=2000.0)
    asked = questions(4)
    # "question 3" is the pieces ques, tion, space, 3, with 8 for the message; 10 may be answered.
    cost = priced.cost(asked)
    assert cost == Cost(4, 48, 40, (48 * 1000 + 40 * 2000) / 1e6)
    priced.ask(asked)
    shown = capsys.readouterr()
    assert (
        "small: 4 questions, about 48 tokens sent and at most 40 answered: at most about 0.13." in shown.out + shown.err
    )
    server.bodies.clear()
    with pytest.raises(ValueError, match=r"max_cost=0\.12 is less than the cost \(4 questions"):
        priced.model_copy(update={"max_cost": 0.12}).ask(asked, progress=False)
    assert not server.bodies
    assert len(priced.model_copy(update={"max_cost": 0.128}).ask(asked[:1], progress=False)) == 1
    # The first answer costs (100 · 1000 + 10 · 2000) / 1e6 = 0.12 in truth, and 0.008 are not enough for another one.
    with pytest.raises(OSError, match=r"0\.12 of max_cost=0\.128 is spent"):
        priced.model_copy(update={"max_cost": 0.128, "concurrency": 1}).ask(asked, progress=False)
    with pytest.raises(ValueError, match="max_cost would do nothing without prices"):
        endpoint(server, max_cost=1.0)


def test_no_key_and_no_network_are_said_in_one_sentence(server, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    assert endpoint(server).ask(questions(1), progress=False)  # on this machine, none is needed
    assert server.keys[-1] is None
    far = endpoint(server, base_url="https://models.invalid/v1")
    with pytest.raises(
        OSError,
        match=r"The environment variable TEST_KEY is not set: set it to your key for https://models\.invalid/v1",
    ):
        far.ask(questions(1), progress=False)
    monkeypatch.setenv("TEST_KEY", "two\nlines")
    with pytest.raises(OSError, match="TEST_KEY does not hold a key") as error:
        far.ask(questions(1), progress=False)
    assert "two" not in str(error.value)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = endpoint(server, base_url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1", concurrency=1)
        monkeypatch.setenv("TEST_KEY", KEY)
        began = time.monotonic()
        with pytest.raises(OSError, match="cannot be reached") as error:
            nobody.ask(questions(5), progress=False)
    assert time.monotonic() - began < 3
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_an_interrupted_run_leaves_nothing_behind(server, tmp_path):
    """What was answered when another question stopped the run is stored; no thread goes on asking."""
    server.replies = lambda n, body: (time.sleep(0.2), echo(n, body))[1] if n else status(401)
    with pytest.raises(OSError, match="401"):
        endpoint(server, concurrency=4, folder=tmp_path).ask(questions(40), progress=False)
    n = len(server.bodies)
    assert n <= 8
    assert len((tmp_path / "answers.jsonl").read_bytes().splitlines()) == n - 1
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "ftp://host/v1"}, "base_url"),
        ({"base_url": "https://user:pass@host/v1"}, "without a user"),
        ({"base_url": "https://host/v1?key=1"}, "without a user, key or query"),
        ({"base_url": "host"}, "base_url"),
        ({"model": ""}, "model"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0.0}, "timeout"),
        ({"max_failures": 1.5}, "max_failures"),
        ({"options": {"model": "other"}}, "options has 'model'"),
        ({"key": KEY}, "Endpoint has no 'key'"),
        ({"folder": 3}, "folder"),
    ],
)
def test_configs_are_right_or_refused(server, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        endpoint(server, **options)


def test_labels_from_an_endpoint(server):
    fires = ruled()
    names = fires.addresses[:6]
    server.replies = lambda n, body: (
        label_reply("  after ' w8'  ") if n % 2 else text_reply('```json\n{"label": "at w0"}\n```')
    )
    labels = label(fires, list(names), endpoint(server), progress=False)
    assert tuple(labels) == names
    assert {(one.text, one.source) for one in labels.values()} == {("at w0", "small"), ("after ' w8'", "small")}
    prompt = server.bodies[0]["messages"][1]["content"]
    assert prompt.count("Excerpt ") == 30
    assert "at most 8 words" in prompt and "« w" in prompt and " −]" in prompt
    cost = label_cost(fires, list(names), endpoint(server, input_price=1.0, output_price=1.0))
    assert cost.questions == 6 and 0 < cost.price < 0.1


def test_an_address_without_a_label_is_said(server):
    fires = ruled()
    server.replies = lambda n, body: text_reply("bad") if n == 3 else label_reply("x")
    with pytest.warns(RuntimeWarning, match=r"small has no label for 1 of 12, the first is blocks"):
        labels = label(fires, None, endpoint(server, retries=0, concurrency=1), progress=False)
    assert len(labels) == 11
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label(fires, fires.addresses[0], endpoint(server), progress=False)


@pytest.mark.parametrize(
    "answer",
    [
        "at w0",
        json.dumps({"name": "x"}),
        json.dumps({"label": ["x"]}),
        json.dumps({"label": " "}),
        json.dumps({"label": "one two three four"}),
        json.dumps({"label": "x" * 21}),
        json.dumps({"label": "two\nlines"}),
        json.dumps({"label": "a\u202eb"}),
        '{"label": "a", "label": "b"}',
        '{"label": "cut',
    ],
)
def test_answers_that_are_no_labels(answer):
    with pytest.raises(ValueError, match="answer"):
        checked_label(answer, max_words=3, max_length=20)
