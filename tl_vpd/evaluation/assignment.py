"""The cheapest one-to-one assignment of rows to columns (the assignment problem), exactly.

Shortest augmenting paths with dual variables u, v (Jonker and Volgenant 1987): every row in turn is given a column by
Dijkstra's algorithm on the reduced costs ``c_ij − u_i − v_j ≥ 0``; time grows as n² m.

>>> assign(np.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]])).tolist()
[1, 0]
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def assign(cost: Float[np.ndarray, "row column"]) -> Int[np.ndarray, " row"]:
    """The column of every row such that no column is taken twice and the summed cost is least.

    Raises:
        ValueError: there are more rows than columns, or a cost is not finite.
    """
    n, m = cost.shape
    if n > m:
        raise ValueError(f"There are {n} rows and {m} columns: hand in the transpose, or add columns of constant cost.")
    if not np.isfinite(cost).all():
        raise ValueError("A cost is not finite: leave such pairs out, or give them a large number.")
    cost = cost.astype(np.float64)
    u, v = np.zeros(n), np.zeros(m)
    row_of = np.full(m, -1)
    for start in range(n):
        shortest, before, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, dtype=bool)
        row, column, reached = start, -1, 0.0
        while True:
            through = reached + cost[row] - u[row] - v
            better = ~done & (through < shortest)
            shortest[better], before[better] = through[better], column
            column = int(np.where(done, np.inf, shortest).argmin())
            reached, done[column] = shortest[column], True
            row = int(row_of[column])
            if row < 0:
                break
        inside = done & (row_of >= 0)
        u[start] += reached
        u[row_of[inside]] += reached - shortest[inside]
        v[done] += shortest[done] - reached
        while column >= 0:
            previous = int(before[column])
            row_of[column] = start if previous < 0 else row_of[previous]
            column = previous
    columns = np.empty(n, dtype=np.int64)
    columns[row_of[row_of >= 0]] = np.nonzero(row_of >= 0)[0]
    return columns
