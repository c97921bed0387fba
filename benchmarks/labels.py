"""What labels by token statistics are worth on the bundled decomposition, beside its nulls. Writes ``labels.json``.

    python -m benchmarks.labels                 # about a minute of one core
    python -m benchmarks.labels --rows 64       # a look

Each site's score is the mean over ``PER_SITE`` random subcomponents that fire at least ``LEAST`` times and at no more than
``DENSEST`` of the tokens. Half of the rows teach the judge (``TokenJudge``), the others are judged. The nulls fire as often: an
untrained Γ, random directions of the site's input, and random tokens.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

import tl_vpd
from benchmarks import harness
from tl_vpd.analysis import ClusterConfig, cluster
from tl_vpd.analysis.labels import Firings, ScoreConfig, TokenJudge, firings, label, null_firings, score_labels
from tl_vpd.site import Subcomponent

ROWS, PER_SITE, LEAST, DENSEST, ALPHA = 192, 12, 40, 0.2, 3.0
NULLS = ("untrained", "random directions", "shuffled")


def chosen(fires: Firings, per_site: int, seed: int = 0) -> list[str]:
    """Random addresses of every site, among those that fire often enough and not nearly everywhere."""
    generator = np.random.default_rng(seed)
    right = (fires.counts >= LEAST) & (fires.density <= DENSEST)
    by_site: dict[str, list[str]] = {}
    for i in right.nonzero()[0].tolist():
        by_site.setdefault(Subcomponent.parse(fires.addresses[i]).site, []).append(fires.addresses[i])
    return [a for names in by_site.values() for a in generator.permutation(names)[:per_site].tolist()]


def table(fires: Firings, nulls: dict[str, Firings], per_site: int) -> list[dict[str, Any]]:
    """Scores by site and test, beside those of the nulls."""
    names, judge, config = chosen(fires, per_site), TokenJudge(), ScoreConfig()
    scores = score_labels(fires, judge, names, config=config)
    others = {name: score_labels(null, judge, names, config=config) for name, null in nulls.items()}
    rows: list[dict[str, Any]] = scores.by_site(others).round(3).to_dict("records")
    return rows


def main() -> None:
    """Runs and writes."""
    parser = harness.parser("labels", __doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="of validation text, 128 tokens each")
    options = parser.parse_args()
    began = time.process_time()
    model, vpd = tl_vpd.bundled.model(), tl_vpd.bundled.decomposition()
    tokens = tl_vpd.bundled.tokens("validation")[: options.rows]
    fires = firings(vpd, model, tokens)
    record: dict[str, Any] = {"tokens": int(fires.real.sum()), "per_site": PER_SITE}
    record["by_site"] = table(fires, {name: null_firings(vpd, model, fires, null=name) for name in NULLS}, PER_SITE)
    clustering = cluster(vpd, model, tokens, config=ClusterConfig(alpha=ALPHA, threshold=fires.threshold))
    components = fires.components(clustering)
    record["components"] = table(components, {"shuffled": components.shuffled()}, 3 * PER_SITE)
    examples = label(fires, chosen(fires, 1))
    record["examples"] = {address: str(one) for address, one in examples.items()}
    record["cpu_seconds"] = round(time.process_time() - began, 1)
    for row in record["by_site"] + record["components"]:
        print(row, flush=True)
    harness.write(options.out, record, "labels" + (f" --rows {options.rows}" if options.rows != ROWS else ""))


if __name__ == "__main__":
    main()
