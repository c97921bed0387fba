"""TransformerBridge: its sites, where their inputs and outputs pass, and what cannot be decomposed.

Every site is a ``LinearBridge`` (``blocks.{i}.attn.q``, ``blocks.{i}.mlp.in``, ...) around the module that holds the weight,
``original_component``: one hook there sees x and y = x @ W + b, after users' hooks on the way in and before those on the way out.
Three ways of the bridge bypass these modules, and are tapped elsewhere:

===================================================  ===========================================  =======================
way                                                  input x                                      output y
===================================================  ===========================================  =======================
``use_split_qkv_input``, ``use_attn_in`` (q, k, v)   argument of ``attn._project_per_head_qkv``   ``hook_out`` of q, k, v
``use_attn_result`` (o)                              ``o.hook_in`` after all its hooks            ``attn.hook_result``
gated MLP with processed weights                     ``mlp.hook_in`` / ``out.hook_in``            ``hook_out`` of each
===================================================  ===========================================  =======================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.adapters.base import Adapter, centred
from tl_vpd.adapters.bridge_taps import (
    BatchedRows,
    HeadInputs,
    flag_is_on,
    norm_at_fixed_scale,
    product_of,
    projects_per_head,
    splits_inputs,
    uses_processed_weights,
)
from tl_vpd.adapters.calls import Arguments, Keywords
from tl_vpd.adapters.linearised import SeeNorm, constant, norm_modules, pattern_points
from tl_vpd.adapters.linears import oriented, overwrite, why_not
from tl_vpd.adapters.scores import bilinear_scores
from tl_vpd.adapters.taps import (
    Handle,
    Read,
    Reader,
    Tap,
    ThreadTap,
    Unsupported,
    Write,
    tap_output,
    tap_product,
    tap_result,
)
from tl_vpd.adapters.versions import transformer_lens_version
from tl_vpd.components import WHOLE, Layout
from tl_vpd.site import SHORT, Site

WEIGHTS = {short: weight for weight, short in SHORT.items()}
"""The short name of a site -> TransformerLens's name of the weight."""


