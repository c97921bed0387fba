"""Runs in the authors' torch format that the tests write themselves, with a forward of their own in plain tensors.

Nothing of the package is used: the target, Γ and the masked target are computed from the file's tensors under the authors' names.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

KINDS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.c_fc", "mlp.down_proj")
COUNTS = {"q_proj": 3, "k_proj": 5, "v_proj": 4, "o_proj": 6, "c_fc": 7, "down_proj": 8}
D, HEADS, D_MLP, VOCAB, CONTEXT = 16, 2, 24, 29, 10
D_CI, CI_HEADS, CI_MLP = 12, 2, 20


def model_config(n_layer: int, kv_heads: int = HEADS, base: float = 10_000) -> dict[str, Any]:
    """The target's config."""
    return {
        "model_type": "LlamaSimpleMLP",
        "n_layer": n_layer,
        "n_embd": D,
        "n_head": HEADS,
        "n_key_value_heads": kv_heads,
        "n_intermediate": D_MLP,
        "vocab_size": VOCAB,
        "n_ctx": CONTEXT,
        "block_size": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rotary_base": base,
        "attn_bias": False,
        "mlp_bias": False,
        "use_grouped_query_attention": True,
        "rotary_adjacent_pairs": False,
        "rotary_dim": D // HEADS,
        "flash_attention": False,
    }


def run_config(targets: list[dict[str, Any]], ci: dict[str, Any] | None = None) -> dict[str, Any]:
    """An older config (``final_config.yaml``)."""
    size = {
        "d_model": D_CI,
        "n_blocks": 2,
        "mlp_hidden_dim": [CI_MLP],
        "attn_config": {"n_heads": CI_HEADS, "max_len": 10},
    }
    ci = ci or {"mode": "global", "fn_type": "global_shared_transformer", "simple_transformer_ci_cfg": size}
    return {
        "module_info": targets,
        "ci_config": ci,
        "sigmoid_type": "leaky_hard",
        "pretrained_model_class": "spd.pretrain.models.llama_simple_mlp.LlamaSimpleMLP",
        "pretrained_model_name": "wandb:goodfire/spd/runs/t-0000abcd",
    }


def shapes(n_layer: int, kv_heads: int = HEADS) -> dict[str, tuple[int, int]]:
    """Every module's ``(d_in, d_out)``."""
    kv = kv_heads * D // HEADS
    sizes = dict(zip(KINDS, [(D, D), (D, kv), (D, kv), (D, D), (D, D_MLP), (D_MLP, D)], strict=True))
    return {f"h.{i}.{kind}": sizes[kind] for i in range(n_layer) for kind in KINDS}


