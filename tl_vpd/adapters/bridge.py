"""TransformerBridge: its sites, where their inputs and outputs pass, and what cannot be decomposed.

Every site is a ``LinearBridge`` (``blocks.{i}.attn.q``, ``blocks.{i}.mlp.in``, ...) around the module that holds the weight,
``original_component``: one hook there sees x and y = x @ W + b, after users' hooks on the way in and before those on the way out.
Three ways of the bridge pass these modules by, and are tapped where they go instead:

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

from tl_vpd.adapters.base import Adapter, Arguments, Keywords, centred
from tl_vpd.adapters.linearised import See, at_fixed_scale, constant, norm_modules, pattern_points
from tl_vpd.adapters.linears import oriented, overwrite, why_not
from tl_vpd.adapters.scores import bilinear_scores
from tl_vpd.adapters.taps import Handle, Read, Unsupported, Write, tap_output, tap_product, tap_result
from tl_vpd.adapters.versions import transformer_lens_version
from tl_vpd.components import WHOLE, Layout
from tl_vpd.site import SHORT, Site

PARTS = {short: weight for weight, short in SHORT.items()}
_PER_HEAD = "_project_per_head_qkv"


class BridgeAdapter(Adapter):
    """A TransformerBridge as sites, weights and taps."""

    def __init__(self, model: Any) -> None:
        self._batch: int | None = None
        self._completed = True
        super().__init__(model)

    def check(self) -> None:
        """Raises Unsupported if a flag of the model is on that cannot be decomposed."""
        if not hasattr(self.model, "blocks"):
            raise Unsupported("This bridge has no `blocks`: decoder-only transformers can be decomposed.")
        for block in self.model.blocks:
            attn, mlp = block._modules.get("attn"), block._modules.get("mlp")
            if attn is not None and _splits(attn) and not hasattr(type(attn), _PER_HEAD):
                flag = "use_split_qkv_input" if _flag(attn, "use_split_qkv_input") else "use_attn_in"
                raise Unsupported(
                    f"cfg.{flag} is on, which cannot be decomposed with a {type(attn).__name__}: call "
                    f"model.set_{flag}(False) first."
                )
            if mlp is not None and _functional(mlp) and transformer_lens_version() < (3, 7, 3):
                raise Unsupported(
                    "This TransformerLens computes gated MLPs with processed weights past every hook: update it to 3.7.3 or "
                    "later, or load the model without enable_compatibility_mode()."
                )

    def find_sites(self) -> None:
        """The products inside every block's ``attn`` and ``mlp``; what is no plain product is refused."""
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
            name, product = f"{path}.{PARTS[short]}", _product_of(attn, short)
            reason = why_not(product)
            if reason is None:
                d_in, d_out = oriented(product).shape  # type: ignore[arg-type]
                heads, over = divmod(d_in if short == "o" else d_out, d_head)
                if not over:
                    self.add(Site(name, d_in, d_out, heads, d_head))
                    continue
                reason = f"its {d_in if short == 'o' else d_out} channels are no heads of {d_head}"
            self.refused[name] = f"{reason} ({type(attn).__name__})"

    def _add_mlp(self, path: str, mlp: nn.Module | None) -> None:
        if mlp is None:
            return  # attention only
        gated = _product_of(mlp, "gate") is not None
        for short in ("gate", "in", "out") if gated else ("in", "out"):
            name, product = f"{path}.{PARTS[short]}", _product_of(mlp, short)
            if (reason := why_not(product)) is not None:
                self.refused[name] = f"{reason} ({type(mlp).__name__})"
                continue
            self.add(Site(name, *oriented(product).shape))  # type: ignore[arg-type]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.model.cfg.d_model

    def modules(self) -> Iterator[nn.Module]:
        """Every module the model runs, each once: the bridge's own and the wrapped model's."""
        seen = {id(m): m for m in self.model.modules()}
        seen.update((id(m), m) for m in self.model.original_model.modules())
        return iter(seen.values())

    def processing(self) -> dict[str, bool]:
        """``fold_ln`` and ``center_writing_weights`` as the weights show them."""
        found: dict[str, bool] = {}
        ln = getattr(self.model.blocks[0]._modules.get("ln1"), "original_component", None)
        if isinstance(getattr(ln, "weight", None), Tensor):
            neutral = (
                0 if getattr(self.model.cfg, "rmsnorm_uses_offset", False) else 1
            )  # Gemma's norms multiply by 1 + w
            found["fold_ln"] = bool((ln.weight == neutral).all())  # type: ignore[union-attr]
        if "blocks.0.attn.W_O" in self.sites:
            found["center_writing_weights"] = centred(self.weight("blocks.0.attn.W_O"))
        return found

    @property
    def processed(self) -> bool:
        """Whether ``enable_compatibility_mode`` has been called."""
        return bool(getattr(self.model, "compatibility_mode", False))

    # -- weights -------------------------------------------------------------------------------------------------

    def _parts(self, name: str) -> tuple[nn.Module, str, nn.Module]:
        """A site's ``attn`` or ``mlp``, its short name, and the module of its weight."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        short = self.sites[name].short
        product = _product_of(owner, short)
        assert product is not None
        return owner, short, product

    def _processed(self, name: str, what: str) -> Tensor | None:
        """The processed weight or bias that 3.x's gated MLPs compute with, beside the module's own."""
        owner, short, _ = self._parts(name)
        return getattr(owner, f"_processed_{what}_{short}", None) if _functional(owner) else None

    def weight(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """The site's weight as it stands in the model (detached, a view)."""
        processed = self._processed(name, "W")
        return oriented(self._parts(name)[2]) if processed is None else processed.detach().T

    @torch.no_grad()
    def set_weight(self, name: str, W: Float[Tensor, "d_in d_out"]) -> None:
        """Writes the site's weight into the model, in place; raises ValueError if the shape is another."""
        self.check_shape(name, W)
        overwrite(self._parts(name)[2], W)
        processed = self._processed(name, "W")
        if processed is not None:
            processed.copy_(W.T)

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        """The bias that is part of the site's output (None: there is none)."""
        owner, _, product = self._parts(name)
        bias = self._processed(name, "b") if hasattr(owner, "_processed_W_in") else getattr(product, "bias", None)
        return None if bias is None else bias.reshape(-1)

    def layout(self, name: str) -> Layout:
        """By head under ``use_split_qkv_input`` and ``use_attn_in`` (Q, K, V) and ``use_attn_result`` (O)."""
        site = self.sites[name]
        if site.n_heads is None:
            return WHOLE
        attn, short, _ = self._parts(name)
        if short == "o":
            return Layout("result", site.n_heads, y_has_heads=True) if _flag(attn, "use_attn_result") else WHOLE
        return Layout("split", site.n_heads, x_has_heads=True) if _splits(attn) else WHOLE

    def scores_hook(self, layer: int) -> str:
        """``blocks.{layer}.attn.hook_attn_scores``; raises Unsupported where scores are not bilinear in queries and keys."""
        attn = self.model.blocks[layer].attn
        own = getattr(attn, "original_component", None)
        normed = any(getattr(own, n, None) is not None for n in ("q_norm", "q_layernorm"))
        return bilinear_scores(
            layer,
            qk_norm=normed,
            softcap=getattr(own, "attn_logit_softcapping", None),
            clip=getattr(getattr(own, "config", None), "clip_qkv", None),
        )

    def held_fixed(self, *, norms: bool, patterns: bool, see: See) -> list[Handle]:
        """Keeps gradients from passing norms' scales and attention patterns; ``see`` gets every norm's output and bias."""
        handles: list[Handle] = []
        for module in norm_modules(self.modules()) if norms else []:
            handles.append(module.register_forward_hook(partial(_norm_held, see), prepend=True, with_kwargs=True))
        for point in pattern_points(self.modules()) if patterns else []:
            handles.append(point.register_forward_hook(constant))
        return handles

    # -- calls ---------------------------------------------------------------------------------------------------

    def hook_points_changed(self) -> None:
        """Lets the bridge scan its modules again."""
        self.model.clear_hook_registry()
        self.model._initialize_hook_registry()

    def truncation(self, arguments: Arguments, keywords: Keywords) -> str | None:
        """``stop_at_layer``, if it is given to this call (``run_with_cache`` stops by a hook: see ``completed``)."""
        return "stop_at_layer" if self.given(arguments, keywords).get("stop_at_layer") is not None else None

    def completed(self, arguments: Arguments, keywords: Keywords) -> bool:
        """Whether the wrapped model came to its end."""
        return self._completed

    def run(self, tokens: Tensor, token_mask: Bool[Tensor, "batch pos"] | None) -> Tensor:
        """Logits of the model on tokens; ``token_mask`` is False at padding."""
        self._batch = len(tokens)  # taps may be on without ``tap_inputs``
        return super().run(tokens, token_mask)

    def kv_cache(self, arguments: Arguments, keywords: Keywords) -> Any:
        """The KV cache handed to this call, if any."""
        return self.given(arguments, keywords).get("past_key_values")

    # -- taps ----------------------------------------------------------------------------------------------------

    def tap_inputs(
        self, see_tokens: Callable[[Tensor | None], None], see_attention_mask: Callable[[Tensor | None], None]
    ) -> list[Handle]:
        """Tokens and attention mask as the wrapped model is given them."""
        source = self.model.original_model
        begin = partial(self._begin, see_tokens, see_attention_mask)
        return [
            source.register_forward_pre_hook(begin, with_kwargs=True),
            source.register_forward_hook(self._end),
        ]

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
        self._batch, self._completed = (None if shaped is None else len(shaped)), False
        see_tokens(tokens)
        see_attention_mask(mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)

    def _end(self, module: nn.Module, arguments: Arguments, output: Any) -> None:
        self._completed = True

    def tap(self, name: str, read: Read, write: Write) -> list[Handle]:
        """Sends a site's input to ``read`` and its output through ``write`` in every forward pass."""
        owner, short, product = self._parts(name)
        bridge: Any = owner._modules[short]
        flat = _Rows(self, read, write)
        handles: list[Handle] = [tap_product(product, flat.read, flat.write)]
        if short in ("q", "k", "v"):
            if hasattr(type(owner), _PER_HEAD):
                handles.append(_tap_head_inputs(owner, short, read))
                handles.append(tap_output(bridge.hook_out, write, partial(_splits, owner)))
        elif short == "o":
            result = getattr(owner, "hook_result", None)
            if isinstance(result, nn.Module):
                by_head = partial(_flag, owner, "use_attn_result")
                handles.append(tap_result(bridge.hook_in, read, by_head))
                handles.append(tap_output(result, write, by_head))
        else:
            past = partial(_functional, owner)
            source: Any = bridge.hook_in if short == "out" else owner.hook_in
            handles.append(tap_result(source, read, past))
            handles.append(tap_output(bridge.hook_out, write, past))
        return handles


