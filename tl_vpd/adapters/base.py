"""What the rest of the package needs of a model, for every class.

A *site*'s input x and output y are tensors that pass somewhere in the model's forward; an adapter knows where (``tap``), in
what shape (``layout``), and which parameter stands between them (``weight``, ``bias``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.adapters.calls import Calls
from tl_vpd.adapters.linearised import SeeNorm
from tl_vpd.adapters.logits import unembedding_of, without
from tl_vpd.adapters.prompts import Prompts
from tl_vpd.adapters.taps import Handle, Read, Unsupported, Write, tap_argument, tap_result
from tl_vpd.components import WHOLE, Layout
from tl_vpd.losses import Unembedding
from tl_vpd.site import Site


class Adapter(Prompts, Calls, ABC):
    """A model as sites, weights and taps. Raises Unsupported where a flag, or every layer, cannot be decomposed.

    Attributes:
        sites: what can be decomposed, in the order of the forward pass.
        refused: what cannot, with the reason.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sites: dict[str, Site] = {}
        self.refused: dict[str, str] = {}
        self._tapped: dict[str, nn.Module] = {}
        self.check()
        self.find_sites()
        self._refuse_shared()
        if not self.sites:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            raise Unsupported(
                f"This {type(model).__name__} has no weight that can be decomposed. {why or 'It has no layers.'}"
            )

    @abstractmethod
    def check(self) -> None:
        """Raises Unsupported if a flag of the model is on that cannot be decomposed; called at every attached pass."""

    @abstractmethod
    def find_sites(self) -> None:
        """Fills ``sites`` and ``refused``."""

    def _refuse_shared(self) -> None:
        """Refuses sites that are one module: it runs several times in a pass, and what masks one would mask all."""
        by_holder: dict[tuple[int, str], list[str]] = {}
        for name in self.sites:
            module, attribute = self.holder(name)
            by_holder.setdefault((id(module), attribute), []).append(name)
        for names in by_holder.values():
            for name in names if len(names) > 1 else ():
                other = next(n for n in names if n != name)
                self.refused[name] = f"one module with {other}: give each its copy (copy.deepcopy)"
                del self.sites[name]

    @abstractmethod
    def holder(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a site's weight, and the name it has there."""

    def add(self, site: Site) -> None:
        """Notes a site."""
        self.sites[site.name] = site

    @property
    def d_model(self) -> int:
        """Width of the residual stream (of the widest input, where there is none)."""
        return int(self.model.cfg.d_model)

    @property
    def n_ctx(self) -> int:
        """The longest prompt the model takes, in tokens."""
        return int(self.model.cfg.n_ctx)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return next(self.model.parameters()).dtype

    def modules(self) -> Iterator[nn.Module]:
        """Every module the model runs, each once."""
        return iter(self.model.modules())

    def processing(self) -> dict[str, bool]:
        """How the model's weights have been processed, as far as it shows: ``fold_ln``, ``center_writing_weights``."""
        return {}

    @property
    def processed(self) -> bool:
        """Whether a call since the model was made may have replaced its weights."""
        return False

    @abstractmethod
    def weight(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """The site's weight in the model, heads flattened (detached; a view where possible)."""

    @abstractmethod
    def set_weight(self, name: str, W: Float[Tensor, "d_in d_out"]) -> None:
        """Writes the site's weight into the model, in place; raises ValueError if the shape is another."""

    @abstractmethod
    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        """The bias added to the site's output before it is tapped (None: there is none)."""

    def blocks(self) -> list[nn.Module]:
        """The layers, whose activations may be computed again instead of stored; raises Unsupported without a stack of them."""
        blocks = getattr(self.model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise Unsupported(
                f"This {type(self.model).__name__} has no .blocks to compute activations of again: use checkpoint=False."
            )
        return list(blocks)

    def tap_stream(self, layer: int, read: Read) -> Handle:
        """Sends the residual stream that enters a block, after all hooks, to ``read``; raises Unsupported where there is none."""
        block: Any = self.blocks()[layer]
        for name in ("hook_resid_pre", "hook_in"):  # most blocks of TransformerBridge have the second
            if name in block._modules:
                return tap_result(block._modules[name], read)
        raise Unsupported(
            f"The blocks of this {type(self.model).__name__} have no hook on their residual stream, which this Γ reads: use "
            "GammaConfig(reads='sites')."
        )

    def fused_attention(self) -> AbstractContextManager[None]:
        """Inside, attention whose scores and pattern nobody hooks may be computed in one call; for runs without padding."""
        return nullcontext()

    def unembedding(self) -> Unembedding | None:
        """The product that makes the logits (None: there is none that stands alone)."""
        return unembedding_of(getattr(self.model, "unembed", None))

    def unembedding_left_out(self) -> AbstractContextManager[None]:
        """Inside, ``run`` gives what the unembedding reads; only where ``unembedding()`` is not None."""
        return without(self.model.unembed)

    def layout(self, name: str) -> Layout:
        """How the site's product is carried out under the model's present flags."""
        return WHOLE

    def check_shape(self, name: str, W: Tensor) -> None:
        """Raises ValueError unless ``W`` is ``[d_in, d_out]`` of the site."""
        site = self.sites[name]
        if W.shape != (site.d_in, site.d_out):
            raise ValueError(f"{name} is {site.d_in}x{site.d_out}, and the matrix is {tuple(W.shape)}.")

    def lengths_forgotten(self) -> AbstractContextManager[None]:
        """Inside, passes of other lengths leave nothing behind that would show in later scores."""
        return nullcontext()

    def scores_hook(self, layer: int) -> str:
        """The hook on a layer's scores, scaled, masked, before the softmax; raises Unsupported where they are not bilinear."""
        raise Unsupported(
            f"A {type(self.model).__name__} has no attention that this package knows: pass a transformer."
        )

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one."""
        return getattr(self.model.cfg, "attention_dir", "causal") == "causal"

    def unembed_bias(self) -> Float[Tensor, " vocab"] | None:
        """What is added to the logits at the end (None: nothing)."""
        bias = getattr(self.model.unembed, "b_U", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    def tap_residual(self, change: Write) -> list[Handle]:
        """Sends the residual stream that enters the first block, the embeddings, through ``change``."""
        return [tap_argument(self.blocks()[0], change)]

    def linearised(self, *, norms: bool, patterns: bool, see: SeeNorm) -> list[Handle]:
        """Makes norms' scales and attention patterns constants for gradients; ``see`` gets every norm's output and bias."""
        raise Unsupported(f"The norms and patterns of a {type(self.model).__name__} cannot be made constant.")

    def home(self, name: str) -> nn.Module:
        """The module that carries a site's HookPoints."""
        return self.model.get_submodule(self.sites[name].home)

    def hook_points_changed(self) -> None:
        """Lets TransformerLens find HookPoints that were added or removed."""
        self.model.setup()

    def tapped(self, path: str) -> Any:
        """The module at a path, noted as one that taps stand on."""
        module = self._tapped[path] = self.model.get_submodule(path)
        return module

    def moved(self) -> str | None:
        """The path of a module that is no longer the one that was tapped, if there is one."""
        return next((path for path, m in self._tapped.items() if self.model.get_submodule(path) is not m), None)

    @abstractmethod
    def tap(self, name: str, read: Read, write: Write) -> list[Handle]:
        """Sends a site's input to ``read`` and its output through ``write`` in every forward pass, in this order."""

    @abstractmethod
    def tap_inputs(
        self, see_tokens: Callable[[Tensor | None], None], see_attention_mask: Callable[[Tensor | None], None]
    ) -> list[Handle]:
        """Calls with the tokens and the attention mask of each forward pass as the layers get them (None: there is none)."""


def centred(W: Float[Tensor, "d_in d_model"]) -> bool:
    """Whether what a weight writes has mean 0 over the residual stream (``center_writing_weights``)."""
    W = W.float()
    return bool(W.mean(-1).abs().max() <= 1e-3 * W.abs().mean())
