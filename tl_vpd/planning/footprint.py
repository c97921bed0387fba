"""What decomposing a model costs: bytes by part, and FLOPs of the matrix products of a step, from shapes alone.

    >>> from tl_vpd.planning.target import TransformerShape
    >>> gpt2 = TransformerShape(layers=12, d_model=768, heads=12, d_mlp=3072, vocabulary=50257, others=768 * 1024)
    >>> config = VPDConfig(batch_size=64, gamma={"d_ci": 1536, "n_blocks": 6, "n_heads": 16})
    >>> cost = footprint(Target.of(gpt2), config, context=512, execution=ExecutionConfig(micro_batch=4))
    >>> round(cost.bytes["moments"] / 2**30, 1), round(cost.total / 2**30)
    (6.3, 79)

Bytes: ``tl_vpd.planning.memory``. FLOPs: ``tl_vpd.planning.flops``.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from tl_vpd.checks import config_of, integer
from tl_vpd.planning.flops import flops_of
from tl_vpd.planning.memory import bytes_of
from tl_vpd.planning.run_shape import RunShape
from tl_vpd.planning.target import Target
from tl_vpd.site import select
from tl_vpd.training.config import ExecutionConfig, VPDConfig, counts_for


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process by part, and FLOPs of one process's step by pass.

    ``counts``: numbers in V and U (``components``), Γ (``gamma``) and the sources (``sources``). The other fields are what it was
    computed from.
    """

    bytes: dict[str, int]
    flops: dict[str, int]
    counts: dict[str, int]
    target: Target
    config: VPDConfig
    context: int
    execution: ExecutionConfig
    processes: int

    @property
    def total(self) -> int:
        """Bytes at the step's peak."""
        return sum(self.bytes.values())

    @property
    def step_flops(self) -> int:
        """FLOPs of a step's matrix products."""
        return sum(self.flops.values())

    def table(self) -> pd.DataFrame:
        """One row per part: ``GiB``, ``GFLOP`` (NaN where a part has none), and the totals."""
        rows = [{"part": part, "GiB": size / 2**30} for part, size in self.bytes.items()]
        rows.append({"part": "memory", "GiB": self.total / 2**30})
        rows += [{"part": part, "GFLOP": n / 1e9} for part, n in self.flops.items()]
        rows.append({"part": "step", "GFLOP": self.step_flops / 1e9})
        return pd.DataFrame(rows, columns=["part", "GiB", "GFLOP"])


def footprint(
    target: Target,
    config: VPDConfig | None = None,
    *,
    context: int,
    execution: ExecutionConfig | None = None,
    processes: int = 1,
) -> Footprint:
    """What one process of a run stores and computes.

    Args:
        target: shapes of the model.
        config: what is learned (None: ``VPDConfig()``).
        context: tokens per row.
        execution: how it runs; ``micro_batch`` and ``sharding`` are read (None: ``ExecutionConfig()``).
        processes: how many split the batch.

    Raises:
        ValueError: the batch cannot be split equally, or a number is below 1.
        KeyError: ``sites`` or ``C`` does not fit the target.
        TypeError: an argument is of another type.
    """
    if not isinstance(target, Target):
        raise TypeError(
            f"target is a {type(target).__name__}: give Target.of(model), or Target.of(TransformerShape(...))."
        )
    context, processes = integer("context", context, minimum=1), integer("processes", processes, minimum=1)
    config, execution = config_of(VPDConfig, config), config_of(ExecutionConfig, execution)
    if config.batch_size % processes:
        raise ValueError(
            f"batch_size {config.batch_size} cannot be split among {processes} processes: make it a multiple."
        )
    names = select(config.sites, [s.name for s in target.sites])
    sites = {s.name: s for s in target.sites if s.name in names}
    rows = config.batch_size // processes
    shape = RunShape(
        target=target,
        sites=sites,
        C=counts_for(config, sites),
        gamma=config.gamma.resolved(target.d_model),
        config=config,
        rows=rows,
        context=context,
        rows_at_once=min(rows, execution.micro_batch or rows),
    )
    costs = bytes_of(shape, execution.sharding, processes), flops_of(shape), shape.counts()
    return Footprint(*costs, target, config, context, execution, processes)