class _Rows:
    """Gives the batch axis back to layers that are run on all tokens as rows (OPT's MLP), and takes it away again."""

    def __init__(self, adapter: BridgeAdapter, read: Read, write: Write) -> None:
        self.adapter, self.onward, self.change = adapter, read, write

    def _batched(self, rows: Tensor) -> Tensor:
        batch = self.adapter._batch
        return rows.unflatten(0, (batch, -1)) if rows.ndim == 2 and batch is not None else rows

    def read(self, x: Tensor) -> None:
        """Sends ``[batch, pos, d_in]`` onward."""
        self.onward(self._batched(x))

    def write(self, y: Tensor) -> Tensor | None:
        """Sends ``[batch, pos, d_out]`` through ``write``."""
        changed = self.change(self._batched(y))
        return None if changed is None else changed.reshape(y.shape)


class _HeadInputs:
    """Stands in for an attention's ``_project_per_head_qkv`` and shows what it is given."""

    def __init__(self, attn: nn.Module) -> None:
        self.attn = attn
        self.readers: dict[str, Read] = {}

    def __call__(self, product: nn.Module, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        for short, read in self.readers.items():
            if product is self.attn._modules[short]:
                read(x)
        return getattr(type(self.attn), _PER_HEAD)(self.attn, product, x, *arguments, **keywords)


class _HeadTap:
    """One reader of the inputs per head."""

    def __init__(self, attn: nn.Module, short: str, read: Read) -> None:
        self.attn, self.short = attn, short
        attn.__dict__.setdefault(_PER_HEAD, _HeadInputs(attn)).readers[short] = read

    def remove(self) -> None:
        """Takes the reader off; without any, the attention's own method is back."""
        stand_in = self.attn.__dict__.get(_PER_HEAD)
        if stand_in is None:
            return
        stand_in.readers.pop(self.short, None)
        if not stand_in.readers:
            del self.attn.__dict__[_PER_HEAD]


def _tap_head_inputs(attn: nn.Module, short: str, read: Read) -> _HeadTap:
    return _HeadTap(attn, short, read)


def _product_of(owner: nn.Module, short: str) -> nn.Module | None:
    """The module that holds the weight of ``q``, ``in``, ... inside an ``attn`` or ``mlp``."""
    return getattr(owner._modules.get(short), "original_component", None)


def _flag(attn: nn.Module, flag: str) -> bool:
    return bool(getattr(attn.config, flag, False))


def _splits(attn: nn.Module) -> bool:
    return _flag(attn, "use_split_qkv_input") or _flag(attn, "use_attn_in")


def _functional(mlp: nn.Module) -> bool:
    """Whether a gated MLP computes with its processed weights, past its modules."""
    return bool(getattr(mlp, "_use_processed_weights", False))


def _norm_held(see: See, module: Any, arguments: Arguments, keywords: Keywords, output: Tensor) -> Tensor:
    """A NormalizationBridge's output at a fixed scale."""
    x = arguments[0] if arguments else next(iter(keywords.values()))
    bare = "Pre" in type(module).__name__
    weight = None if bare else module.weight
    if weight is not None and getattr(module.config, "rmsnorm_uses_offset", False):
        weight = 1 + weight
    bias = None if bare or module.uses_rms_norm else getattr(module.original_component, "bias", None)
    held = at_fixed_scale(x, output, weight, bias, centred=not module.uses_rms_norm)
    see(held, bias)
    return held
