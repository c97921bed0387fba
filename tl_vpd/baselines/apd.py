"""Attribution-based parameter decomposition (APD; arXiv 2501.14926), the method before SPD: few full components an input.

    faithfulness   Σ_l ‖W_l − Σ_c P_c,l‖² / number of weights
    attribution    A_c(x) = √( mean_o (Σ_l ⟨∂f_o/∂W_l, P_c,l⟩)² )                  first-order, at the target's weights
    selection      the k·B largest A_c(x) of a batch of B inputs: s_c(x) = 1           batch top-k
    minimality     D(f(x; W), f(x; Σ_c s_c(x) P_c))
    simplicity     mean_x Σ_c s_c(x) Σ_l ‖P_c,l‖_p^p / number of weights             Schatten norm, p ≤ 1
    L = faithfulness + β minimality + α simplicity

With ``P = Σ_k A_:k ⊗ B_k:`` the Schatten norm is taken as ``Σ_k (‖A_:k‖² ‖B_k:‖²)^{p/2}``, an upper bound, reached where the
factors are the singular vectors. It shrinks what it selects: SPD reports lengths of about 0.9, and a failure on TMS+ID.

For models of vectors: positions must not see each other.

    >>> found = apd(model, toy.batches(32), APDConfig(C=20))         # doctest: +SKIP
    >>> found.pieces("embed").shape                                  # doctest: +SKIP
    torch.Size([20, 5, 2])
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm.auto import trange

from tl_vpd.adapters import adapt
from tl_vpd.baselines.components import FullComponents, on_components, output_gradients
from tl_vpd.losses import squared_error
from tl_vpd.training.data import Batches
from tl_vpd.training.schedules import cosine, warm_up
from tl_vpd.training.ties import check_ties


class APDConfig(BaseModel):
    """APD's settings; the defaults are for TMS 5→2.

    Its authors' there: ``top_k=0.211, p=1.0, simplicity=0.7, steps=20_000`` and a constant rate. With an exponent of 1, a
    component split in two costs what it cost in one piece; with ``top_k`` above what features need, second copies are selected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(6_000, ge=1)
    batch_size: int = Field(32, ge=1)
    """Rows of the data in a batch."""
    seed: int = 0
    C: int = Field(20, ge=1)
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of sites that are one matrix, the second turned round: a component has one matrix for both."""
    top_k: float = Field(0.25, gt=0)
    """Components selected an input, on average over the batch."""
    p: float = Field(0.9, gt=0)
    """Exponent of the Schatten norm."""
    faithfulness: float = Field(1.0, ge=0)
    minimality: float = Field(1.0, ge=0)
    simplicity: float = Field(0.4, ge=0)
    lr: float = Field(0.03, gt=0)
    warm_up: float = Field(0.05, ge=0, le=1)
    """Share of the run over which the rate rises from 0; then it falls to 0 on a cosine."""


def attributions(
    components: FullComponents,
    inputs: Mapping[str, Float[Tensor, "batch pos _"]],
    gradients: Mapping[str, Float[Tensor, "d batch pos _"]],
) -> Float[Tensor, "batch pos C"]:
    """``A_c(x)``, from every site's input and the gradients of each output dimension with respect to every site's output."""
    # ⟨∂f_o/∂W, P⟩ = Σ_ij x_i δ_oj P_ij: the piece's own output, along the gradient.
    terms = []
    for site in components.names:
        A, B = components.factors(site)
        own = torch.einsum("b p i, c i k, c k j -> b p c j", inputs[site], A, B)
        terms.append(torch.einsum("b p c j, d b p j -> d b p c", own, gradients[site]))
    return torch.stack(terms).sum(0).square().mean(0).sqrt()


def batch_top_k(values: Float[Tensor, "batch pos C"], k: float) -> Bool[Tensor, "batch pos C"]:
    """True at the ``k`` largest an input, on average over the batch."""
    count = max(1, min(round(k * values[..., 0].numel()), values.numel()))
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    chosen[values.flatten().topk(count).indices] = True
    return chosen.view(values.shape)


def schatten(components: FullComponents, p: float) -> Float[Tensor, " C"]:
    """``Σ_l Σ_k (‖A_:k‖² ‖B_k:‖²)^{p/2}`` of every component."""
    total = []
    for site in components.names:
        A, B = components.factors(site)
        # ε keeps the slope of the power finite at 0.
        total.append((A.square().sum(1) * B.square().sum(2) + 1e-16).pow(p / 2).sum(-1))
    return torch.stack(total).sum(0)


def simplicity(components: FullComponents, s: Float[Tensor, "batch pos C"], p: float) -> Float[Tensor, ""]:
    """Schatten norms of what an input selects, on average, divided by how many weights there are."""
    weights = sum(math.prod(components.shapes[site]) for site in components.names)
    return (s.mean((0, 1)) * schatten(components, p)).sum() / weights


def unfaithfulness(components: FullComponents, weights: Mapping[str, Float[Tensor, "_ _"]]) -> Float[Tensor, ""]:
    """Squared error of the components' sum, divided by how many weights there are."""
    errors = [(W - components.matrices(site).sum(0)).square().sum() for site, W in weights.items()]
    return torch.stack(errors).sum() / sum(W.numel() for W in weights.values())


