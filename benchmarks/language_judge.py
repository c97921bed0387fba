"""Does a small language model in this process label and judge better than chance? Writes ``language_judge.json``.

    python -m benchmarks.language_judge --folder smollm2 --minutes 12     # extra ``real``; again until all addresses are there

SmolLM2-135M-Instruct judges random subcomponents of the bundled decomposition (chosen as in ``benchmarks.labels``), with labels
by token statistics and with labels that it writes. Labels are made from half of the rows and judged on the others. *mixed*: each
address is judged with the label of another one, with which a judge that reads labels must do worse.
"""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import tl_vpd
from benchmarks import harness
from benchmarks.labels import ROWS, chosen
from tl_vpd.analysis import LabelConfig, LanguageJudge, LocalModel, ScoreConfig, firings, label, score_labels
from tl_vpd.analysis.labels import Firings
from tl_vpd.evaluation.intervals import PerRow

ADDRESSES, WINDOWS, PER_TEST, RADIUS = 30, 6, 4, 8
KINDS = ("token statistics", "token statistics, mixed", "its labels")


def language_model(folder: Path) -> LocalModel:
    """SmolLM2 in the folder, written there at the first call."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        tl_vpd.bundled.smollm2(folder=folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return LocalModel(model, AutoTokenizer.from_pretrained(folder), name="SmolLM2-135M-Instruct")


def judged(fires: Firings, address: str, text: str, model: LocalModel, *, intruder: bool) -> dict[str, list[int]]:
    """Right answers and answers by test; the intruder test, which shows no label, only where it is asked for."""
    tests = ("intruder", "detection", "fuzzing") if intruder else ("detection", "fuzzing")
    config = ScoreConfig(per_test=PER_TEST, radius=RADIUS, tests=tests)
    judge = LanguageJudge(model, progress=False)
    scores = score_labels(fires, judge, [address], labels={address: text}, config=config).scores[address]
    return {test: [score.right, score.n] for test, score in scores.items()}


def its_label(source: Firings, name: str, model: LocalModel) -> str:
    """The label that the language model writes; empty where it has written none as asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return label(source, [name], model, config=LabelConfig(windows=WINDOWS, radius=RADIUS), progress=False).text(
            name
        )


def summary(scores: dict[str, dict[str, dict[str, list[int]]]]) -> list[dict[str, Any]]:
    """Mean scores over addresses by kind of label and test, with bootstrap intervals."""
    rows = []
    for kind in KINDS:
        for test in ("intruder", "detection", "fuzzing"):
            pairs = [by_kind[kind][test] for by_kind in scores.values() if test in by_kind.get(kind, {})]
            if pairs:
                values = np.array([right / n for right, n in pairs])
                row = {
                    "labels": kind,
                    "test": test,
                    "addresses": len(pairs),
                    "chance": 0.2 if test == "intruder" else 0.5,
                }
                figures = PerRow(values, np.ones(len(values))).columns("score", seed=0)
                rows.append(row | {n: round(x, 3) for n, x in figures.items() if math.isfinite(x)})
    return rows


def main() -> None:
    """Runs and writes."""
    parser = harness.parser("language_judge", __doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of the language model")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no further address begins after these")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    model, vpd = tl_vpd.bundled.model(), tl_vpd.bundled.decomposition()
    fires = firings(vpd, model, tl_vpd.bundled.tokens("validation")[:ROWS])
    source, rest = fires.in_rows(np.arange(0, ROWS, 2)), fires.in_rows(np.arange(1, ROWS, 2))
    names: list[str] = np.random.default_rng(0).permutation(chosen(fires, 3))[:ADDRESSES].tolist()
    record = harness.read(options.out)
    if record.get("addresses") != names:
        record = {"addresses": names, "rows": ROWS, "its_labels": {}, "scores": {}}
    local = language_model(options.folder)
    written, scores = record["its_labels"], record["scores"]
    statistics = label(source, names)
    for i, name in enumerate(names):
        if name in scores or time.monotonic() > until:
            continue
        written[name] = its_label(source, name, local)
        texts = statistics.text(name), statistics.text(names[(i + 7) % len(names)]), written[name]
        kinds = {kind: text for kind, text in zip(KINDS, texts, strict=True) if text}
        scores[name] = {
            kind: judged(rest, name, text, local, intruder=kind == KINDS[0]) for kind, text in kinds.items()
        }
        print(name, written[name], scores[name], flush=True)
        record["summary"] = summary(scores)
        harness.write(options.out, record, "language_judge --folder smollm2")
    for row in record["summary"]:
        print(row, flush=True)


if __name__ == "__main__":
    main()
