"""Published scores on toys of this package.

SPD: table 1 of its paper (arXiv 2506.20790, version 1), MMCS and ML2R of the embedding W over seeds, each with its deviation.
"""

from __future__ import annotations

PUBLISHED: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    "tms_5_2": {"spd": {"mmcs": (1.000, 0.000), "ml2r": (0.993, 0.002)}},
    "tms_40_10": {"spd": {"mmcs": (1.000, 0.000), "ml2r": (1.010, 0.007)}},
    "tms_5_2_id": {"spd": {"mmcs": (1.000, 0.000), "ml2r": (0.992, 0.010)}},
    "tms_40_10_id": {"spd": {"mmcs": (1.000, 0.000), "ml2r": (1.031, 0.001)}},
}
"""By toy, method and measure: mean and standard deviation."""
