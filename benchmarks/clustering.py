"""Clustering: seconds at two sizes, and components of the bundled decomposition beside chance. Writes ``clustering.json``.

    python -m benchmarks.clustering                 # 2,000 subcomponents on 20,000 tokens; the bundled decomposition
    python -m benchmarks.clustering --large         # 10,000 on 100,000 tokens too (2 GB)

*Planted*: groups of four subcomponents, each important at 80% of its group's tokens and at as many others at random. Seconds are
of the merges alone, medians of three runs (one of the large size), with the processor seconds beside them.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import scipy.sparse

import tl_vpd
from benchmarks import harness
from tl_vpd.analysis import ClusterConfig, cluster_ensemble, importance_patterns
from tl_vpd.analysis.clustering.merging import merge

SIZES = {"2,000 on 20,000": (2_000, 20_000, 0.02, 3, 0), "2,000 on 20,000, lags 2": (2_000, 20_000, 0.02, 1, 2)}
LARGE = {"10,000 on 100,000": (10_000, 100_000, 0.02, 1, 0)}
ROWS = 64
ALPHAS, SEEDS = (1.0, 3.0, 10.0, 30.0), (0, 1, 2)


def planted(n: int, n_tokens: int, density: float) -> scipy.sparse.csc_matrix:
    """Importances ``[token, n]`` in groups of four; a subcomponent is important at ``density`` of the tokens."""
    generator = np.random.default_rng(0)
    columns = []
    for _ in range(n // 4):
        group = generator.random(n_tokens) < density / 2
        for _ in range(4):
            important = (group & (generator.random(n_tokens) < 0.8)) | (generator.random(n_tokens) < density / 2)
            important[generator.integers(n_tokens)] = True
            columns.append(important.nonzero()[0])
    ends = np.cumsum([0, *map(len, columns)])
    entries = np.concatenate(columns)
    return scipy.sparse.csc_matrix((np.ones(len(entries), dtype=bool), entries, ends), shape=(n_tokens, n))


def timed(important: scipy.sparse.csc_matrix, rounds: int, lags: int) -> dict[str, float]:
    """Seconds of the merges, by the clock and of the processor, and how many groups are right."""
    clock, processor = [], []
    for _ in range(rounds):
        began, used = time.perf_counter(), time.process_time()
        history = merge(important, alpha=1.0, lags=lags)
        clock.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    groups = history.partition().reshape(-1, 4)
    right = sum(len(set(g)) == 1 and (history.partition() == g[0]).sum() == 4 for g in groups.tolist())
    return {
        "seconds": round(statistics.median(clock), 2),
        "cpu_seconds": round(statistics.median(processor), 2),
        "groups_found": round(float(right / len(groups)), 3),
    }


def bundled() -> list[dict[str, object]]:
    """The ensemble's table on validation text."""
    model, vpd = tl_vpd.bundled.model(), tl_vpd.bundled.decomposition()
    patterns = importance_patterns(vpd, model, tl_vpd.bundled.tokens("validation")[:ROWS])
    ensemble = cluster_ensemble(vpd, model, patterns, alphas=ALPHAS, seeds=SEEDS, config=ClusterConfig())
    rows: list[dict[str, object]] = ensemble.to_pandas().round(3).to_dict("records")
    return [{"tokens": patterns.n_tokens, "subcomponents": len(patterns.chosen), **row} for row in rows]


def main() -> None:
    """Runs and writes."""
    parser = harness.parser("clustering", __doc__)
    parser.add_argument("--large", action="store_true", help="the large size too")
    options = parser.parse_args()
    record = harness.read(options.out)
    for name, (n, n_tokens, density, rounds, lags) in (SIZES | (LARGE if options.large else {})).items():
        record[name] = timed(planted(n, n_tokens, density), rounds, lags)
        print(name, record[name], flush=True)
    record["bundled"] = bundled()
    harness.write(options.out, record, "clustering" + " --large" * options.large)


if __name__ == "__main__":
    main()
