"""Attacks on the bundled decomposition: the ladder of budgets, and adversaries with a choice for every position or token.

    python -m benchmarks.attacks        # benchmarks/results/attacks.json, docs/bundled.md; about 10 minutes on one core

On the first ``--rows`` validation rows of 128 tokens: the adversaries with a choice for every position or token, with momentum
and of other explanations at 20 steps, and the standard adversary (one source per subcomponent and Δ for all tokens) at 20 to
1,280 steps, three starts up to 80 steps; each with its 95% interval over rows. Steps × size = 2. What the file has of this
decomposition stays, so a stopped command goes on.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import harness
from scripts.bundled import page
from tl_vpd import bundled
from tl_vpd.evaluation import LADDER, STANDARD, Adversary, attack, sampled
from tl_vpd.evaluation.modes import masks_in_row

STARTS = {20: 3, 40: 3, 80: 3}


def main() -> None:
    """Measures what is missing and writes the record and the page."""
    parser = harness.parser("attacks", __doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--budgets", nargs="+", type=int, default=list(LADDER))
    options = parser.parse_args()
    torch.set_num_threads(1)
    vpd, rows = bundled.decomposition(), bundled.tokens("validation")[: options.rows]
    kinds = {f"{name}, 20": kind for name, kind in STANDARD.items() if name != "shared"}
    kinds |= {f"shared, {k}": Adversary(steps=k, starts=STARTS.get(k, 1)) for k in options.budgets}
    settings = {"rows": options.rows, "decomposition": page.decomposition_id()}
    record: dict[str, Any] = harness.read(options.out)
    if any(record.get("settings", {}).get(name) != value for name, value in settings.items()):
        record = {}
    with sampled(vpd, bundled.model(), rows) as sample:
        record["zero"] = sample.distances(masks_in_row(sample, "zero")).mean
        for name, kind in kinds.items():
            if name not in record.setdefault("attacks", {}):
                result = attack(sample, kind)
                record["attacks"][name] = {**result.record(seed=sample.seed), "by_start": result.losses}
                record.pop("settings", None)
                harness.write(options.out, record, "attacks", **settings)
    page.main()


if __name__ == "__main__":
    main()
