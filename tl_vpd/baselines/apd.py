"""Attribution-based parameter decomposition (APD; arXiv 2501.14926), the method before SPD: few full components per input.

    faithfulness   Σ_l ‖W_l − Σ_c P_c,l‖² / number of weights
    attribution    A_c(x) = √( mean_o (Σ_l ⟨∂f_o/∂W_l, P_c,l⟩)² )                  first-order, at the target's weights
    selection      the k·B largest A_c(x) of a batch of B inputs: s_c(x) = 1           batch top-k
    minimality     D(f(x; W), f(x; Σ_c s_c(x) P_c))
    simplicity     mean_x Σ_c s_c(x) Σ_l ‖P_c,l‖_p^p / number of weights             Schatten norm, p ≤ 1
    L = faithfulness + β minimality + α simplicity

With ``P = Σ_k A_:k ⊗ B_k:`` the Schatten norm is computed as ``Σ_k (‖A_:k‖² ‖B_k:‖²)^{p/2}``, an upper bound, reached where the
factors are the singular vectors. It shrinks selected components: SPD reports lengths of about 0.9, and a failure on TMS+ID.

For models of vectors: positions must not see each other.

    >>> result = apd(model, toy.batches(32), APDConfig(C=20))        # doctest: +SKIP
    >>> result.pieces("embed").shape                                 # doctest: +SKIP
    torch.Size([20, 5, 2])
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from pydantic import Field
from torch import Tensor, nn
from tqdm.auto import trange

from tl_vpd.adapters import adapt
from tl_vpd.baselines.apd_losses import attributions, batch_top_k, simplicity, unfaithfulness
from tl_vpd.baselines.components import FullComponents, on_components, output_gradients
from tl_vpd.checks import LARGEST_SEED, config_of, flag
from tl_vpd.frozen import Frozen
from tl_vpd.losses import squared_error
from tl_vpd.training.data import Batches
from tl_vpd.training.schedules import cosine, warm_up
from tl_vpd.training.ties import check_ties


class APDConfig(Frozen):
    """APD's settings; the defaults are for TMS 5→2.

    Its authors' settings there: ``top_k=0.211, p=1.0, simplicity=0.7, steps=20_000`` and a constant
    learning rate. With an exponent of 1, a
    component split in two costs as much as in one piece; with ``top_k`` above what features need, second copies are selected.
    """

    steps: int = Field(6_000, ge=1)
    batch_size: int = Field(32, ge=1)
    """Rows of the data in a batch."""
    seed: int = Field(0, ge=-(1 << 63), le=LARGEST_SEED)
    C: int = Field(20, ge=1)
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of sites that are one matrix, the second transposed: a component has one matrix for both."""
    top_k: float = Field(0.25, gt=0)
    """Components selected per input, on average over the batch."""
    p: float = Field(0.9, gt=0)
    """Exponent of the Schatten norm."""
    faithfulness: float = Field(1.0, ge=0)
    minimality: float = Field(1.0, ge=0)
    simplicity: float = Field(0.4, ge=0)
    lr: float = Field(0.03, gt=0)
    warm_up: float = Field(0.05, ge=0, le=1)
    """Fraction of the run over which the learning rate rises from 0; then it falls to 0 on a cosine."""


class APDResult:
    """APD's result: full components, and which of them an input selects (attribution above a threshold)."""

    def __init__(self, components: FullComponents, model: nn.Module, threshold: float) -> None:
        self.components, self.model, self.threshold = components, model, threshold

    def pieces(self, site: str) -> Float[Tensor, "n d_in d_out"]:
        """Every component's matrix in a site."""
        return self.components.matrices(site).detach()

    def importances(self, inputs: Shaped[Tensor, "rows pos ..."]) -> dict[str, Float[Tensor, "rows pos _"]]:
        """1 where a component is selected, the same in every site."""
        _, site_inputs, gradients = output_gradients(adapt(self.model), self.components.names, inputs)
        with torch.no_grad():
            selected = (attributions(self.components, site_inputs, gradients) > self.threshold).float()
        return dict.fromkeys(self.components.names, selected)

    def output(
        self, inputs: Shaped[Tensor, "rows pos ..."], masks: Mapping[str, Float[Tensor, "#rows #pos _"]]
    ) -> Float[Tensor, "rows pos d"]:
        """The model's output on the masked sum of components."""
        adapter = adapt(self.model)
        with on_components(adapter, self.components, masks):
            return adapter.run(inputs, None)


@torch.inference_mode(False)
@torch.enable_grad()
def apd(
    model: nn.Module,
    data: Batches,
    config: APDConfig,
    *,
    folder: Path | None = None,
    progress: bool = False,
    compile: bool = False,
) -> APDResult:
    """Decomposes every site of a model of vectors (``tl_vpd.baselines.methods`` documents the arguments; no states are stored).

    Raises:
        KeyError: a tied site does not exist.
        ValueError: a tied site is not the other's transpose, or ``compile`` is on.
        FloatingPointError: a loss is not finite.
        TypeError: the config is another one.
    """
    config, progress = config_of(APDConfig, config), flag("progress", progress)
    if not callable(getattr(data, "at", None)):
        raise TypeError(f"data is a {type(data).__name__}: give batches with at(step), such as those of tl_vpd.toys.")
    if flag("compile", compile):
        raise ValueError("APD's trainer has nothing to compile: leave compile out.")
    adapter = adapt(model)
    weights = {name: adapter.weight(name) for name in adapter.sites}
    check_ties(config.tied, weights)
    shapes = {name: (W.shape[0], W.shape[1]) for name, W in weights.items()}
    components = FullComponents(shapes, config.C, tied=config.tied, seed=config.seed)
    optimizer = torch.optim.AdamW(components.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    threshold: float | None = None
    for step in trange(config.steps, disable=not progress, desc="APD", unit="step"):
        rate = warm_up(step + 1, config.steps, config.warm_up) * cosine(step, config.steps, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate
        x = data.at(step)
        target, inputs, gradients = output_gradients(adapter, components.names, x)
        with torch.no_grad():
            strengths = attributions(components, inputs, gradients)
            selected = batch_top_k(strengths, config.top_k)
            smallest = float(strengths[selected].min())
            threshold = smallest if threshold is None else 0.99 * threshold + 0.01 * smallest
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
    assert threshold is not None
    return APDResult(components, model, threshold)
