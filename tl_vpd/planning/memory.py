"""Bytes of one process of a run, by what they hold.

With ``N`` tokens run at once, ``C`` subcomponents in all and ``P`` numbers in V, U and Γ, a process stores

    parameters 4 P,   gradients 4 P,   moments 8 P,   sources 12 · rows · slots · C (themselves and Adam's moments; 16 with
                                                      micro-batches)

and, for as long as a pass lasts, Γ's values and the gradient of importances ``8 N C``, the pass's stochastic sources ``4 N C``,
what a masked pass keeps for its backward (x, y₀ and the inner activations of every site, and the model's activations except
attention patterns), Γ's activations, and a few tensors of logits. ``sharding`` divides gradients, moments and parameters among
processes; the modules that are gathered (``training.distributed.sharding``) are whole as well, under ``optimizer`` all of them.

Bytes of activations follow what the passes keep; sums come out a tenth below what is measured (``docs/scaling.md``). Left out:
what libraries take, allocators' waste, the CUDA context, messages' buffers.
"""

from __future__ import annotations

import math

from tl_vpd.importance.inputs import inputs_of
from tl_vpd.losses.unembedding import LOGITS_AT_ONCE
from tl_vpd.planning.run_shape import RunShape
from tl_vpd.training.config import ShardingKind
from tl_vpd.training.fits import FLOAT


def bytes_of(shape: RunShape, sharding: ShardingKind, processes: int) -> dict[str, int]:
    """Bytes by what they hold, of one of the processes that ``sharding`` splits state among."""
    split = 1 if sharding == "none" else processes
    counts = shape.counts()
    P = counts["components"] + counts["gamma"]
    each = math.ceil(P / split)
    sites = ((s.d_in + s.d_out) * shape.C[name] for name, s in shape.sites.items())
    gathered = max(*sites, *shape.gamma_parameters())
    whole = P if sharding == "optimizer" else 2 * gathered
    faithfulness = 2 * FLOAT * max(s.d_in * s.d_out for s in shape.sites.values())
    return {
        "target": shape.target.parameters * shape.target.itemsize,
        "parameters": FLOAT * (P if split == 1 else each + whole),
        "gradients": FLOAT * (P if split == 1 else each + gathered),
        "moments": FLOAT * (2 * each - sum(a * b for a, b in shape.muon_matrices())),
        "sources": (4 if shape.micro_batches else 3) * FLOAT * counts["sources"],
        "values of gamma": 2 * FLOAT * shape.tokens_at_once * shape.C_total,
        "gamma's activations": _gamma_activations(shape),
        "logits": _logits(shape),
        "masked pass": max(_masked_pass(shape), faithfulness),
    }


def _logits(shape: RunShape) -> int:
    """The target's log-probabilities, the masked logits and their gradient; of a block, and what they are made of, if blocked."""
    N, t = shape.tokens_at_once, shape.target
    if not shape.blocked_logits:
        return N * t.vocabulary * (FLOAT + 2 * t.itemsize)
    return 3 * FLOAT * max(LOGITS_AT_ONCE, t.vocabulary) + 3 * t.itemsize * N * t.d_model


def _masked_pass(shape: RunShape) -> int:
    """A masked pass on all rows: what backward needs, and stochastic sources or the sources' gradient."""
    t, N = shape.target, shape.tokens_at_once
    routed = shape.config.stochastic_routing == "uniform_k" and not shape.attacked_rows
    acts = int(t.itemsize * N * shape.C_total * (shape.routed_share if routed else 1.0))
    outputs = t.itemsize * N * sum(s.d_out for s in shape.sites.values())
    mlp = sum(s.d_out for s in t.sites if s.short in ("in", "gate"))
    # A block: the residual stream twice, two norms (their input centred, and scaled), q, k, v, z and rotated q, k.
    model = t.itemsize * N * (t.layers * 12 * t.d_model + 2 * mlp)
    transient = 2 * t.itemsize * N * max(shape.C.values())
    return acts + outputs + model + transient + FLOAT * N * shape.width


def _gamma_activations(shape: RunShape) -> int:
    g, N = shape.gamma, shape.tokens_at_once
    d_in = [s.d_in for s in shape.sites.values()]
    # K and V read what Q reads, and the gate what W_in reads.
    read = sum(s.d_in for s in shape.sites.values() if s.short not in ("k", "v", "gate"))
    if g.reads == "residual":
        read = sum(inputs_of(g.reads, shape.sites.values()).values())
    inputs = N * read * shape.target.itemsize
    if g.kind == "per_subcomponent_mlps":
        return inputs + FLOAT * N * shape.C_total * 4
    if g.kind == "per_site_mlps":
        return inputs + FLOAT * N * (read + 2 * g.hidden * len(d_in))
    if g.kind == "global_mlp":
        return inputs + FLOAT * N * (read + sum(d_in) + 2 * g.hidden)
    chunks = math.ceil(len(d_in) / g.chunk) if g.kind == "chunked_transformers" else 1
    assert g.d_ci is not None
    block = 12 * g.d_ci + 2 * (g.d_mlp or 4 * g.d_ci)
    return inputs + FLOAT * N * (read + sum(shape.gamma_widths()) + chunks * g.n_blocks * block)
