"""FLOPs of the matrix products of one process's step, by pass; a product of ``[n, a]`` and ``[a, b]`` is ``2 n a b``.

Products are counted exactly; elementwise work is left out.
"""

from __future__ import annotations

import math

from tl_vpd.planning.run_shape import RunShape
from tl_vpd.site import Site


def flops_of(shape: RunShape) -> dict[str, int]:
    """FLOPs by pass."""
    config, c = shape.config, shape.config.coefficients
    N, A = shape.rows * shape.context, shape.attacked_rows * shape.context
    # With micro-batches, minimality's sums of the whole batch need a pass before the one with gradients.
    passes = 2 if shape.micro_batches else 1
    clean, forward, backward = _target(shape)
    if shape.blocked_logits:  # no pass makes all logits: each masked one makes its logits and the target's
        unembedding = 2 * shape.target.d_model * shape.target.vocabulary
        clean, forward = clean - unembedding, forward + unembedding
    gamma_forward, gamma_backward = _gamma(shape)
    stochastic = shape.routed_share if config.stochastic_routing == "uniform_k" else 1.0
    adversarial = shape.routed_share if config.adversary.routing == "uniform_k" else 1.0
    masked = _masked(shape)
    flops = {
        "clean pass": passes * clean * N,
        "Γ": (passes * gamma_forward + gamma_backward) * N,
        "adversary's ascents": config.adversary.inner_steps
        * (A * (forward + backward) + int(A * adversarial * sum(masked[:2]))),
        **_muon(shape),
        "faithfulness": 6 * sum(s.d_in * s.d_out * shape.C[name] for name, s in shape.sites.items()),
    }
    whole = sum(masked)
    if config.merged:
        routed = A * adversarial + (N - A) * stochastic
        return flops | {"masked pass": N * (forward + backward) + int(routed * whole)}
    if c.stochastic:
        flops["stochastic pass"] = N * (forward + backward) + int(N * stochastic * whole)
    if c.adversarial:
        flops["adversarial pass"] = A * (forward + backward) + int(A * adversarial * whole)
    if c.layerwise:
        # An upper bound: the blocks before the masked site need no backward.
        flops["layerwise passes"] = N * (len(shape.sites) * (forward + backward) + whole)
    return flops


def _muon(shape: RunShape) -> dict[str, int]:
    """Five steps of Newton and Schulz's iteration on every matrix, which is as long as wide or longer."""
    sizes = [(min(m), max(m)) for m in shape.muon_matrices()]
    return {"Muon": sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sizes)} if sizes else {}


def _target(shape: RunShape) -> tuple[int, int, int]:
    """A token's products in the target: in a clean and in a masked forward, which starts at the first decomposed block, and
    in backward to activations alone."""
    t = shape.target
    first = min(site.layer or 0 for site in shape.sites.values())
    attention = 4 * shape.context * t.heads * t.d_head
    unembedding = 2 * t.d_model * t.vocabulary
    before = first * attention + sum(2 * s.d_in * s.d_out for s in t.sites if (s.layer or 0) < first)
    clean = t.layers * attention + unembedding + sum(2 * s.d_in * s.d_out for s in t.sites)
    to_inputs = sum(2 * s.d_in * s.d_out for s in t.sites if _input_needs_gradient(shape, s))
    return clean, clean - before, 2 * (t.layers - first) * attention + unembedding + to_inputs


def _input_needs_gradient(shape: RunShape, site: Site) -> bool:
    """Whether what a site reads depends on a masked site before it."""
    order = {name: i for i, name in enumerate(s.name for s in shape.target.sites)}
    first = next(s for s in shape.target.sites if s.name in shape.C)
    parallel = ({"q", "k", "v"}, {"in", "gate"})
    same_input = site.layer == first.layer and any({site.short, first.short} <= group for group in parallel)
    return order[site.name] > order[first.name] and not same_input


def _masked(shape: RunShape) -> tuple[int, int, int]:
    """A masked token's products with V and U at all sites: forward, backward to activations, and to V and U."""
    forward = to_activations = to_weights = 0
    for name, site in shape.sites.items():
        read, write = 2 * site.d_in * shape.C[name], 2 * site.d_out * shape.C[name]
        forward += read + write
        to_activations += write + (read if _input_needs_gradient(shape, site) else 0)
        to_weights += read + write
    return forward, to_activations, to_weights


def _gamma(shape: RunShape) -> tuple[int, int]:
    """A token's products in Γ: forward and backward; the inputs' gradient is never needed."""
    g, sites = shape.gamma, list(shape.sites.values())
    if g.kind == "per_subcomponent_mlps":
        acts = sum(2 * s.d_in * shape.C[s.name] for s in sites)
        return acts + 2 * g.hidden * shape.C_total, 6 * g.hidden * shape.C_total
    if g.kind in ("per_site_mlps", "global_mlp"):
        first = sum(2 * s.d_in * g.hidden for s in sites)
        last = 2 * g.hidden * shape.C_total
        return first + last, first + 2 * last
    assert g.d_ci is not None
    chunks = math.ceil(len(sites) / g.chunk) if g.kind == "chunked_transformers" else 1
    embed = 2 * sum(shape.gamma_widths()) * g.d_ci
    weights = g.n_blocks * (8 * g.d_ci**2 + 4 * g.d_ci * (g.d_mlp or 4 * g.d_ci))
    attention = g.n_blocks * 4 * shape.context * g.d_ci
    unembed = 2 * g.d_ci * shape.C_total
    inner = chunks * (weights + attention) + unembed
    # Fused attention makes its scores again in backward: five products for the forward's two.
    return embed + inner, embed + 2 * (chunks * weights + unembed) + chunks * attention * 5 // 2
