"""Where subcomponents may start: at what each weight does to the target's tokens, with other data read as little as possible.

On a few prompts a site has n different inputs, the columns of ``X [d_in, n]``; its inputs x on non-target data have second
moments ``S = E[x xᵀ]``. Of all V whose columns pass one of the prompts' inputs each, ``Xᵀ V = 1``, this one reads least of other
data, in the sense of ``E[‖Vᵀ x‖²]``:

    V = S⁻¹ X (Xᵀ S⁻¹ X)⁻¹,        U = Xᵀ W

On the prompts the subcomponents do what the weight does, ``Xᵀ V U = Xᵀ W``, and Δ does the rest; training finds which of them are
needed. Rank-one edits of facts read in the same way (ROME, arXiv 2202.05262, equation 2).

A dataset has more different inputs than a site has subcomponents. With its second moments ``T = E[x xᵀ]``, V are the C directions
with the largest ratio of what they read of the target to what they read of other data (generalised eigenvectors; for prompts both
forms of V span the same directions), and U is the regression of what the weight writes on what V reads:

    T v = λ S v,        U = (Vᵀ T V)⁻¹ Vᵀ T W

Neither is part of the targeted paper, whose runs of 30,000 steps start at random directions. A site with more subcomponents than
that has random ones besides, which write nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.components import Components
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.forward.site_taps import SitePass
from tl_vpd.training.data.run_data import Rows
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.targeted.data import TargetedData

RIDGE = 1e-2
"""Added to S, as a multiple of its mean diagonal."""
SAME = 1e-3
"""Inputs that differ by less than this, relative to their norm, are one."""
TOKENS_PER_INPUT, TOKENS_PER_INPUT_OF_DATASETS = 4, 16
"""Tokens for S, and for S and T where the target is a dataset, per dimension of the widest input."""
UNREAD = 1e-8
"""Directions with a ratio below this, relative to the largest, have no subcomponent."""


@torch.no_grad()
def start_at_target(masked_model: MaskedModel, components: Components, data: TargetedData, world: World) -> None:
    """Sets V and U of every site from the target's prompts (or its first batches) and the first non-target batches.

    Args:
        masked_model: entered, of the decomposition.
        components: of it.
        data: both streams.
        world: the processes, which start alike.

    Raises:
        ValueError: a site has more different inputs on the target's prompts than subcomponents.
    """
    widest = max(site.d_in for site in components.sites.values())
    if data.prompts is None:
        n, first = TOKENS_PER_INPUT_OF_DATASETS * widest, data.at(0)[0][:1]
        T = second_moments(masked_model, components, lambda step: data.at(step)[:2], n, world)
        S = second_moments(masked_model, components, data.nontarget.at, n, world)
        solved = {name: readers_of_dataset(T[name], S[name]) for name in S}
    else:
        S = second_moments(masked_model, components, data.nontarget.at, TOKENS_PER_INPUT * widest, world)
        X, first = _inputs_of_prompts(masked_model, components, data.prompts), data.prompts[0][None]
        solved = {name: (readers(X[name], S[name]), X[name]) for name in S}
    for name, same in _sources(masked_model, components, first).items():
        V, regression = solved[same]
        C = components.V[name].shape[1]
        if data.prompts is None:
            V, regression = V[:, :C], regression[:C]
        elif len(regression) > C:
            raise ValueError(
                f"init='target': {name} has {len(regression)} different inputs on the target's prompts, and C={C} subcomponents: "
                f"give it at least {len(regression)}, or fewer tokens in the prompts, or leave init out."
            )
        U = regression @ masked_model.adapter.weight(name).to(regression)
        # Both sides of a subcomponent are equally long, for one learning rate.
        scale = (U.norm(dim=1) / V.norm(dim=0)).sqrt()
        components.V[name][:, : len(U)] = V * scale
        components.U[name].zero_()
        components.U[name][: len(U)] = U / scale[:, None]


def readers(X: Float[Tensor, "n d_in"], S: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in n"]:
    """V for inputs X, in float64 inside.

    Args:
        X: different inputs.
        S: second moments of other inputs.
    """
    L = _root(S)
    white = torch.linalg.solve_triangular(L, X.double().T, upper=False)  # L⁻¹ Xᵀ, and so S⁻¹ Xᵀ = L⁻ᵀ white
    V = torch.linalg.solve_triangular(L.T, white @ torch.linalg.pinv(white.T @ white), upper=True)
    return V.to(X)


def readers_of_dataset(
    T: Float[Tensor, "d_in d_in"], S: Float[Tensor, "d_in d_in"]
) -> tuple[Float[Tensor, "d_in n"], Float[Tensor, "n d_in"]]:
    """V for a dataset, largest ratio first, and ``(Vᵀ T V)⁻¹ Vᵀ T``, in float64 inside.

    Args:
        T: second moments of the target's inputs.
        S: second moments of other inputs.
    """
    L = _root(S)
    white = torch.linalg.solve_triangular(L, T.double(), upper=False)
    ratios, Q = torch.linalg.eigh(torch.linalg.solve_triangular(L, white.T, upper=False))  # of L⁻¹ T L⁻ᵀ
    V = torch.linalg.solve_triangular(L.T, Q[:, ratios > UNREAD * ratios[-1]].flip(1), upper=True)
    TV = T.double() @ V  # VᵀTV is diagonal
    return V.to(T), (TV / (V * TV).sum(0)).T.to(T)


def _root(S: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in d_in"]:
    """L with ``L Lᵀ = S`` and the ridge, in float64."""
    S = S.double()
    return torch.linalg.cholesky(S + RIDGE * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype, device=S.device))


def different(X: Float[Tensor, "n d_in"]) -> Float[Tensor, "m d_in"]:
    """The rows that are no repetition of an earlier one.

    Args:
        X: inputs.
    """
    rows: list[Tensor] = []
    for x in X:
        if all((x - row).norm() > SAME * row.norm() for row in rows):
            rows.append(x)
    return torch.stack(rows)


def second_moments(
    masked_model: MaskedModel, components: Components, batch: Callable[[int], Rows], tokens: int, world: World
) -> dict[str, Tensor]:
    """Second moments of inputs on a stream's first batches, by the name of the first site that has the input.

    Args:
        masked_model: entered.
        components: whose sites' inputs they are.
        batch: the stream's batch of a step.
        tokens: how many, at least.
        world: the processes, which have other rows each.
    """
    sums, n, step = dict[str, Tensor](), 0, 0
    while n < tokens:
        rows, token_mask = batch(step)
        step += 1
        for name, x in _inputs(masked_model, components, rows, token_mask).items():
            sums[name] = sums[name].add_(x.T @ x) if name in sums else x.T @ x
        n += rows.shape[:2].numel() if token_mask is None else int(token_mask.sum())
    return {name: world.add(S) / (n * world.size) for name, S in sums.items()}


def _inputs_of_prompts(masked_model: MaskedModel, components: Components, prompts: list[Tensor]) -> dict[str, Tensor]:
    """The different inputs of the prompts' tokens, by the name of the first site that has them."""
    X: dict[str, list[Tensor]] = {}
    for prompt in prompts:
        for name, x in _inputs(masked_model, components, prompt[None]).items():
            X.setdefault(name, []).append(x)
    return {name: different(torch.cat(inputs)) for name, inputs in X.items()}


def _inputs(
    masked_model: MaskedModel, components: Components, tokens: Tensor, token_mask: Tensor | None = None
) -> dict[str, Float[Tensor, "token d_in"]]:
    """Every input at real tokens, once, by the name of the first site that has it."""
    inputs = _run(masked_model, components, tokens, token_mask)
    once = {id(x): (name, x) for name, x in reversed(inputs.items())}
    parameter = next(components.parameters())
    return {
        name: (x.flatten(0, -2) if token_mask is None else x[token_mask]).to(parameter) for name, x in once.values()
    }


def _sources(masked_model: MaskedModel, components: Components, tokens: Tensor) -> dict[str, str]:
    """By site, the first site that has the same input."""
    inputs = _run(masked_model, components, tokens)
    first = {id(x): name for name, x in reversed(inputs.items())}
    return {name: first[id(x)] for name, x in inputs.items()}


def _run(
    masked_model: MaskedModel, components: Components, tokens: Tensor, token_mask: Tensor | None = None
) -> dict[str, Tensor]:
    run = SitePass(collect=list(components.sites))
    masked_model.run(tokens, run, token_mask)
    return {name: run.inputs[name] for name in components.sites}
