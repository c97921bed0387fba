"""What commands about a finished decomposition take: the decomposition, its model and rows of tokens, each by its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tl_vpd import bundled
from tl_vpd.decomposition import Decomposition
from tl_vpd.recipe.data import DataRecipe
from tl_vpd.recipe.model import ModelRecipe, usable_device


@dataclass(frozen=True)
class Named:
    """A decomposition (a folder, or ``bundled``), its target, and ``rows`` of tokens."""

    decomposition: str
    model: ModelRecipe
    data: DataRecipe
    rows: int
    trust_remote_code: bool = False

    def load(self, *, default_key: str = "validation") -> tuple[Decomposition, Any, Int[Tensor, "_ pos"]]:
        """All three; ``default_key`` counts where the data name no part."""
        vpd = self.decomposition_of(self.decomposition)
        model = self.model.load(trust_remote_code=self.trust_remote_code)
        return vpd, model, self.data.first(model, self.rows, default_key=default_key)

    def decomposition_of(self, name: str) -> Decomposition:
        """The decomposition in a folder, or the bundled one, on the model's device."""
        device = usable_device(self.model.device)
        return bundled.decomposition(device=device) if name == "bundled" else Decomposition.load(name, device=device)
