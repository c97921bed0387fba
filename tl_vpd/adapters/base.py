"""What the rest of the package may ask of a model, whatever its class.

A *site*'s input x and output y are tensors that pass somewhere in the model's forward; an adapter knows where (``tap``), in
what shape (``layout``), and which parameter stands between them (``weight``, ``bias``).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.adapters.linearised import See
from tl_vpd.adapters.logits import left_out, unembedding_of
from tl_vpd.adapters.taps import Handle, Read, Unsupported, Write, tap_argument
from tl_vpd.adapters.versions import get_attention_mask
from tl_vpd.components import WHOLE, Layout
from tl_vpd.losses import Unembedding
from tl_vpd.site import Site

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class Adapter(ABC):
    """A model as sites, weights and taps.

    ``sites``: what can be decomposed, in the order of the forward pass. ``refused``: what cannot, with the reason.

    Raises:
        Unsupported: a flag of the model, or all of its layer types, cannot be decomposed.
    """

    return_types = True
    """Whether the model's ``forward`` takes ``return_type``."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sites: dict[str, Site] = {}
        self.refused: dict[str, str] = {}
        self._forward_parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self.check()
        self.find_sites()
        if not self.sites:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            raise Unsupported(
                f"This {type(model).__name__} has no weight that can be decomposed. {why or 'It has no layers.'}"
            )

    # -- what it consists of -----------------------------------------------------------------------------------------

    @abstractmethod
    def check(self) -> None:
        """Raises Unsupported if a flag of the model is on that cannot be decomposed; called at every attached pass."""

    @abstractmethod
    def find_sites(self) -> None:
        """Fills ``sites`` and ``refused``."""

    def add(self, site: Site) -> None:
        """Notes a site."""
        self.sites[site.name] = site

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the residual stream (of the widest input, where there is none)."""

    @property
    def n_ctx(self) -> int:
        """The longest prompt the model takes, in tokens."""
        return int(self.model.cfg.n_ctx)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

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
        """Whether a call since the model was made may have put other weights in the place of its own."""
        return False

    # -- weights -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def weight(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """The site's weight as it stands in the model, heads flattened (detached; a view where possible)."""

    @abstractmethod
    def set_weight(self, name: str, W: Float[Tensor, "d_in d_out"]) -> None:
        """Writes the site's weight into the model, in place; raises ValueError if the shape is another."""

    @abstractmethod
    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        """The bias added to the site's output before it is tapped (None: there is none)."""

    def blocks(self) -> list[nn.Module]:
        """The layers that run one after the other, whose activations may be computed again instead of kept.

        Raises:
            Unsupported: the model is not a stack of layers.
        """
        blocks = getattr(self.model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise Unsupported(
                f"This {type(self.model).__name__} has no .blocks to compute activations of again: use checkpoint=False."
            )
        return list(blocks)

    def fused_attention(self) -> AbstractContextManager[None]:
        """Inside, attention whose scores and pattern nobody hooks may be computed in one call; for runs without padding."""
        return nullcontext()

    def unembedding(self) -> Unembedding | None:
        """The product that makes the logits (None: there is none that stands alone)."""
        return unembedding_of(getattr(self.model, "unembed", None))

    def unembedding_left_out(self) -> AbstractContextManager[None]:
        """Inside, ``run`` gives what the unembedding reads; only where ``unembedding()`` is not None."""
        return left_out(self.model.unembed)

    def layout(self, name: str) -> Layout:
        """How the site's product is carried out under the model's present flags."""
        return WHOLE

    def check_shape(self, name: str, W: Tensor) -> None:
        """Raises ValueError unless ``W`` is ``[d_in, d_out]`` of the site."""
        site = self.sites[name]
        if W.shape != (site.d_in, site.d_out):
            raise ValueError(f"{name} is {site.d_in}x{site.d_out}; a {tuple(W.shape)} was given.")

    def lengths_forgotten(self) -> AbstractContextManager[None]:
        """Inside, passes of other lengths leave nothing behind that would show in later scores."""
        return nullcontext()

    def scores_hook(self, layer: int) -> str:
        """The hook that sees a layer's attention scores: scaled, masked, before the softmax; they must be bilinear in q and k.

        Raises:
            Unsupported: the model has no attention, or this layer's scores are no sum of products of queries and keys.
        """
        raise Unsupported(
            f"A {type(self.model).__name__} has no attention that this package knows: pass a transformer."
        )

    # -- what gradients pass -----------------------------------------------------------------------------------------

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

    def held_fixed(self, *, norms: bool, patterns: bool, see: See) -> list[Handle]:
        """Keeps gradients from passing norms' scales and attention patterns; ``see`` gets every norm's output and bias.

        Raises:
            Unsupported: this class of model does not show them.
        """
        raise Unsupported(f"The norms and patterns of a {type(self.model).__name__} cannot be held fixed.")

    # -- HookPoints --------------------------------------------------------------------------------------------------

    def home(self, name: str) -> nn.Module:
        """The module that carries a site's HookPoints."""
        return self.model.get_submodule(self.sites[name].home)

    def hook_points_changed(self) -> None:
        """Lets TransformerLens find HookPoints that were added or removed."""
        self.model.setup()

    # -- calls -------------------------------------------------------------------------------------------------------

    def given(self, arguments: Arguments, keywords: Keywords) -> dict[str, Any]:
        """The arguments of a forward call by name."""
        return {**dict(zip(self._forward_parameters, arguments, strict=False)), **keywords}

    def call(self, arguments: Arguments, keywords: Keywords, return_type: str | None) -> Any:
        """Runs the model's ``forward`` on the same arguments with another ``return_type``."""
        if not self.return_types:
            return self.model.forward(*arguments, **keywords)
        at = self._forward_parameters.index("return_type")
        if len(arguments) > at:
            arguments = (*arguments[:at], return_type, *arguments[at + 1 :])
            return self.model.forward(*arguments, **{k: v for k, v in keywords.items() if k != "return_type"})
        return self.model.forward(*arguments, **{**keywords, "return_type": return_type})

    def run(self, tokens: Tensor, token_mask: Bool[Tensor, "batch pos"] | None) -> Tensor:
        """Logits of the model on tokens; ``token_mask`` is False at padding."""
        return self.model(
            tokens, return_type="logits", attention_mask=None if token_mask is None else token_mask.long()
        )

    def truncation(self, arguments: Arguments, keywords: Keywords) -> str | None:
        """The argument that makes this call skip blocks, if any."""
        return None

    def completed(self, arguments: Arguments, keywords: Keywords) -> bool:
        """Whether the forward call that has just ended went through every block."""
        return self.truncation(arguments, keywords) is None

    def kv_cache(self, arguments: Arguments, keywords: Keywords) -> Any:
        """The KV cache handed to this call, if any."""
        return None

    # -- prompts -----------------------------------------------------------------------------------------------------

    def tokens(self, prompts: Any) -> Tensor:
        """Prompts (a string, strings or tokens) as tokens ``[batch, pos]`` on the model's device.

        Raises:
            TypeError: neither. ValueError: empty, too long, not integers, or a token outside the vocabulary.
        """
        cfg = self.model.cfg
        if isinstance(prompts, str) or (isinstance(prompts, list) and prompts and isinstance(prompts[0], str)):
            tokens = self.model.to_tokens(prompts, truncate=False)
        elif isinstance(prompts, Tensor):
            tokens = prompts
        else:
            raise TypeError(
                f"Prompts are a {type(prompts).__name__}; pass a string, a list of strings or a tensor of tokens."
            )
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        check_tokens(tokens, d_vocab=cfg.d_vocab, n_ctx=cfg.n_ctx)
        return savable(tokens).to(self.device)

    def token(self, text: str) -> int:
        """The number of the token that a text is.

        Raises:
            ValueError: the model has no tokenizer, or the text is several tokens.
        """
        if getattr(self.model, "tokenizer", None) is None:
            raise ValueError(f"This model has no tokenizer to read {text!r} with: give tokens as numbers.")
        found = self.model.to_tokens(text, prepend_bos=False)[0].tolist()
        if len(found) != 1:
            raise ValueError(f"{text!r} is {len(found)} tokens to this model; one is needed: mind the leading space.")
        return int(found[0])

    def words(self, tokens: Int[Tensor, " pos"]) -> list[str]:
        """Tokens as text (as their numbers, where there is no tokenizer)."""
        if getattr(self.model, "tokenizer", None) is None:
            return [str(token) for token in tokens.tolist()]
        return [self.model.tokenizer.decode([token]) for token in tokens.tolist()]

    def padding(
        self, tokens: Int[Tensor, "batch pos"] | None, attention_mask: Tensor | None
    ) -> Bool[Tensor, "batch pos"] | None:
        """True at real tokens, False at padding; None if nothing is padded.

        An attention mask says it (alone, where a pass starts from embeddings and there are no tokens); without one, leading
        or trailing pad tokens count as padding as TransformerLens counts them (a tokenizer is needed for that).
        """
        if attention_mask is None:
            tokenizer = self.model.tokenizer
            if tokens is None or tokenizer is None or tokenizer.pad_token_id is None or tokens.shape[1] == 0:
                return None
            edge = tokens[:, 0] if tokenizer.padding_side == "left" else tokens[:, -1]
            if not bool((edge == tokenizer.pad_token_id).any()):
                return None
            attention_mask = get_attention_mask(tokenizer, tokens, bool(self.model.cfg.default_prepend_bos))
        if tokens is not None:
            attention_mask = attention_mask[:, -tokens.shape[1] :]
        token_mask = savable(attention_mask).bool().to(self.device)
        return None if bool(token_mask.all()) else token_mask

    # -- taps --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def tap(self, name: str, read: Read, write: Write) -> list[Handle]:
        """Sends a site's input to ``read`` and its output through ``write`` in every forward pass, in this order."""

    @abstractmethod
    def tap_inputs(
        self, see_tokens: Callable[[Tensor | None], None], see_attention_mask: Callable[[Tensor | None], None]
    ) -> list[Handle]:
        """Calls with the tokens and the attention mask of each forward pass as the layers get them (None: there is none)."""


def savable(value: Any) -> Any:
    """Where inference mode is off, a copy of an inference tensor, which autograd may save; anything else as it is."""
    inference = isinstance(value, Tensor) and value.is_inference()
    return value.clone() if inference and not torch.is_inference_mode_enabled() else value


def check_tokens(tokens: Tensor, *, d_vocab: int, n_ctx: int) -> None:
    """Raises ValueError unless ``tokens`` is a non-empty ``[batch, pos]`` of integers the model knows."""
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"Tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; integers [batch, pos] are needed.")
    if tokens.numel() == 0:
        raise ValueError(f"There are no tokens: the shape is {tuple(tokens.shape)}.")
    if tokens.shape[1] > n_ctx:
        raise ValueError(
            f"Sequences of {tokens.shape[1]} tokens are longer than the model's context of {n_ctx}; cut them."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise ValueError(
            f"Tokens run from {low} to {high}, outside the vocabulary 0..{d_vocab - 1}: were they made by another tokenizer?"
        )


def centred(W: Float[Tensor, "d_in d_model"]) -> bool:
    """Whether what a weight writes has mean 0 over the residual stream (``center_writing_weights``)."""
    own = W.float()
    return bool(own.mean(-1).abs().max() <= 1e-3 * own.abs().mean())
