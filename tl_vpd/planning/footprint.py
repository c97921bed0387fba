"""What decomposing a model costs: bytes by part, and FLOPs of the matrix products of a step, from shapes alone.

    >>> gpt2 = transformer(layers=12, d_model=768, heads=12, d_mlp=3072, vocabulary=50257, others=768 * 1024)
    >>> config = VPDConfig(batch_size=64, gamma={"d_ci": 1536, "n_blocks": 6, "n_heads": 16})
    >>> cost = footprint(gpt2, config, context=512, execution=ExecutionConfig(micro_batch=4))
    >>> round(cost.bytes["moments"] / 2**30, 1), round(cost.total / 2**30)
    (6.3, 79)

With ``N`` tokens run at once, ``C`` subcomponents in all and ``P`` numbers in V, U and Γ, a process holds

    parameters 4 P,   gradients 4 P,   moments 8 P,   sources 12 · rows · slots · C (themselves and Adam's moments; 16 in parts)

and, for as long as a pass lasts, Γ's values and the gradient of importances ``8 N C``, the pass's drawn sources ``4 N C``, what a
masked pass keeps for its backward (x, y₀ and the inner activations of every site, and the model's own but for attention
patterns), Γ's own, and a few tensors of logits. ``sharding`` divides gradients after backward, moments and parameters among
processes.

Products are counted exactly; bytes of activations follow what the passes keep, and sums come out a tenth below what is measured
(``docs/scaling.md``). Left out: what libraries take, allocators' waste, the CUDA context, messages' buffers, elementwise time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch

from tl_vpd.importance import GammaConfig
from tl_vpd.importance import build as build_gamma
from tl_vpd.losses.unembedding import LOGITS_AT_ONCE
from tl_vpd.masking.routing import uniform_k_share
from tl_vpd.planning.target import Target, transformer
from tl_vpd.site import Site, select
from tl_vpd.training.config import ExecutionConfig, ShardingKind, VPDConfig, counts_for
from tl_vpd.training.engine.eager import LOGITS

__all__ = ["Footprint", "Target", "footprint", "transformer"]

FLOAT = 4
"""Bytes of a number in V, U, Γ, moments, importances and sources."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process by part, and FLOPs of one process's step by part.

    ``counts``: numbers in V and U (``components``), Γ (``gamma``) and the sources (``sources``).
    """

    bytes: dict[str, int]
    flops: dict[str, int]
    counts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the step's peak."""
        return sum(self.bytes.values())

    @property
    def step_flops(self) -> int:
        """FLOPs of a step's matrix products."""
        return sum(self.flops.values())

    def table(self) -> pd.DataFrame:
        """A row a part: ``GiB``, ``GFLOP`` (NaN where a part has none), and the totals."""
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
        execution: how it runs; ``micro_batch`` and ``sharding`` matter here (None: ``ExecutionConfig()``).
        processes: how many split the batch.

    Raises:
        ValueError: the batch cannot be split equally.
        KeyError: ``sites`` or ``C`` does not fit the target.
    """
    config, execution = config or VPDConfig(), execution or ExecutionConfig()
    if config.batch_size % processes:
        raise ValueError(
            f"batch_size {config.batch_size} cannot be split among {processes} processes: make it a multiple."
        )
    names = select(config.sites, [s.name for s in target.sites])
    sites = {s.name: s for s in target.sites if s.name in names}
    rows = config.batch_size // processes
    shape = _Shape(
        target,
        sites,
        counts_for(config, sites),
        config.gamma.resolved(target.d_model),
        config,
        rows,
        context,
        min(rows, execution.micro_batch or rows),
    )
    split = 1 if execution.sharding == "none" else processes
    return Footprint(_bytes(shape, split, execution.sharding), _flops(shape), _counts(shape))


@dataclass(frozen=True)
class _Shape:
    """A run's sizes: ``rows`` of a process, of which ``at_once`` go through the model together."""

    target: Target
    sites: Mapping[str, Site]
    C: Mapping[str, int]
    gamma: GammaConfig
    config: VPDConfig
    rows: int
    context: int
    at_once: int

    @property
    def total(self) -> int:
        """Subcomponents of all sites."""
        return sum(self.C.values())

    @property
    def width(self) -> int:
        """Entries of a concatenated source: subcomponents and Δs."""
        return self.total + len(self.C)

    @property
    def attacked(self) -> int:
        """Rows of a process with adversarial masks."""
        if not self.config.coefficients.adversarial:
            return 0
        return math.ceil(self.rows / 2) if self.config.merged else self.rows