class BridgeAdapter(Adapter):
    """A TransformerBridge as sites, weights and taps."""

    kv_cache_argument = "past_key_values"

    def __init__(self, model: Any) -> None:
        self.batch: int | None = None
        self._completed = True
        super().__init__(model)

    def check(self) -> None:
        if not hasattr(self.model, "blocks"):
            raise Unsupported("This bridge has no `blocks`: decoder-only transformers can be decomposed.")
        for block in self.model.blocks:
            attn, mlp = block._modules.get("attn"), block._modules.get("mlp")
            if attn is not None and splits_inputs(attn) and not projects_per_head(attn):
                flag = "use_split_qkv_input" if flag_is_on(attn, "use_split_qkv_input") else "use_attn_in"
                raise Unsupported(
                    f"cfg.{flag} is on, which cannot be decomposed with a {type(attn).__name__}: call "
                    f"model.set_{flag}(False) first."
                )
            if mlp is not None and uses_processed_weights(mlp) and transformer_lens_version() < (3, 7, 3):
                raise Unsupported(
                    "This TransformerLens computes gated MLPs with processed weights past every hook: update it to 3.7.3 or "
                    "later, or load the model without enable_compatibility_mode()."
                )

    def find_sites(self) -> None:
        """The products inside every block's ``attn`` and ``mlp``; what is not a plain product is refused."""
        if len({p.device for p in self.model.parameters()}) > 1:
            raise Unsupported("This model lies on several devices: load it on one.")
        for layer, block in enumerate(self.model.blocks):
            self._add_attention(f"blocks.{layer}.attn", block._modules.get("attn"))
            self._add_mlp(f"blocks.{layer}.mlp", block._modules.get("mlp"))

    def _add_attention(self, path: str, attn: nn.Module | None) -> None:
        if attn is None:
            self.refused[path] = "this block has no attention"
            return
        d_head = self.model.cfg.d_head
        for short in ("q", "k", "v", "o"):
            name, product = f"{path}.{WEIGHTS[short]}", product_of(attn, short)
            reason = why_not(product)
            if reason is None:
                d_in, d_out = oriented(product).shape  # type: ignore[arg-type]
                heads, remainder = divmod(d_in if short == "o" else d_out, d_head)
                if not remainder:
                    self.add(Site(name, d_in, d_out, heads, d_head))
                    continue
                reason = f"its {d_in if short == 'o' else d_out} channels do not divide into heads of {d_head}"
            self.refused[name] = f"{reason} ({type(attn).__name__})"

    def _add_mlp(self, path: str, mlp: nn.Module | None) -> None:
        if mlp is None:
            return  # attention only
        gated = product_of(mlp, "gate") is not None
        for short in ("gate", "in", "out") if gated else ("in", "out"):
            name, product = f"{path}.{WEIGHTS[short]}", product_of(mlp, short)
            if (reason := why_not(product)) is not None:
                self.refused[name] = f"{reason} ({type(mlp).__name__})"
                continue
            self.add(Site(name, *oriented(product).shape))  # type: ignore[arg-type]

    def modules(self) -> Iterator[nn.Module]:
        """Every module the model runs, each once: the bridge's and the wrapped model's."""
        modules = {id(m): m for m in self.model.modules()}
        modules.update((id(m), m) for m in self.model.original_model.modules())
        return iter(modules.values())

    def processing(self) -> dict[str, bool]:
        """``fold_ln`` and ``center_writing_weights`` as the weights show them."""
        flags: dict[str, bool] = {}
        ln = getattr(self.model.blocks[0]._modules.get("ln1"), "original_component", None)
        if isinstance(getattr(ln, "weight", None), Tensor):
            # Gemma's norms multiply by 1 + w.
            neutral = 0 if getattr(self.model.cfg, "rmsnorm_uses_offset", False) else 1
            flags["fold_ln"] = bool((ln.weight == neutral).all())  # type: ignore[union-attr]
        if "blocks.0.attn.W_O" in self.sites:
            flags["center_writing_weights"] = centred(self.weight("blocks.0.attn.W_O"))
        return flags

    @property
    def processed(self) -> bool:
        """Whether ``enable_compatibility_mode`` has been called."""
        return bool(getattr(self.model, "compatibility_mode", False))

    def _modules_of(self, name: str) -> tuple[nn.Module, str, nn.Module]:
        """A site's ``attn`` or ``mlp``, its short name, and the module of its weight."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        short = self.sites[name].short
        product = product_of(owner, short)
        assert product is not None
        return owner, short, product

    def holder(self, name: str) -> tuple[nn.Module, str]:
        return self._modules_of(name)[2], "weight"

    def _processed(self, name: str, what: str) -> Tensor | None:
        """The processed weight or bias that 3.x's gated MLPs compute with, beside the one of the module."""
        owner, short, _ = self._modules_of(name)
        return getattr(owner, f"_processed_{what}_{short}", None) if uses_processed_weights(owner) else None

    def weight(self, name: str) -> Float[Tensor, "d_in d_out"]:
        processed = self._processed(name, "W")
        return oriented(self._modules_of(name)[2]) if processed is None else processed.detach().T

    @torch.no_grad()
    def set_weight(self, name: str, W: Float[Tensor, "d_in d_out"]) -> None:
        self.check_shape(name, W)
        overwrite(self._modules_of(name)[2], W)
        processed = self._processed(name, "W")
        if processed is not None:
            processed.copy_(W.T)

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        owner, _, product = self._modules_of(name)
        bias = self._processed(name, "b") if hasattr(owner, "_processed_W_in") else getattr(product, "bias", None)
        return None if bias is None else bias.reshape(-1)

    def layout(self, name: str) -> Layout:
        """By head under ``use_split_qkv_input`` and ``use_attn_in`` (Q, K, V) and ``use_attn_result`` (O)."""
        site = self.sites[name]
        if site.n_heads is None:
            return WHOLE
        attn, short, _ = self._modules_of(name)
        if short == "o":
            return Layout("result", site.n_heads, y_has_heads=True) if flag_is_on(attn, "use_attn_result") else WHOLE
        return Layout("split", site.n_heads, x_has_heads=True) if splits_inputs(attn) else WHOLE

    def scores_hook(self, layer: int) -> str:
        """``blocks.{layer}.attn.hook_attn_scores``; raises Unsupported where scores are not bilinear in queries and keys."""
        attn = self.model.blocks[layer].attn
        wrapped = getattr(attn, "original_component", None)
        normed = any(getattr(wrapped, n, None) is not None for n in ("q_norm", "q_layernorm"))
        return bilinear_scores(
            layer,
            qk_norm=normed,
            softcap=getattr(wrapped, "attn_logit_softcapping", None),
            clip=getattr(getattr(wrapped, "config", None), "clip_qkv", None),
        )

    def linearised(self, *, norms: bool, patterns: bool, see: SeeNorm) -> list[Handle]:
        handles: list[Handle] = []
        for module in norm_modules(self.modules()) if norms else []:
            tap = ThreadTap(None, norm_at_fixed_scale, see)
            handles.append(module.register_forward_hook(tap, prepend=True, with_kwargs=True))
        for point in pattern_points(self.modules()) if patterns else []:
            handles.append(point.register_forward_hook(ThreadTap(None, constant)))
        return handles

    def hook_points_changed(self) -> None:
        self.model.clear_hook_registry()
        self.model._initialize_hook_registry()

    def truncation(self, arguments: Arguments, keywords: Keywords) -> str | None:
        """``stop_at_layer``, if the call has it (``run_with_cache`` stops by a hook: see ``completed``)."""
        return "stop_at_layer" if self.by_name(arguments, keywords).get("stop_at_layer") is not None else None

    def completed(self, arguments: Arguments, keywords: Keywords) -> bool:
        return self._completed

    def run(self, tokens: Tensor, token_mask: Bool[Tensor, "batch pos"] | None) -> Tensor:
        self.batch = len(tokens)  # taps may be on without ``tap_inputs``
        return super().run(tokens, token_mask)

    def makes_kv_cache(self, arguments: Arguments, keywords: Keywords) -> bool:
        """Whether a call without a KV cache makes one, as the first of ``generate`` does."""
        return bool(keywords.get("use_cache") or keywords.get("use_past_kv_cache"))

    def made_kv_cache(self, output: Any) -> Any:
        """The KV cache that the last call has made: ``generate`` finds it on the bridge, other callers get it with the logits."""
        pair = isinstance(output, tuple) and len(output) == 2
        return output[1] if pair else getattr(self.model, "_last_hf_cache", None)

    def empty_kv_cache(self, like: Any) -> Any:
        """A KV cache without tokens."""
        if like is not None:
            return super().empty_kv_cache(like)
        from transformers import DynamicCache

        return DynamicCache(config=self.model.original_model.config)

    def kv_cache_length(self, cache: Any) -> int:
        return int(cache.get_seq_length())

    def tap_inputs(
        self, see_tokens: Callable[[Tensor | None], None], see_attention_mask: Callable[[Tensor | None], None]
    ) -> list[Handle]:
        source = self.model.original_model
        begin = Tap(self._begin, see_tokens, see_attention_mask)
        return [source.register_forward_pre_hook(begin, with_kwargs=True), source.register_forward_hook(Tap(self._end))]

    def _begin(
        self,
        see_tokens: Callable[[Tensor | None], None],
        see_attention_mask: Callable[[Tensor | None], None],
        module: nn.Module,
        arguments: Arguments,
        keywords: Keywords,
    ) -> None:
        tokens = arguments[0] if arguments else keywords.get("input_ids")
        shaped = keywords.get("inputs_embeds") if tokens is None else tokens
        mask = keywords.get("attention_mask")
        self.batch, self._completed = (None if shaped is None else len(shaped)), False
        see_tokens(tokens)
        see_attention_mask(mask if isinstance(mask, Tensor) else None)

    def _end(self, module: nn.Module, arguments: Arguments, output: Any) -> None:
        self._completed = True

    def tap(self, name: str, read: Read, write: Write) -> list[Handle]:
        owner, short, product = self._modules_of(name)
        bridge: Any = owner._modules[short]
        rows = BatchedRows(self, read, write)
        handles: list[Handle] = [tap_product(product, rows.read, rows.write)]
        if short in ("q", "k", "v"):
            if projects_per_head(owner):
                handles.append(Reader(HeadInputs, owner, short, read))
                handles.append(tap_output(bridge.hook_out, write, partial(splits_inputs, owner)))
        elif short == "o":
            result = getattr(owner, "hook_result", None)
            if isinstance(result, nn.Module):
                by_head = partial(flag_is_on, owner, "use_attn_result")
                handles.append(tap_result(bridge.hook_in, read, by_head))
                handles.append(tap_output(result, write, by_head))
        else:
            bypassed = partial(uses_processed_weights, owner)
            source: Any = bridge.hook_in if short == "out" else owner.hook_in
            handles.append(tap_result(source, read, bypassed))
            handles.append(tap_output(bridge.hook_out, write, bypassed))
        return handles