class Selected:
    """What APD finds: full components, and which of them an input selects (attribution above a threshold)."""

    def __init__(self, components: FullComponents, model: nn.Module, threshold: float) -> None:
        self.components, self.model, self.threshold = components, model, threshold

    def pieces(self, site: str) -> Float[Tensor, "n d_in d_out"]:
        """Every component's matrix in a site."""
        return self.components.matrices(site).detach()

    def importances(self, inputs: Shaped[Tensor, "rows pos ..."]) -> dict[str, Float[Tensor, "rows pos _"]]:
        """1 where a component is selected, the same in every site."""
        _, seen, gradients = output_gradients(adapt(self.model), self.components.names, inputs)
        with torch.no_grad():
            selected = (attributions(self.components, seen, gradients) > self.threshold).float()
        return dict.fromkeys(self.components.names, selected)

    def output(
        self, inputs: Shaped[Tensor, "rows pos ..."], masks: Mapping[str, Float[Tensor, "#rows #pos _"]]
    ) -> Float[Tensor, "rows pos d"]:
        """The model's output on the masked sum of components."""
        adapter = adapt(self.model)
        with on_components(adapter, self.components, masks):
            return adapter.run(inputs, None)


def apd(model: nn.Module, data: Batches, config: APDConfig, *, progress: bool = False) -> Selected:
    """Decomposes every site of a model of vectors.

    Raises:
        KeyError, ValueError: a tied site does not exist, or is not the other's transpose.
        FloatingPointError: a loss is not finite.
    """
    adapter = adapt(model)
    weights = {name: adapter.weight(name) for name in adapter.sites}
    check_ties(config.tied, weights)
    shapes = {name: (W.shape[0], W.shape[1]) for name, W in weights.items()}
    components = FullComponents(shapes, config.C, tied=config.tied, seed=config.seed)
    optimizer = torch.optim.AdamW(components.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    threshold = 0.0
    for step in trange(config.steps, disable=not progress, desc="APD", unit="step"):
        rate = warm_up(step + 1, config.steps, config.warm_up) * cosine(step, config.steps, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate
        x = data.at(step)
        target, seen, gradients = output_gradients(adapter, components.names, x)
        with torch.no_grad():
            strength = attributions(components, seen, gradients)
            selected = batch_top_k(strength, config.top_k)
            threshold = (
                0.99 * threshold + 0.01 * float(strength[selected].min()) if step else float(strength[selected].min())
            )
        s = selected.float()
        with on_components(adapter, components, dict.fromkeys(components.names, s)):
            minimality = squared_error(target, adapter.run(x, None))
        loss = config.faithfulness * unfaithfulness(components, weights)
        loss = loss + config.minimality * minimality + config.simplicity * simplicity(components, s, config.p)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"Step {step}: the loss is not finite; lower the learning rate.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return Selected(components, model, threshold)
