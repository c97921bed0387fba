"""Where the subcomponents of a few prompts may start: at what each weight does to the prompts' tokens, read so that other data
are read as little as possible.

On the prompts a site has n different inputs, the columns of ``X [d_in, n]``; on non-target data its inputs x have second moments
``S = E[x xᵀ]``. Of all V whose columns pass one of the prompts' inputs each, ``Xᵀ V = 1``, this one reads least of other data, in
the sense of ``E[‖Vᵀ x‖²]``:

    V = S⁻¹ X (Xᵀ S⁻¹ X)⁻¹,        U = Xᵀ W

On the prompts the subcomponents do what the weight does, ``Xᵀ V U = Xᵀ W``, and Δ does the rest; training finds which of them are
needed. Rank-one edits of facts read in the same way (ROME, arXiv 2202.05262, equation 2). It is not part of the targeted paper,
whose runs of 30,000 steps start at random directions.

A site with more subcomponents than inputs has random ones besides, which write nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.components import Components
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.forward.site_taps import SitePass
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.targeted.data import TargetedData

RIDGE = 1e-2
"""Added to S, as a multiple of its mean diagonal."""
SAME = 1e-3
"""Inputs that differ by less than this, relative to their norm, are one."""
TOKENS_PER_INPUT = 4
"""Non-target tokens for S, per dimension of the widest input."""


@torch.no_grad()
def start_at_target(masked_model: MaskedModel, components: Components, data: TargetedData, world: World) -> None:
    """Sets V and U of every site from the target's prompts and the first non-target batches.

    Args:
        masked_model: entered, of the decomposition.
        components: of it.
        data: both streams.
        world: the processes, which start alike.

    Raises:
        ValueError: the target is not a few prompts, or a site has more different inputs on it than subcomponents.
    """
    if data.prompts is None:
        raise ValueError(
            "init='target' needs a target of a few prompts: give prompts, fewer than batch_size if they are rows of tokens."
        )
    S, X = second_moments(masked_model, components, data, world), dict[str, Tensor]()
    for prompt in data.prompts:
        for name, x in _inputs(masked_model, components, prompt[None]).items():
            X[name] = torch.cat([X[name], x]) if name in X else x
    solved: dict[str, tuple[Tensor, Tensor]] = {}
    for name, same in _sources(masked_model, components, data.prompts[0][None]).items():
        if same not in solved:
            inputs = different(X[same])
            solved[same] = readers(inputs, S[same]), inputs
        V, inputs = solved[same]
        n, C = len(inputs), components.V[name].shape[1]
        if n > C:
            raise ValueError(
                f"init='target': {name} has {n} different inputs on the target's prompts, and C={C} subcomponents: give it at "
                f"least {n}, or fewer tokens in the prompts, or leave init out."
            )
        U = inputs @ masked_model.adapter.weight(name).to(inputs)
        scale = (
            U.norm(dim=1) / V.norm(dim=0)
        ).sqrt()  # both sides of a subcomponent equally long, for one learning rate
        components.V[name][:, :n] = V * scale
        components.U[name].zero_()
        components.U[name][:n] = U / scale[:, None]


def readers(X: Float[Tensor, "n d_in"], S: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in n"]:
    """V for inputs X, in float64 inside.

    Args:
        X: different inputs.
        S: second moments of other inputs.
    """
    S = S.double()
    L = torch.linalg.cholesky(S + RIDGE * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype, device=S.device))
    white = torch.linalg.solve_triangular(L, X.double().T, upper=False)  # L⁻¹ Xᵀ, and so S⁻¹ Xᵀ = L⁻ᵀ white
    V = torch.linalg.solve_triangular(L.T, white @ torch.linalg.pinv(white.T @ white), upper=True)
    return V.to(X)


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
    masked_model: MaskedModel, components: Components, data: TargetedData, world: World
) -> dict[str, Tensor]:
    """S by the name of the first site that has the input, from the first non-target batches.

    Args:
        masked_model: entered.
        components: whose sites' inputs they are.
        data: both streams.
        world: the processes, which have other rows each.
    """
    widest = max(site.d_in for site in components.sites.values())
    sums, n, step = dict[str, Tensor](), 0, 0
    while n < TOKENS_PER_INPUT * widest:
        tokens, token_mask = data.nontarget.at(step)
        step += 1
        for name, x in _inputs(masked_model, components, tokens, token_mask).items():
            sums[name] = sums[name].add_(x.T @ x) if name in sums else x.T @ x
        n += tokens.shape[:2].numel() if token_mask is None else int(token_mask.sum())
    return {name: world.add(S) / (n * world.size) for name, S in sums.items()}


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