def _counts(shape: _Shape) -> dict[str, int]:
    slots = shape.config.adversary.pool or shape.context
    attacked = math.ceil(shape.rows / 2) if shape.config.merged else shape.rows
    return {
        "components": sum((s.d_in + s.d_out) * shape.C[name] for name, s in shape.sites.items()),
        "gamma": sum(_gamma_parameters(shape)),
        "sources": attacked * slots * shape.width,
    }


def _gamma_parameters(shape: _Shape) -> list[int]:
    """Numbers in each of Γ's tensors."""
    with torch.device("meta"):
        gamma = build_gamma(shape.gamma, {name: s.d_in for name, s in shape.sites.items()}, shape.C)
    return [p.numel() for p in gamma.parameters()]


# -- bytes -----------------------------------------------------------------------------------------------------------


def _bytes(shape: _Shape, split: int, sharding: ShardingKind) -> dict[str, int]:
    counts = _counts(shape)
    P = counts["components"] + counts["gamma"]
    share = math.ceil(P / split)
    full = sharding == "full"
    largest = max(*(max(s.d_in, s.d_out) * shape.C[name] for name, s in shape.sites.items()), *_gamma_parameters(shape))
    found = {
        "target": shape.target.parameters * shape.target.itemsize,
        "parameters": FLOAT * (share + 2 * largest if full and split > 1 else P),
        "gradients": FLOAT * (share + largest if full and split > 1 else P),
        "moments": 2 * FLOAT * share,
        "sources": (3 if shape.at_once == shape.rows else 4) * FLOAT * counts["sources"],
        "values of gamma": 2 * FLOAT * _tokens(shape) * shape.total,
        "gamma's activations": _gamma_activations(shape),
        "logits": _logits(shape),
    }
    faithfulness = 2 * FLOAT * max(s.d_in * s.d_out for s in shape.sites.values())
    found["masked pass"] = max(_pass(shape), faithfulness)
    return found


def _tokens(shape: _Shape) -> int:
    return shape.at_once * shape.context


def _logits(shape: _Shape) -> int:
    """The target's log-probabilities, the masked logits and their gradient; of a block, and what they are made of, if blocked."""
    N, t = _tokens(shape), shape.target
    if not _blocked(shape):
        return N * t.vocabulary * (FLOAT + 2 * t.itemsize)
    return 3 * FLOAT * max(LOGITS_AT_ONCE, t.vocabulary) + 3 * t.itemsize * N * t.d_model


def _blocked(shape: _Shape) -> bool:
    """Whether logits are made in blocks: where there are many of them (``tl_vpd.training.engine.eager``)."""
    return shape.config.output == "kl" and _tokens(shape) * shape.target.vocabulary * FLOAT > LOGITS


def _pass(shape: _Shape) -> int:
    """A masked pass on all rows: what backward needs, and drawn sources or the sources' gradient."""
    t, N = shape.target, _tokens(shape)
    routed = _share(shape) if shape.config.stochastic_routing == "uniform_k" and not shape.attacked else 1.0
    acts = int(t.itemsize * N * shape.total * routed)
    outputs = t.itemsize * N * sum(s.d_out for s in shape.sites.values())
    mlp = sum(s.d_out for s in t.sites if s.short in ("in", "gate"))
    # A block: the residual stream twice, two norms (their input centred, and scaled), q, k, v, z and their rotated selves.
    own = t.itemsize * N * (t.layers * 12 * t.d_model + 2 * mlp)
    transient = 2 * t.itemsize * N * max(shape.C.values())
    return acts + outputs + own + transient + FLOAT * N * shape.width


def _gamma_activations(shape: _Shape) -> int:
    g, N = shape.gamma, _tokens(shape)
    d_in = [s.d_in for s in shape.sites.values()]
    read = sum(s.d_in for s in shape.sites.values() if s.short not in ("k", "v", "gate"))
    inputs = N * read * shape.target.itemsize
    if g.kind == "per_subcomponent_mlps":
        return inputs + FLOAT * N * shape.total * 4
    if g.kind == "per_site_mlps":
        return inputs + FLOAT * N * (read + 2 * g.hidden * len(d_in))
    chunks = math.ceil(len(d_in) / g.chunk) if g.kind == "chunked_transformers" else 1
    assert g.d_ci is not None
    block = 12 * g.d_ci + 2 * (g.d_mlp or 4 * g.d_ci)
    return inputs + FLOAT * N * (read + sum(d_in) + chunks * g.n_blocks * block)


# -- FLOPs -----------------------------------------------------------------------------------------------------------


