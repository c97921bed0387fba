"""Any HookedRootModule with ``nn.Linear``s in it: toys and custom models.

A site bears the path of its ``nn.Linear`` (``encoder.linear1``); its HookPoints are on it
(``encoder.linear1.hook_component_acts``). Inputs are whatever the model takes: there are no tokens and no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.adapters.base import Adapter
from tl_vpd.adapters.linears import oriented, overwrite, why_not
from tl_vpd.adapters.prompts import savable
from tl_vpd.adapters.taps import Handle, Read, Unsupported, Write, tap_product
from tl_vpd.site import Site


class ModuleAdapter(Adapter):
    """A HookedRootModule's linear layers as sites, weights and taps."""

    return_types = False

    def check(self) -> None:
        """No flag of such a model is known to be in the way."""

    def find_sites(self) -> None:
        """Every ``nn.Linear`` whose ``forward`` is called."""
        for path, module in self.model.named_modules(remove_duplicate=False):
            if not isinstance(module, nn.Linear):
                continue
            parent = self.model.get_submodule(path.rpartition(".")[0])
            if isinstance(parent, nn.MultiheadAttention):
                self.refused[path] = "inside nn.MultiheadAttention, which computes past it"
            elif (reason := why_not(module)) is not None:
                self.refused[path] = reason
            else:
                self.add(Site(path, module.in_features, module.out_features))

    def holder(self, name: str) -> tuple[nn.Module, str]:
        return self.model.get_submodule(name), "weight"

    def _first(self) -> Tensor:
        """The first site's weight (the model's first parameter may be of another kind)."""
        return self.model.get_submodule(next(iter(self.sites))).weight

    @property
    def device(self) -> torch.device:
        """Where the decomposed weights are."""
        return self._first().device

    @property
    def dtype(self) -> torch.dtype:
        return self._first().dtype

    @property
    def d_model(self) -> int:
        """Width of the widest input."""
        return max(site.d_in for site in self.sites.values())

    def weight(self, name: str) -> Float[Tensor, "d_in d_out"]:
        return oriented(self.model.get_submodule(name))

    def set_weight(self, name: str, W: Float[Tensor, "d_in d_out"]) -> None:
        self.check_shape(name, W)
        overwrite(self.model.get_submodule(name), W)

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        return self.model.get_submodule(name).bias

    def run(self, tokens: Tensor, token_mask: Bool[Tensor, "batch pos"] | None) -> Tensor:
        """The model's output on an input; raises TypeError if it is not a tensor."""
        output = self.model(tokens)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"A {type(self.model).__name__} returns a {type(output).__name__}; one tensor is needed: wrap it in a "
                "HookedRootModule that returns one."
            )
        return output

    def tokens(self, prompts: Any) -> Tensor:
        """The model's input, on its device; raises TypeError if it is not a tensor, ValueError if it is empty."""
        if not isinstance(prompts, Tensor):
            raise TypeError(f"The input is a {type(prompts).__name__}; a {type(self.model).__name__} takes a tensor.")
        if prompts.numel() == 0:
            raise ValueError(f"There are no inputs: the shape is {tuple(prompts.shape)}.")
        return savable(prompts).to(self.device)

    def padding(self, tokens: Tensor, attention_mask: Any) -> None:
        """Nothing is padded; raises ValueError for an attention mask."""
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask does nothing for a {type(self.model).__name__}, which has no tokens: leave it out."
            )

    def padding_of_call(
        self, tokens: Tensor | None, attention_mask: Tensor | None, *, by_user: bool, cached: bool
    ) -> None:
        """Nothing is padded."""

    def tap_residual(self, change: Write) -> list[Handle]:
        """Raises Unsupported: which tensor holds such a model's embeddings is not known."""
        raise Unsupported(f"A {type(self.model).__name__} has no known embeddings: graphs are of transformers.")

    def tap_inputs(
        self, see_tokens: Callable[[Tensor | None], None], see_attention_mask: Callable[[Tensor | None], None]
    ) -> list[Handle]:
        """Such a model has neither."""
        return []

    def tap(self, name: str, read: Read, write: Write) -> list[Handle]:
        return [tap_product(self.tapped(name), read, write)]
