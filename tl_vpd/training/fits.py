"""Whether a run can fit in memory at all, asked before anything is made.

Counted is what a run cannot do without: with ``P`` numbers in V, U and Γ, four of each (parameters, gradients, AdamW's moments);
three of each persistent source; and an importance, its gradient and an inner activation of every subcomponent for the tokens
run at once. ``tl_vpd.planning`` counts the rest too, and says how long it takes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tl_vpd.adapters import Adapter
from tl_vpd.importance import GammaConfig, build
from tl_vpd.site import Site, select
from tl_vpd.training.config import ExecutionConfig, VPDConfig, counts_for
from tl_vpd.training.memory import machine_memory
from tl_vpd.training.micro_batch import attacked_among_first

FLOAT = 4
"""Bytes of a number in V, U, Γ, moments, importances and sources."""
POOL = 8


def run_numbers(
    config: VPDConfig, sites: Mapping[str, Site], gamma: GammaConfig, *, rows: int, pos: int
) -> dict[str, int]:
    """Numbers in V and U (``components``), Γ (``gamma``) and the persistent sources (``sources``) of a process.

    Args:
        config: what is learned.
        sites: that are decomposed.
        gamma: Γ, with its width.
        rows: of a process's batch.
        pos: positions of a row.
    """
    C = counts_for(config, sites)
    with torch.device("meta"):
        module = build(gamma, list(sites.values()), C)
    slots = attacked_among_first(rows, config.merged or 1.0) * (config.adversary.pool or pos)
    return {
        "components": sum((s.d_in + s.d_out) * C[name] for name, s in sites.items()),
        "gamma": sum(p.numel() for p in module.parameters()),
        "sources": slots * (sum(C.values()) + len(C)),
    }


def refuse_too_large(
    adapter: Adapter, config: VPDConfig, execution: ExecutionConfig, *, rows: int, pos: int, processes: int = 1
) -> None:
    """Refuses a run that needs more memory than there is.

    Args:
        adapter: of the target.
        config: what is learned.
        execution: how it runs.
        rows: of a process's batch.
        pos: positions of a row.
        processes: how many there are.

    Raises:
        ValueError: it cannot fit; the message says what would.
    """
    available = machine_memory(adapter.device)

    def gib(config: VPDConfig, execution: ExecutionConfig) -> float:
        return _least_bytes(adapter, config, execution, (rows, pos), processes) / 2**30

    if not available or (needed := gib(config, execution)) * 2**30 <= available:
        return
    pool = config.model_copy(update={"adversary": config.adversary.model_copy(update={"pool": POOL})})
    one_row = execution.model_copy(update={"micro_batch": 1})
    last = list(adapter.sites.values())[-1]
    block = (f"blocks.{last.layer}.*",) if last.layer is not None else (last.name,)
    one_block = pool.model_copy(update={"sites": block, "C": None, "tied": ()})
    tries = {
        "micro_batch=1": (config, one_row),
        f"adversary.pool={POOL}": (pool, execution),
        f"micro_batch=1 and adversary.pool={POOL}": (pool, one_row),
        f"sites={block[0]!r}, micro_batch=1 and adversary.pool={POOL}": (one_block, one_row),
    }
    sizes = {change: gib(*tried) for change, tried in tries.items()}
    fitting = next((change for change, size in sizes.items() if size * 2**30 <= 0.8 * available), None)
    remedy = (
        "decompose fewer sites with a smaller C" if fitting is None else f"with {fitting} it is {sizes[fitting]:.1f}"
    )
    raise ValueError(
        f"The run needs {needed:.1f} GiB or more and there are {available / 2**30:.1f}: {remedy} "
        "('tl-vpd plan' says what else fits)."
    )


def _least_bytes(
    adapter: Adapter, config: VPDConfig, execution: ExecutionConfig, batch: tuple[int, int], processes: int
) -> int:
    names = select(config.sites, adapter.sites)
    sites = {name: adapter.sites[name] for name in names}
    rows, pos = batch
    at_once = min(rows, execution.micro_batch or rows)
    numbers = run_numbers(config, sites, config.gamma.resolved(adapter.d_model), rows=rows, pos=pos)
    P, split = numbers["components"] + numbers["gamma"], 1 if execution.sharding == "none" else processes
    C_total = sum(counts_for(config, sites).values())
    return (
        sum(p.numel() * p.element_size() for p in adapter.model.parameters())
        + FLOAT * (P + 3 * P // split)
        + FLOAT * numbers["sources"] * (4 if at_once < rows else 3)
        + at_once * pos * C_total * (2 * FLOAT + adapter.dtype.itemsize)
    )