def _flops(shape: _Shape) -> dict[str, int]:
    """By part, of one process's rows. A product of ``[n, a]`` and ``[a, b]`` is ``2 n a b``."""
    config, c = shape.config, shape.config.coefficients
    N = shape.rows * shape.context
    A = shape.attacked * shape.context
    seen = 1 if shape.at_once == shape.rows else 2
    forward, backward = _target(shape)
    clean = forward
    if _blocked(shape):  # no pass makes all logits: each masked one makes its own and the target's
        unembedding = 2 * shape.target.d_model * shape.target.vocabulary
        clean, forward = forward - unembedding, forward + unembedding
    gamma_forward, gamma_backward = _gamma(shape)
    stochastic = _share(shape) if config.stochastic_routing == "uniform_k" else 1.0
    adversarial = _share(shape) if config.adversary.routing == "uniform_k" else 1.0
    found = {
        "clean pass": seen * clean * N,
        "Γ": (seen * gamma_forward + gamma_backward) * N,
        "adversary's own steps": config.adversary.inner_steps
        * (A * (forward + backward) + int(A * adversarial * sum(_masked(shape)[:2]))),
        "faithfulness": 6 * sum(s.d_in * s.d_out * shape.C[name] for name, s in shape.sites.items()),
    }
    whole = sum(_masked(shape))
    if config.merged:
        routed = A * adversarial + (N - A) * stochastic
        found["masked pass"] = N * (forward + backward) + int(routed * whole)
        return found
    if c.stochastic:
        found["stochastic pass"] = N * (forward + backward) + int(N * stochastic * whole)
    if c.adversarial:
        found["adversarial pass"] = A * (forward + backward) + int(A * adversarial * whole)
    if c.layerwise:
        # To an approximation from above: the blocks before the masked site need no backward.
        found["layerwise passes"] = N * (len(shape.sites) * (forward + backward) + whole)
    return found


def _share(shape: _Shape) -> float:
    """The expected share of sites that uniform-k routing masks at a token."""
    return uniform_k_share(len(shape.sites))


def _target(shape: _Shape) -> tuple[int, int]:
    """A token's products in the target: forward, and backward to activations alone."""
    t = shape.target
    attention = t.layers * 4 * shape.context * t.heads * t.d_head
    unembedding = 2 * t.d_model * t.vocabulary
    forward = attention + unembedding + sum(2 * s.d_in * s.d_out for s in t.sites)
    back = sum(2 * s.d_in * s.d_out for s in t.sites if _wants_gradient(shape, s))
    return forward, 2 * attention + unembedding + back


def _wants_gradient(shape: _Shape, site: Site) -> bool:
    """Whether what a site reads depends on a masked site before it."""
    order = {name: i for i, name in enumerate(s.name for s in shape.target.sites)}
    first = next(s for s in shape.target.sites if s.name in shape.C)
    together = ({"q", "k", "v"}, {"in", "gate"})
    same = site.layer == first.layer and any({site.short, first.short} <= own for own in together)
    return order[site.name] > order[first.name] and not same


def _masked(shape: _Shape) -> tuple[int, int, int]:
    """A masked token's products with V and U at all sites: forward, backward to activations, and to V and U."""
    forward = back = parts = 0
    for name, site in shape.sites.items():
        read, write = 2 * site.d_in * shape.C[name], 2 * site.d_out * shape.C[name]
        forward += read + write
        back += write + (read if _wants_gradient(shape, site) else 0)
        parts += read + write
    return forward, back, parts


def _gamma(shape: _Shape) -> tuple[int, int]:
    """A token's products in Γ: forward and backward; the inputs' own gradient is never wanted."""
    g, sites = shape.gamma, list(shape.sites.values())
    if g.kind == "per_subcomponent_mlps":
        acts = sum(2 * s.d_in * shape.C[s.name] for s in sites)
        return acts + 2 * g.hidden * shape.total, 6 * g.hidden * shape.total
    if g.kind == "per_site_mlps":
        first = sum(2 * s.d_in * g.hidden for s in sites)
        last = 2 * g.hidden * shape.total
        return first + last, first + 2 * last
    assert g.d_ci is not None
    chunks = math.ceil(len(sites) / g.chunk) if g.kind == "chunked_transformers" else 1
    embed = 2 * sum(s.d_in for s in sites) * g.d_ci
    weights = g.n_blocks * (8 * g.d_ci**2 + 4 * g.d_ci * (g.d_mlp or 4 * g.d_ci))
    attention = g.n_blocks * 4 * shape.context * g.d_ci
    unembed = 2 * g.d_ci * shape.total
    inner = chunks * (weights + attention) + unembed
    # Fused attention makes its scores again in backward: five products for the forward's two.
    return embed + inner, embed + 2 * (chunks * weights + unembed) + chunks * attention * 5 // 2
