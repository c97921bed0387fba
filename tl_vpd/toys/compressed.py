"""Compressed computation: a residual MLP that computes more features than it has neurons, in one layer or across several.

    h = x W_E,   h ← h + ReLU(h W_in,l) W_out,l   for each layer l,   ŷ = h W_Eᵀ        trained towards y = x + ReLU(x)

``W_E`` is fixed, random, with rows of length 1. Sites: ``layers.{l}.W_in``, ``layers.{l}.W_out``. Truth: in W_in one
subcomponent per feature (in every layer, where a feature's computation is spread over layers), and after the first layer one
more: all features write a common direction, which turns the next layer's neurons on as a bias would. In W_out there are as many
as neurons. Source: APD (arXiv 2501.14926, section 3.2) and SPD (arXiv 2506.20790, sections 3.2 and 3.3), which regards those of
W_out as one piece that is important as a whole, in no particular basis. This toy expects one per neuron: what a neuron that is
off would write can be ablated in any way without any change, so it is not important there, and no other basis costs as little.

>>> model = Compressed(n_features=10, d_resid=40, neurons=5).build()
>>> model(torch.zeros(3, 10)).shape
torch.Size([3, 10])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.adapters.versions import HookedRootModule, HookPoint
from tl_vpd.checks import seed_of
from tl_vpd.evaluation.truth import SiteTruth, Truth
from tl_vpd.toys.features import SparseFeatures
from tl_vpd.toys.tms import PROBE_VALUE
from tl_vpd.toys.toy import TargetTraining, Toy
from tl_vpd.training.data import Batches

LITTLE = 0.05
"""Fraction of what a layer writes below which a neuron may be left out: a convention, see docs/evidence.md."""
TRAINING = TargetTraining(steps=1_000, rows=32, lr=3e-3, schedule="cosine")


class ResidualMLP(nn.Module):
    """``ReLU(h W_in) W_out``, without biases."""

    def __init__(self, d_resid: int, neurons: int) -> None:
        super().__init__()
        self.W_in = nn.Linear(d_resid, neurons, bias=False)
        self.W_out = nn.Linear(neurons, d_resid, bias=False)
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, h: Float[Tensor, "*batch d_resid"]) -> Float[Tensor, "*batch d_resid"]:
        """What the layer adds to the residual stream."""
        return self.W_out(self.hook_post(self.hook_pre(self.W_in(h)).relu()))


class CompressedModel(HookedRootModule):
    """Embedding, residual MLPs, unembedding by the embedding's transpose."""

    W_E: Tensor

    def __init__(self, n_features: int, d_resid: int, neurons: int, n_layers: int) -> None:
        super().__init__()
        self.register_buffer("W_E", torch.zeros(n_features, d_resid))
        self.layers = nn.ModuleList(ResidualMLP(d_resid, neurons) for _ in range(n_layers))
        self.hook_embed, self.hook_resid_final = HookPoint(), HookPoint()
        self.setup()

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Towards ``x + ReLU(x)``."""
        h = self.hook_embed(x @ self.W_E)
        for layer in self.layers:
            h = h + layer(h)
        return self.hook_resid_final(h) @ self.W_E.T


@dataclass(frozen=True)
class Compressed(Toy):
    """The toy; ``neurons`` are those of each of ``n_layers`` layers."""

    n_features: int = 100
    d_resid: int = 1000
    neurons: int = 50
    n_layers: int = 1
    probability: float = 0.01
    vectors: int = 64
    """Vectors in a row of data."""
    training: TargetTraining = TRAINING
    output: ClassVar[Literal["kl", "mse"]] = "mse"

    def __post_init__(self) -> None:
        self.check(n_features=1, d_resid=1, neurons=1, n_layers=1, probability=(0, 1), vectors=1)

    def build(self, seed: int = 0) -> CompressedModel:
        """W_E normal with its rows scaled to length 1; the rest normal with Xavier's deviation."""
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the global generator
            model = CompressedModel(self.n_features, self.d_resid, self.neurons, self.n_layers)
        generator = torch.Generator().manual_seed(seed_of(seed))
        with torch.no_grad():
            embedding = torch.randn(self.n_features, self.d_resid, generator=generator)
            model.W_E.copy_(embedding / embedding.norm(dim=-1, keepdim=True))
            for weight in model.parameters():
                nn.init.xavier_normal_(weight, generator=generator)
        return model

    def batches(self, rows: int, seed: int = 0) -> Batches:
        """Sparse features, uniform in [-1, 1] where they are on."""
        return SparseFeatures(self.n_features, self.probability, rows, self.vectors, low=-1.0, seed=seed)

    def loss(self, model: CompressedModel, batch: Float[Tensor, "batch pos features"]) -> Float[Tensor, ""]:
        """Squared error."""
        return (model(batch) - batch - batch.relu()).square().mean()

    def quality(self, model: CompressedModel) -> dict[str, float]:
        """The error, and that of a model whose layers do nothing."""
        x = self.batches(64, seed=-1).at(0)
        with torch.no_grad():
            h = x @ model.W_E @ model.W_E.T
            return {
                "error": float(self.loss(model, x)),
                "error_without_layers": float((h - x - x.relu()).square().mean()),
            }

    def truth(self, model: CompressedModel) -> Truth:
        """In every W_in a subcomponent per feature, and after the first layer one for the features' common direction; in every
        W_out one per neuron, needed where the neuron is on.
        """
        probe = PROBE_VALUE * torch.eye(self.n_features)[:, None]
        with torch.no_grad():
            _, cache = model.run_with_cache(probe)
        layers = range(self.n_layers)
        W_in, W_out = ([adapt(model).weight(f"layers.{i}.{name}") for i in layers] for name in ("W_in", "W_out"))
        neurons = [cache[f"layers.{i}.hook_post"].flatten(0, 1) for i in layers]
        written = [on @ W for on, W in zip(neurons, W_out, strict=True)]
        sites = {}
        for i in layers:
            common = [torch.stack(written[:i]).sum(0).mean(0, keepdim=True)] if i else []
            # Only the unembedding and later layers read the stream.
            visible = torch.cat([model.W_E.T, *W_in[i + 1 :]], dim=1)
            sites[f"layers.{i}.W_in"] = _one_per_feature(torch.cat([model.W_E, *common]), self.n_features)
            sites[f"layers.{i}.W_out"] = _one_per_neuron(neurons[i], W_out[i], visible)
        return Truth(probe=probe, sites=sites)


def _one_per_feature(directions: Float[Tensor, "count d_resid"], n_features: int) -> SiteTruth:
    """A subcomponent for each direction; those after the features' are needed by any feature that uses them."""
    pattern, either = torch.zeros(2, n_features, len(directions), dtype=torch.bool)
    pattern.fill_diagonal_(True)
    pattern[:, n_features:] = either[:, n_features:] = True
    return SiteTruth(len(directions), pattern, "in", directions, either=either)


def _one_per_neuron(
    on: Float[Tensor, "feature neuron"], W_out: Float[Tensor, "neuron d_resid"], visible: Float[Tensor, "d_resid k"]
) -> SiteTruth:
    """A subcomponent for each neuron, needed by the features that turn it on; where it writes little, needed or not."""
    size = on.square() * (W_out @ visible).square().sum(1)
    fraction = size / size.sum(1, keepdim=True).clamp(min=1e-30)
    little = (fraction > 0) & (fraction < LITTLE)
    return SiteTruth(len(W_out), fraction > 0, "in", torch.eye(len(W_out)), visible=visible, either=little, whole=True)
