"""HookedTransformer: its sites, where their inputs and outputs pass, and what cannot be decomposed.

============  ========================================  ==========================================
site          input x                                   output y = x @ W + b
============  ========================================  ==========================================
W_Q, W_K, W_V keyword inputs of ``attn``                ``attn.hook_q`` / ``hook_k`` / ``hook_v``
W_O           ``attn.hook_z`` after all its hooks       output of ``attn`` (by head: ``hook_result``)
W_in          input of ``mlp``                          ``mlp.hook_pre`` (gated: ``hook_pre_linear``)
W_gate        input of ``mlp``                          ``mlp.hook_pre``
W_out         ``mlp.hook_post`` after all its hooks     output of ``mlp``
============  ========================================  ==========================================

A tap that changes a site's output runs before users' hooks, so that they see the decomposed value; a tap that reads its input
runs after them, so that it reads what they patched (see ``taps``). The flags that give Q, K and V an input for every
head (``use_split_qkv_input``, ``use_attn_in``) or W_O a result for every head (``use_attn_result``) change the layout, and may be
switched while a decomposition is attached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.adapters.base import Adapter, centred
from tl_vpd.adapters.calls import Arguments, Keywords
from tl_vpd.adapters.changes import Later, change
from tl_vpd.adapters.fused import fused_attention
from tl_vpd.adapters.linearised import SeeNorm, constant, norm_modules, pattern_points
from tl_vpd.adapters.scores import bilinear_scores
from tl_vpd.adapters.taps import (
    Handle,
    Read,
    ThreadTap,
    Unsupported,
    Write,
    tap_input,
    tap_keyword,
    tap_output,
    tap_point,
    tap_result,
)
from tl_vpd.components import WHOLE, Layout
from tl_vpd.site import Site


class HookedTransformerAdapter(Adapter):
    """A HookedTransformer as sites, weights and taps."""

    kv_cache_argument = "past_kv_cache"

    def check(self) -> None:
        cfg = self.model.cfg
        if getattr(cfg, "load_in_4bit", False):
            raise Unsupported(
                "cfg.load_in_4bit is on: quantised weights cannot be decomposed; load the model unquantised."
            )
        if cfg.n_devices > 1:
            raise Unsupported(f"cfg.n_devices is {cfg.n_devices}: load the model on one device.")

    def fused_attention(self) -> AbstractContextManager[None]:
        return fused_attention(block.attn for block in self.model.blocks)

    def linearised(self, *, norms: bool, patterns: bool, see: SeeNorm) -> list[Handle]:
        handles: list[Handle] = []
        for module in norm_modules(self.modules()) if norms else []:
            handles.append(module.hook_scale.register_forward_hook(ThreadTap(None, constant)))  # type: ignore[union-attr, operator]
            handles.append(module.register_forward_hook(ThreadTap(None, _show_norm, see)))
        for point in pattern_points(self.modules()) if patterns else []:
            handles.append(point.register_forward_hook(ThreadTap(None, constant)))
        return handles

    def find_sites(self) -> None:
        """W_Q, W_K, W_V, W_O and the MLP's weights of every block; mixtures of experts are refused."""
        cfg = self.model.cfg
        kv_heads = cfg.n_key_value_heads or cfg.n_heads
        for layer in range(cfg.n_layers):
            prefix = f"blocks.{layer}"
            for weight, heads in (("W_Q", cfg.n_heads), ("W_K", kv_heads), ("W_V", kv_heads)):
                self.add(Site(f"{prefix}.attn.{weight}", cfg.d_model, heads * cfg.d_head, heads, cfg.d_head))
            self.add(Site(f"{prefix}.attn.W_O", cfg.n_heads * cfg.d_head, cfg.d_model, cfg.n_heads, cfg.d_head))
            if cfg.attn_only:
                continue
            if getattr(cfg, "num_experts", None):
                self.refused[f"{prefix}.mlp"] = "a mixture of experts"
                continue
            if cfg.gated_mlp:
                self.add(Site(f"{prefix}.mlp.W_gate", cfg.d_model, cfg.d_mlp))
            self.add(Site(f"{prefix}.mlp.W_in", cfg.d_model, cfg.d_mlp))
            self.add(Site(f"{prefix}.mlp.W_out", cfg.d_mlp, cfg.d_model))

    def processing(self) -> dict[str, bool]:
        """``fold_ln`` as the config says, ``center_writing_weights`` and ``fold_value_biases`` as the weights show."""
        return {
            "fold_ln": str(self.model.cfg.normalization_type).endswith("Pre"),
            "center_writing_weights": centred(self.weight("blocks.0.attn.W_O")),
            "fold_value_biases": not any(bool(block.attn.b_V.any()) for block in self.model.blocks),
        }

    def holder(self, name: str) -> tuple[nn.Module, str]:
        owner, weight = name.rsplit(".", 1)
        module = self.model.get_submodule(owner)
        grouped = hasattr(module, "_" + weight)  # grouped query attention stores its K and V as _W_K, _W_V
        return module, "_" + weight if grouped else weight

    def weight(self, name: str) -> Float[Tensor, "d_in d_out"]:
        site = self.sites[name]
        module, attribute = self.holder(name)
        W = getattr(module, attribute).detach()
        if site.short in ("q", "k", "v"):
            W = W.transpose(0, 1)  # [head, d_model, d_head] -> [d_model, head, d_head]
        return W.reshape(site.d_in, site.d_out)

    @torch.no_grad()
    def set_weight(self, name: str, W: Float[Tensor, "d_in d_out"]) -> None:
        self.check_shape(name, W)
        site = self.sites[name]
        module, attribute = self.holder(name)
        parameter = getattr(module, attribute)
        if site.short in ("q", "k", "v"):
            W = W.unflatten(1, (-1, self.model.cfg.d_head)).transpose(0, 1)  # [d_model, head, d_head] -> [head, ...]
        parameter.copy_(W.reshape(parameter.shape))

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        site = self.sites[name]
        if site.short == "gate" or (site.short == "in" and self.model.cfg.gated_mlp):
            return None
        module, attribute = self.holder(name)
        b = getattr(module, attribute.replace("W_", "b_"))
        return b.reshape(-1)

    def layout(self, name: str) -> Layout:
        """By head under ``use_split_qkv_input`` and ``use_attn_in`` (Q, K, V) and ``use_attn_result`` (O)."""
        site, cfg = self.sites[name], self.model.cfg
        if site.n_heads is None:
            return WHOLE
        if site.short == "o":
            by_head = cfg.use_attn_result
            return Layout("result" if by_head else "whole", site.n_heads, x_has_heads=True, y_has_heads=by_head)
        split = cfg.use_split_qkv_input or cfg.use_attn_in
        repeats = cfg.n_heads // site.n_heads if cfg.ungroup_grouped_query_attention else 1
        return Layout("split" if split else "whole", site.n_heads, repeats, x_has_heads=split, y_has_heads=True)

    def lengths_forgotten(self) -> AbstractContextManager[None]:
        """Restores the ALiBi biases that layers store of the longest pass so far, whose length shifts scores by a constant."""
        return _lengths_forgotten([block.attn for block in self.model.blocks])

    def scores_hook(self, layer: int) -> str:
        """``blocks.{layer}.attn.hook_attn_scores``; raises Unsupported where scores are not bilinear in queries and keys."""
        cfg = self.model.cfg
        normed = getattr(self.model.blocks[layer].attn, "q_norm", None) is not None
        return bilinear_scores(
            layer,
            qk_norm=normed,
            softcap=getattr(cfg, "attn_scores_soft_cap", 0.0),
            clip=getattr(cfg, "clip_qkv", None),
        )

    def truncation(self, arguments: Arguments, keywords: Keywords) -> str | None:
        """The argument that makes a call skip blocks, if any (``generate`` starts at layer 0, from embeddings)."""
        named = self.by_name(arguments, keywords)
        if named.get("start_at_layer") not in (None, 0, -self.model.cfg.n_layers):
            return "start_at_layer"
        return "stop_at_layer" if named.get("stop_at_layer") is not None else None

    def kv_cache_length(self, cache: Any) -> int:
        return int(cache[0].past_keys.shape[1])

    def kv_cache_frozen(self, cache: Any) -> bool:
        return bool(cache.frozen)

    def tap_inputs(
        self, see_tokens: Callable[[Tensor | None], None], see_attention_mask: Callable[[Tensor | None], None]
    ) -> list[Handle]:
        """Tokens as they reach the embedding; the attention mask that the first block gets."""
        return [
            tap_input(self.model.embed, see_tokens),
            tap_keyword(self.model.blocks[0], "attention_mask", see_attention_mask),
        ]

    def tap(self, name: str, read: Read, write: Write) -> list[Handle]:
        site = self.sites[name]
        path = name.rsplit(".", 1)[0]
        module = self.tapped(path)
        match site.short:
            case "q" | "k" | "v":
                keyword = {"q": "query_input", "k": "key_input", "v": "value_input"}[site.short]
                return [tap_keyword(module, keyword, read), tap_point(self.tapped(f"{path}.hook_{site.short}"), write)]
            case "o":
                return [
                    tap_result(self.tapped(f"{path}.hook_z"), read),
                    tap_output(module, write, partial(self._attn_result, False)),
                    tap_point(self.tapped(f"{path}.hook_result"), write, partial(self._attn_result, True)),
                ]
            case "out":
                return [tap_result(self.tapped(f"{path}.hook_post"), read), tap_output(module, write)]
            case "in" if self.model.cfg.gated_mlp:
                output = self.tapped(f"{path}.hook_pre_linear")
            case _:
                output = self.tapped(f"{path}.hook_pre")
        return [tap_input(module, read), tap_point(output, write)]

    def _attn_result(self, on: bool) -> bool:
        return bool(self.model.cfg.use_attn_result) is on


def _show_norm(see: SeeNorm, module: nn.Module, arguments: Any, output: Tensor) -> None:
    see(output, getattr(module, "b", None))


@change
def _lengths_forgotten(undo: Later, layers: Sequence[nn.Module]) -> None:
    stored = [(attn.__dict__, attn.__dict__.get("alibi")) for attn in layers]
    undo(lambda: [attributes.update(alibi=alibi) for attributes, alibi in stored if "alibi" in attributes])
