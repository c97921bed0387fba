"""HookedTransformer: its sites, where their inputs and outputs pass, and what cannot be decomposed.

============  ========================================  ==========================================
site          input x                                   output y = x @ W + b
============  ========================================  ==========================================
W_Q, W_K, W_V keyword inputs of ``attn``                ``attn.hook_q`` / ``hook_k`` / ``hook_v``
W_O           ``attn.hook_z`` after all its hooks       output of ``attn``
W_in          input of ``mlp``                          ``mlp.hook_pre`` (gated: ``hook_pre_linear``)
W_gate        input of ``mlp``                          ``mlp.hook_pre``
W_out         ``mlp.hook_post`` after all its hooks     output of ``mlp``
============  ========================================  ==========================================

Where a site's output is changed, the tap stands before users' hooks, so that they see the decomposed value; where its input
is read, after them, so that what they patched is read (``taps`` says how).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer

from tl_vpd.adapters.taps import (
    Handle,
    Read,
    Unsupported,
    Write,
    first_argument,
    keyword_argument,
    qkv_input,
    tap_output,
    tap_result,
)
from tl_vpd.sites import Site


class HookedTransformerAdapter:
    """A HookedTransformer as sites (``sites``), weights and taps.

    Raises:
        Unsupported: a flag or layer type of the model cannot be decomposed.
    """

    def __init__(self, model: HookedTransformer) -> None:
        self.model = model
        self.check()
        self.sites: dict[str, Site] = {}
        for layer in range(model.cfg.n_layers):
            self._add_sites(layer)

    def check(self) -> None:
        """Raises Unsupported if a flag of the model is on that cannot be decomposed."""
        cfg = self.model.cfg
        for flag in ("use_attn_result", "use_split_qkv_input", "use_attn_in", "ungroup_grouped_query_attention"):
            if getattr(cfg, flag, False):
                raise Unsupported(f"cfg.{flag} is on, which is not supported: call model.set_{flag}(False) first.")
        if getattr(cfg, "load_in_4bit", False):
            raise Unsupported(
                "cfg.load_in_4bit is on: quantised weights cannot be decomposed; load the model unquantised."
            )
        if cfg.n_devices > 1:
            raise Unsupported(f"cfg.n_devices is {cfg.n_devices}: load the model on one device.")
        if getattr(cfg, "num_experts", None):
            raise Unsupported(
                "This model's MLPs are mixtures of experts, which cannot be decomposed; use a dense model."
            )

    def _add_sites(self, layer: int) -> None:
        cfg, prefix = self.model.cfg, f"blocks.{layer}"
        kv_heads = cfg.n_key_value_heads or cfg.n_heads
        for weight, heads in (("W_Q", cfg.n_heads), ("W_K", kv_heads), ("W_V", kv_heads)):
            self._add(Site(f"{prefix}.attn.{weight}", cfg.d_model, heads * cfg.d_head, heads, cfg.d_head))
        self._add(Site(f"{prefix}.attn.W_O", cfg.n_heads * cfg.d_head, cfg.d_model, cfg.n_heads, cfg.d_head))
        if cfg.attn_only:
            return
        assert cfg.d_mlp is not None
        if cfg.gated_mlp:
            self._add(Site(f"{prefix}.mlp.W_gate", cfg.d_model, cfg.d_mlp))
        self._add(Site(f"{prefix}.mlp.W_in", cfg.d_model, cfg.d_mlp))
        self._add(Site(f"{prefix}.mlp.W_out", cfg.d_mlp, cfg.d_model))

    def _add(self, site: Site) -> None:
        self.sites[site.name] = site

    # -- weights -------------------------------------------------------------------------------------------------

    def _parameter(self, site: Site) -> tuple[nn.Module, str]:
        owner, weight = site.name.rsplit(".", 1)
        module = self.model.get_submodule(owner)
        grouped = hasattr(module, "_" + weight)  # grouped query attention keeps its own K and V under _W_K, _W_V
        return module, "_" + weight if grouped else weight

    def weight(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """The site's weight as it stands in the model, heads flattened (detached; a view where possible)."""
        site = self.sites[name]
        module, attribute = self._parameter(site)
        W = getattr(module, attribute).detach()
        if site.short in ("q", "k", "v"):
            W = W.transpose(0, 1)  # [head, d_model, d_head] -> [d_model, head, d_head]
        return W.reshape(site.d_in, site.d_out)

    @torch.no_grad()
    def set_weight(self, name: str, W: Float[Tensor, "d_in d_out"]) -> None:
        """Writes the site's weight into the model, in place; raises ValueError if the shape is another."""
        site = self.sites[name]
        if W.shape != (site.d_in, site.d_out):
            raise ValueError(f"{name} is {site.d_in}x{site.d_out}; a {tuple(W.shape)} was given.")
        module, attribute = self._parameter(site)
        parameter = getattr(module, attribute)
        if site.short in ("q", "k", "v"):
            W = W.unflatten(1, (-1, self.model.cfg.d_head)).transpose(0, 1)  # [d_model, head, d_head] -> [head, ...]
        parameter.copy_(W.reshape(parameter.shape))

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        """The bias added to the site's output before it is tapped (None: there is none)."""
        site = self.sites[name]
        if site.short == "gate" or (site.short == "in" and self.model.cfg.gated_mlp):
            return None
        module, attribute = self._parameter(site)
        b = getattr(module, attribute.replace("W_", "b_"))
        return b.reshape(-1)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.model.cfg.d_model

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return next(self.model.parameters()).dtype

    def block(self, name: str) -> nn.Module:
        """The block on which a site's HookPoints are put."""
        return self.model.blocks[self.sites[name].layer]

    def hook_points_changed(self) -> None:
        """Lets TransformerLens find HookPoints that were added or removed."""
        self.model.setup()

    # -- inputs --------------------------------------------------------------------------------------------------

    def tokens(self, prompts: Any, attention_mask: Tensor | None = None) -> Int[Tensor, "batch pos"]:
        """Prompts (a string, strings or tokens) as tokens on the model's device.

        Raises:
            TypeError: neither. ValueError: empty, too long, not integers, or a token outside the vocabulary.
        """
        cfg = self.model.cfg
        if isinstance(prompts, str) or (isinstance(prompts, list) and prompts and isinstance(prompts[0], str)):
            tokens = self.model.to_tokens(prompts)
        elif isinstance(prompts, Tensor):
            tokens = prompts
        else:
            raise TypeError(
                f"Prompts are a {type(prompts).__name__}; pass a string, a list of strings or a tensor of tokens."
            )
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        check_tokens(tokens, d_vocab=cfg.d_vocab, n_ctx=cfg.n_ctx)
        return tokens.to(self.device)

    def call(self, arguments: tuple[Any, ...], keywords: dict[str, Any], return_type: str | None) -> Any:
        """Runs the model's ``forward`` on the same arguments with another ``return_type``."""
        if len(arguments) > 1:
            arguments = (arguments[0], return_type, *arguments[2:])
            return self.model.forward(*arguments, **{k: v for k, v in keywords.items() if k != "return_type"})
        return self.model.forward(*arguments, **{**keywords, "return_type": return_type})

    def truncation(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str | None:
        """The argument that makes this call skip blocks, if any (``generate`` starts at layer 0, from embeddings)."""
        given = {**dict(zip(_FORWARD, arguments, strict=False)), **keywords}
        if given.get("start_at_layer") not in (None, 0, -self.model.cfg.n_layers):
            return "start_at_layer"
        return "stop_at_layer" if given.get("stop_at_layer") is not None else None

    @staticmethod
    def kv_cache(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The KV cache handed to this call, if any."""
        return {**dict(zip(_FORWARD, arguments, strict=False)), **keywords}.get("past_kv_cache")

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
            from transformer_lens.utils import get_attention_mask

            attention_mask = get_attention_mask(tokenizer, tokens, bool(self.model.cfg.default_prepend_bos))
        if tokens is not None:
            attention_mask = attention_mask[:, -tokens.shape[1] :]
        keep = attention_mask.bool().to(self.device)
        return None if bool(keep.all()) else keep

    # -- taps ----------------------------------------------------------------------------------------------------

    def tap_tokens(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Calls ``see`` with the tokens of each forward pass as they reach the embedding."""
        return self.model.embed.register_forward_pre_hook(partial(first_argument, see))

    def tap_attention_mask(self, see: Callable[[Tensor | None], None]) -> RemovableHandle:
        """Calls ``see`` with the attention mask the first block was given."""
        return self.model.blocks[0].register_forward_pre_hook(
            partial(keyword_argument, "attention_mask", see), with_kwargs=True
        )

    def tap(self, name: str, read: Read, write: Write) -> list[Handle]:
        """Sends a site's input to ``read`` and its output through ``write`` in every forward pass."""
        site = self.sites[name]
        module: Any = self.model.get_submodule(name.rsplit(".", 1)[0])
        match site.short:
            case "q" | "k" | "v":
                keyword = {"q": "query_input", "k": "key_input", "v": "value_input"}[site.short]
                seen = module.register_forward_pre_hook(partial(qkv_input, keyword, read), with_kwargs=True)
                return [seen, tap_output(getattr(module, f"hook_{site.short}"), write, heads=True)]
            case "o":
                return [tap_result(module.hook_z, read), tap_output(module, write)]
            case "out":
                return [tap_result(module.hook_post, read), tap_output(module, write)]
            case "in" if self.model.cfg.gated_mlp:
                output = module.hook_pre_linear
            case _:
                output = module.hook_pre
        return [module.register_forward_pre_hook(partial(first_argument, read)), tap_output(output, write)]


_FORWARD = (
    "input",
    "return_type",
    "loss_per_token",
    "prepend_bos",
    "padding_side",
    "start_at_layer",
    "tokens",
    "shortformer_pos_embed",
    "attention_mask",
    "stop_at_layer",
    "past_kv_cache",
)
"""The parameters of ``HookedTransformer.forward`` in order."""


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