def random_state(n_layer: int, *, kv_heads: int = HEADS, mlps: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint whose V and U nearly make W, with a Γ of random weights (a transformer, or MLPs of ``mlps`` hidden units)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    state, modules = {"target_model.wte.weight": normal(VOCAB, D)}, shapes(n_layer, kv_heads)
    for module, (d_in, d_out) in modules.items():
        C = COUNTS[module.rsplit(".", 1)[1]]
        V, U = normal(d_in, C, scale=d_in**-0.5), normal(C, d_out, scale=2 * C**-0.5)
        state[f"_components.{module.replace('.', '-')}.V"], state[f"_components.{module.replace('.', '-')}.U"] = V, U
        state[f"target_model.{module}.weight"] = (V @ U).T.contiguous() + normal(d_out, d_in, scale=0.02)
    for i in range(n_layer):
        for norm in ("rms_1", "rms_2"):
            state[f"target_model.h.{i}.{norm}.weight"] = 1 + normal(D, scale=0.1)
    state["target_model.ln_f.weight"] = 1 + normal(D, scale=0.1)
    state["target_model.lm_head.weight"] = state["target_model.wte.weight"]
    if mlps is not None:
        for module in modules:
            C, prefix = COUNTS[module.rsplit(".", 1)[1]], f"ci_fn._ci_fns.{module.replace('.', '-')}.layers."
            state |= {f"{prefix}0.W": normal(C, 1, mlps), f"{prefix}0.b": normal(C, mlps)}
            state |= {f"{prefix}2.W": normal(C, mlps, 1), f"{prefix}2.b": normal(C, 1)}
        return state
    d_in, total = sum(d for d, _ in modules.values()), sum(COUNTS[m.rsplit(".", 1)[1]] for m in modules)
    g = "ci_fn._global_ci_fn."
    state |= {f"{g}_input_projector.W": normal(d_in, D_CI, scale=d_in**-0.5), f"{g}_input_projector.b": normal(D_CI)}
    state |= {f"{g}_output_head.W": normal(D_CI, total), f"{g}_output_head.b": normal(total)}
    for b in range(2):
        for name in ("q", "k", "v", "out"):
            state[f"{g}_blocks.{b}.attn.{name}_proj.weight"] = normal(D_CI, D_CI, scale=D_CI**-0.5)
        d_head = D_CI // CI_HEADS
        state[f"{g}_blocks.{b}.attn.rope.inv_freq"] = 10_000.0 ** -(torch.arange(0, d_head, 2) / d_head)
        state |= {f"{g}_blocks.{b}.mlp.0.W": normal(D_CI, CI_MLP, scale=0.3), f"{g}_blocks.{b}.mlp.0.b": normal(CI_MLP)}
        state |= {f"{g}_blocks.{b}.mlp.2.W": normal(CI_MLP, D_CI, scale=0.3), f"{g}_blocks.{b}.mlp.2.b": normal(D_CI)}
    return state


def write_run(folder: Path, state: dict[str, Tensor], n_layer: int, *, ci: Any = None, kv_heads: int = HEADS) -> Path:
    """A folder that is enough by itself."""
    folder.mkdir(parents=True)
    targets = [{"module_pattern": f"h.*.{kind}", "C": COUNTS[kind.split(".")[1]]} for kind in KINDS]
    (folder / "final_config.yaml").write_text(yaml.safe_dump(run_config(targets, ci)))
    (folder / "model_config.yaml").write_text(yaml.safe_dump(model_config(n_layer, kv_heads)))
    torch.save(state, folder / "model_7.pth")
    return folder


def rms(x: Tensor, scale: Tensor | None = None, eps: float = torch.finfo(torch.float32).eps) -> Tensor:
    """x over its root mean square."""
    x = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return x if scale is None else x * scale


def rotated(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Half-split rotation of ``[batch, head, pos, d]``."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), base ** -(torch.arange(half, dtype=x.dtype) / half))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool, base: float = 10_000.0) -> Tensor:
    """Softmax attention of ``[batch, pos, d]``."""
    d_head = q.shape[-1] // heads
    q, k, v = (t.unflatten(-1, (-1, d_head)).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    scores = rotated(q, base) @ rotated(k, base).transpose(-1, -2) / math.sqrt(d_head)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def forward(
    state: dict[str, Tensor],
    tokens: Tensor,
    n_layer: int,
    masks: dict[str, Tensor] | None = None,
    *,
    base: float = 10_000.0,
    eps: float = 1e-6,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The target's logits and its modules' inputs, in float64; with masks, every module is ``(x V ⊙ m) U``."""
    s = {key: t.double() for key, t in state.items()}
    inputs: dict[str, Tensor] = {}

    def linear(module: str, x: Tensor) -> Tensor:
        inputs[module] = x
        if masks is None:
            return x @ s[f"target_model.{module}.weight"].T
        name = f"_components.{module.replace('.', '-')}"
        return (x @ s[f"{name}.V"] * masks[module].double()) @ s[f"{name}.U"]

    x = s["target_model.wte.weight"][tokens]
    for i in range(n_layer):
        h = rms(x, s[f"target_model.h.{i}.rms_1.weight"], eps)
        q, k, v = (linear(f"h.{i}.attn.{n}_proj", h) for n in "qkv")
        x = x + linear(f"h.{i}.attn.o_proj", attention(q, k, v, HEADS, causal=True, base=base))
        h = rms(x, s[f"target_model.h.{i}.rms_2.weight"], eps)
        x = x + linear(f"h.{i}.mlp.down_proj", F.gelu(linear(f"h.{i}.mlp.c_fc", h), approximate="tanh"))
    return rms(x, s["target_model.ln_f.weight"], eps) @ s["target_model.lm_head.weight"].T, inputs


def importances(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Γ's importances by module, in float64; modules in lexicographic order."""
    s, modules = {key: t.double() for key, t in state.items()}, sorted(inputs)
    counts = [s[f"_components.{m.replace('.', '-')}.V"].shape[1] for m in modules]
    g = "ci_fn._global_ci_fn."
    if f"{g}_input_projector.W" not in s:
        result = {}
        for m in modules:
            p, a = f"ci_fn._ci_fns.{m.replace('.', '-')}.layers.", inputs[m] @ s[f"_components.{m.replace('.', '-')}.V"]
            hidden = F.gelu(torch.einsum("...ci,cih->...ch", a[..., None], s[f"{p}0.W"]) + s[f"{p}0.b"])
            result[m] = (torch.einsum("...ch,cho->...co", hidden, s[f"{p}2.W"]) + s[f"{p}2.b"])[..., 0].clamp(0, 1)
        return result
    x = torch.cat([rms(inputs[m]) for m in modules], -1) @ s[f"{g}_input_projector.W"] + s[f"{g}_input_projector.b"]
    for b in range(2):
        p, h = f"{g}_blocks.{b}.", rms(x)
        q, k, v = (h @ s[f"{p}attn.{n}_proj.weight"].T for n in "qkv")
        x = x + attention(q, k, v, CI_HEADS, causal=False) @ s[f"{p}attn.out_proj.weight"].T
        x = x + F.gelu(rms(x) @ s[f"{p}mlp.0.W"] + s[f"{p}mlp.0.b"]) @ s[f"{p}mlp.2.W"] + s[f"{p}mlp.2.b"]
    z = x @ s[f"{g}_output_head.W"] + s[f"{g}_output_head.b"]
    return dict(zip(modules, z.clamp(0, 1).split(counts, -1), strict=True))
