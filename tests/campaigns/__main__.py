"""``python -m tests.campaigns``: runs campaigns and writes their table into a page (see the package's docstring)."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.campaigns.counts import Counts
from tests.campaigns.short import budget_of, campaign_names, run_apart

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- campaigns: written by make campaign -->", "<!-- end of campaigns -->"


def say(text: str) -> None:
    """A line of progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def code_digest(name: str) -> str:
    """Of the package's code and the campaign's: results of other code are not used again."""
    digest = hashlib.sha256()
    for file in [*sorted((ROOT / "tl_vpd").rglob("*.py")), ROOT / "tests" / "campaigns" / f"{name}.py"]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def result_of(name: str, results: Path, *, short: bool, seed: int) -> dict[str, Any]:
    """A campaign's result, from its file where that is of the same code, seed and budget.

    Args:
        name: of the campaign's module.
        results: the folder of results.
        short: its short form.
        seed: of what is tried.
    """
    file = results / f"{name}.json"
    budget = budget_of(name, short)
    made = {"code": code_digest(name), "seed": seed, "tries": budget.tries, "seconds": budget.seconds}
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["made"] == made:
            say(f"{name}: {Counts.from_dict(before['counts']).summary()} (from {file})")
            return before
    began = time.monotonic()
    counts = run_apart(name, short=short, seed=seed)
    result = {"name": name, "made": made, "took": time.monotonic() - began, "counts": counts.as_dict()}
    results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(f"{name}, {result['took']:.0f} s: {counts.report()}")
    return result


def table(results: list[dict[str, Any]]) -> str:
    """What was tried, how often and what came out, as Markdown."""
    lines = ["| campaign | what is tried | tries | what came out |", "| --- | --- | ---: | --- |"]
    total = Counts()
    for result in results:
        counts = Counts.from_dict(result["counts"])
        tried = " ".join(importlib.import_module(f"tests.campaigns.{result['name']}").TRIED.split())
        lines.append(f"| `{result['name']}` | {tried} | {counts.tries:,} | {counts.summary()} |")
        total.merge(counts)
    seeds = ", ".join(sorted({str(r["made"]["seed"]) for r in results}))
    took = sum(r["took"] for r in results) / 60
    lines.append(f"\n{total.tries:,} tries, {total.failures} failures, silent {total.outcomes['silent']}. Seed {seeds}; "
                 f"{took:.0f} minutes of computing; {processor()}; Python {platform.python_version()}.")  # fmt: skip
    return "\n".join(lines)


def processor() -> str:
    """The processor's name and how many there are."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def write_table(page: Path, text: str) -> None:
    """Puts the table between the page's two marks.

    Args:
        page: a Markdown file that has the marks.
        text: the table.

    Raises:
        ValueError: the page has no marks.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no '{BEGIN}' … '{END}': add both where the table belongs.")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Runs the campaigns; 1 if a try failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns")
    parser.add_argument("--out", help="the page whose table is written; without it, only the screen")
    parser.add_argument("--only", action="append", help="this campaign (may be repeated)")
    parser.add_argument("--short", action="store_true", help="the short forms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="how many campaigns run at the same time")
    options = parser.parse_args()
    names = campaign_names()
    if unknown := set(options.only or []) - set(names):
        parser.error(f"no campaign {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    if options.out and not Path(options.out).is_file():
        parser.error(f"--out {options.out}: there is no such page; its table is replaced, so it must be there")
    folder = ROOT / "build" / ("campaign-short" if options.short else "campaign")
    with ThreadPoolExecutor(options.at_once) as pool:
        results = list(
            pool.map(
                lambda name: result_of(name, folder, short=options.short, seed=options.seed),
                [n for n in names if not options.only or n in options.only],
            )
        )
    if options.out:
        write_table(Path(options.out), table(results))
    say(table(results))
    return 1 if any(Counts.from_dict(r["counts"]).failures for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
