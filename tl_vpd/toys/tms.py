"""Toy model of superposition (TMS): more sparse features than dimensions, and optionally an identity in between.

    x̂ = ReLU(Wᵀ I W x + b)        W: [hidden, features];  I is the identity, a separate layer or left out

W and Wᵀ are two sites, ``embed`` and ``unembed``, whose weights are each other's transposes. Truth: one subcomponent
per feature in each (a column of W), and in the identity as many as it has dimensions, all of them always on.
Source of the model: Elhage et al., *Toy Models of Superposition* (2022); of its truth: SPD (arXiv 2506.20790, section 3.1).

>>> model = TMS(n_features=5, n_hidden=2).build()
>>> model(torch.zeros(3, 5)).shape
torch.Size([3, 5])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.adapters.versions import HookedRootModule, HookPoint
from tl_vpd.checks import seed_of
from tl_vpd.evaluation.truth import SiteTruth, Truth
from tl_vpd.toys.features import SparseFeatures
from tl_vpd.toys.toy import TargetTraining, Toy
from tl_vpd.training.data import Batches

PROBE_VALUE = 0.75
"""The value of the feature that is on in the probe."""
TRAINING = TargetTraining(steps=10_000, rows=16, lr=5e-3)


class TMSModel(HookedRootModule):
    """``ReLU(unembed(identity(embed(x))))`` with HookPoints on the hidden vector, before and after the ReLU."""

    def __init__(self, n_features: int, n_hidden: int, *, identity: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(n_features, n_hidden, bias=False)
        self.identity = nn.Linear(n_hidden, n_hidden, bias=False) if identity else None
        self.unembed = nn.Linear(n_hidden, n_features)
        self.hook_hidden, self.hook_pre, self.hook_out = HookPoint(), HookPoint(), HookPoint()
        self.setup()

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """The reconstruction of x."""
        hidden = self.hook_hidden(self.embed(x))
        passed = hidden if self.identity is None else self.identity(hidden)
        return self.hook_out(self.hook_pre(self.unembed(passed)).relu())

    def tied(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """The same with W for both layers: what is trained, so that one W learns from both."""
        return F.linear(self.embed(x), self.embed.weight.T, self.unembed.bias).relu()


@dataclass(frozen=True)
class TMS(Toy):
    """The toy; ``identity`` puts a fixed identity matrix between the two layers."""

    n_features: int
    n_hidden: int
    identity: bool = False
    probability: float = 0.05
    vectors: int = 64
    """Vectors in a row of data."""
    training: TargetTraining = TRAINING
    output: ClassVar[Literal["kl", "mse"]] = "mse"

    def __post_init__(self) -> None:
        self.check(n_features=1, n_hidden=1, probability=(0, 1), vectors=1)

    def build(self, seed: int = 0) -> TMSModel:
        """W normal with Xavier's deviation, b at 0."""
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the global generator
            model = TMSModel(self.n_features, self.n_hidden, identity=self.identity)
        generator = torch.Generator().manual_seed(seed_of(seed))
        with torch.no_grad():
            nn.init.xavier_normal_(model.embed.weight, generator=generator)
            model.unembed.bias.zero_()
            model.unembed.weight.copy_(model.embed.weight.T)
            if model.identity is not None:
                model.identity.weight.copy_(torch.eye(self.n_hidden))
                model.identity.weight.requires_grad_(False)
        return model

    def batches(self, rows: int, seed: int = 0) -> Batches:
        """Sparse features, uniform in [0, 1] where they are on."""
        return SparseFeatures(self.n_features, self.probability, rows, self.vectors, seed=seed)

    def loss(self, model: TMSModel, batch: Float[Tensor, "batch pos features"]) -> Float[Tensor, ""]:
        """Squared error of the reconstruction."""
        return (model.tied(batch) - batch).square().mean()

    def finish(self, model: TMSModel) -> None:
        """Gives the second layer the first one's weight, transposed."""
        super().finish(model)
        model.unembed.weight.copy_(model.embed.weight.T)

    def quality(self, model: TMSModel) -> dict[str, float]:
        """The error, that of always answering 0, and the length of the shortest feature (near 0: it is not represented)."""
        x = self.batches(64, seed=-1).at(0)
        with torch.no_grad():
            error = (model(x) - x).square().mean()
        return {
            "error": float(error),
            "error_of_zero": float(x.square().mean()),
            "shortest_feature": float(model.embed.weight.norm(dim=0).min().detach()),
        }

    def truth(self, model: TMSModel) -> Truth:
        """One subcomponent per feature in both layers; the identity's rank, always on."""
        one_each = torch.eye(self.n_features, dtype=torch.bool)
        features = torch.eye(self.n_features)
        sites = {"embed": SiteTruth(self.n_features, one_each, "in", features)}
        if self.identity:
            always = torch.ones(self.n_features, self.n_hidden, dtype=torch.bool)
            sites["identity"] = SiteTruth(self.n_hidden, always, whole=True)
        sites["unembed"] = SiteTruth(self.n_features, one_each, "out", features)
        return Truth(probe=PROBE_VALUE * features[:, None], sites=sites)
