"""Custom models: HookedRootModules around ``nn.Linear``s."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_vpd import Decomposition, VPDConfig
from tl_vpd.adapters.versions import HookedRootModule
from tl_vpd.training import new_decomposition

TRANSFORMER = dict(d_ci=8, n_blocks=1, n_heads=2)
MLPS = dict(kind="per_subcomponent_mlps", hidden=4)
SITE_MLPS = dict(kind="per_site_mlps", hidden=4)


class TwoLayers(HookedRootModule):
    """x -> fc -> ReLU -> hook_hidden -> head.out, for ``[batch, 4]`` and ``[batch, pos, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.hook_hidden = HookPoint()
        self.head = nn.Module()
        self.head.out = nn.Linear(6, 3, bias=False)
        self.setup()

    def forward(self, x: Tensor) -> Tensor:
        return self.head.out(self.hook_hidden(self.fc(x).relu()))


class Wrapped(HookedRootModule):
    """Layers and what is done with them."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run
        self.setup()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def seeded(make: Callable[[], HookedRootModule], seed: int = 0) -> HookedRootModule:
    """A model of float64 with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def two_layers() -> HookedRootModule:
    """``TwoLayers`` in float64."""
    return seeded(TwoLayers)


def untrained(model: HookedRootModule, C: int = 5, gamma: dict = TRANSFORMER, **config: object) -> Decomposition:
    """An untrained decomposition whose importances are spread over [0, 1]."""
    vpd = new_decomposition(model, VPDConfig(C=C, gamma=gamma, **config)).double()
    with torch.no_grad():
        for bias in vpd.gamma.output_biases():
            bias.add_(0.5)
    return vpd


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
