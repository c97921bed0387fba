"""``tl-vpd label``: by token statistics, by an endpoint on this machine, of components; and that pages take its file."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.analysis.labels.server import KEY, Server, label_reply
from tl_vpd import bundled
from tl_vpd.analysis import ClusterConfig, Labels, cluster
from tl_vpd.cli import app
from tl_vpd.recipe.dashboards import _labels


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A few subcomponents of the bundled decomposition, and their components."""
    model, tokens = bundled.model(), bundled.tokens("validation")
    vpd = bundled.decomposition().compact(model, tokens[:2, :32], threshold=0.9)
    folder = tmp_path_factory.mktemp("labelled") / "small"
    vpd.save(folder)
    config = ClusterConfig(alpha=1.0, threshold=0.5)
    cluster(vpd, model, tokens[:4], config=config).save(folder.parent / "components.json")
    return folder


def run(folder: Path, out: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["label", str(folder), "--rows", "8", "--out", str(out), *options])
    return result.exit_code, result.output.replace("\n", " ")


def test_token_statistics_label_subcomponents_and_components(small, tmp_path):
    out = tmp_path / "labels.json"
    code, output = run(small, out, "--most", "6", "--components", str(small.parent / "components.json"))
    assert code == 0 and "Written: " in output and "intruder" in output, output
    labels = Labels.load(out)
    kinds = [address.startswith("component:") for address in labels]
    assert kinds.count(False) == 6 and 1 <= kinds.count(True) <= 6
    assert all(label.source == "token statistics" for label in labels.values())
    assert any(label.scores for label in labels.values())
    assert _labels(out) == labels
    code, output = run(small, out)
    assert code == 2 and "is there already" in output


def test_an_endpoint_labels_within_its_cost_and_goes_on(small, tmp_path, monkeypatch):
    server, out = Server(), tmp_path / "labels.json"
    monkeypatch.setenv("MY_KEY", KEY)
    options = ["--most", "3", "--endpoint", server.url, "--language-model", "small", "--key-variable", "MY_KEY"]
    priced = [*options, "--prices", "1,2", "--judge", "none"]
    code, output = run(small, out, *priced, "--cost")
    assert code == 0 and "3 questions, about" in output and "at most about 0.0" in output and not server.bodies
    code, output = run(small, out, *priced, "--max-cost", "0.0000001")
    assert code == 2 and "is less than the cost" in output and not server.bodies and not out.exists()
    server.replies = [label_reply("a label of the test")]
    code, output = run(small, out, *priced, "--max-cost", "1")
    assert code == 0 and len(server.bodies) == 3, output
    assert {label.text for label in Labels.load(out).values()} == {"a label of the test"}
    assert KEY not in output and KEY not in out.read_text() and (tmp_path / "labels.answers").is_dir()
    out.unlink()
    assert run(small, out, *priced)[0] == 0 and len(server.bodies) == 3  # all answers were stored
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--language-model", "x"], "does nothing without --endpoint"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "needs --language-model"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--language-model", "x", "--prices", "1"], "give two numbers"),
        (["--judge", "model"], "needs a language model"),
        (["--judge", "nobody"], "judge='nobody'"),
        (["--cost"], "Only an endpoint costs anything"),
        (["--local", "nowhere"], "nowhere has no config.json"),
        (["--components", "nowhere.json"], "nowhere.json does not exist"),
    ],
)
def test_what_is_wrong_is_said(small, tmp_path, options, message):
    code, output = run(small, tmp_path / "labels.json", *options)
    assert code == 2 and message in output and not list(tmp_path.iterdir()), output
