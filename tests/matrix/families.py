"""The families of the matrix: their settings in transformers, HookedTransformer and natively, and where their weights are.

Two layers, d_model 16, four heads of 4; families with grouped queries have two key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

D_MODEL, N_HEADS, D_HEAD, N_KV, D_MLP, D_VOCAB, N_CTX, N_LAYERS = 16, 4, 4, 2, 24, 23, 16, 2


@dataclass(frozen=True)
class Location:
    """Where a site's weight is in a plain module: a path and the output columns (None: all of them)."""

    path: str
    columns: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        config: name and settings of its transformers config (None: transformers has no such model).
        hooked: settings of its HookedTransformerConfig.
        convert: the function that turns transformers' weights into HookedTransformer's.
        native: settings of its TransformerBridgeConfig (None: ``boot_native`` cannot build it).
        where: the paths of its weights, as ``{short name: path}`` with ``{i}`` for the layer (``qkv`` and ``gate_in``: fused).
        fused: the order in a fused ``qkv``: ``blocks`` (all q, all k, all v) or ``heads`` (q, k, v head by head).
    """

    name: str
    hooked: Mapping[str, Any]
    config: tuple[str, Mapping[str, Any]] | None = None
    convert: str | None = None
    native: Mapping[str, Any] | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    fused: str = "blocks"
    kv_heads: int = N_HEADS


def _block(prefix: str, **paths: str) -> dict[str, str]:
    return {short.rstrip("_"): f"{prefix}.{path}" for short, path in paths.items()}


_LLAMA_LIKE = _block(
    "model.layers.{i}", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
    gate="mlp.gate_proj", in_="mlp.up_proj", out="mlp.down_proj",
)  # fmt: skip

_SIZES = dict(hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, num_attention_heads=N_HEADS, vocab_size=D_VOCAB)
_ROOMY = dict(max_position_embeddings=N_CTX, intermediate_size=D_MLP)
_GROUPED = dict(num_key_value_heads=N_KV)
_TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)

_RMS = dict(
    normalization_type="RMS", positional_embedding_type="rotary", rotary_adjacent_pairs=False, rotary_dim=D_HEAD,
    rotary_base=10000, gated_mlp=True, final_rms=True, act_fn="silu", eps=1e-6,
)  # fmt: skip
_RMS_GROUPED = dict(_RMS, n_key_value_heads=N_KV)
_LN = dict(normalization_type="LN", act_fn="gelu_new", positional_embedding_type="standard")

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "GPT-2",
            hooked=_LN,
            config=("GPT2Config", dict(n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, vocab_size=D_VOCAB, n_positions=N_CTX,
                                       n_inner=D_MLP, activation_function="gelu_new")),
            convert="convert_gpt2_weights",
            native=_LN,
            where=_block("transformer.h.{i}", qkv="attn.c_attn", o="attn.c_proj", in_="mlp.c_fc", out="mlp.c_proj"),
        ),
        Family(
            "GPT-NeoX",
            hooked=dict(_LN, act_fn="gelu", positional_embedding_type="rotary", rotary_adjacent_pairs=False, rotary_dim=2,
                        parallel_attn_mlp=True),
            config=("GPTNeoXConfig", dict(_SIZES, **_ROOMY, rotary_pct=0.5, hidden_act="gelu", use_parallel_residual=True)),
            convert="convert_neox_weights",
            where=_block("gpt_neox.layers.{i}", qkv="attention.query_key_value", o="attention.dense", in_="mlp.dense_h_to_4h",
                         out="mlp.dense_4h_to_h"),
            fused="heads",
        ),
        Family(
            "GPT-J",
            hooked=dict(_LN, positional_embedding_type="rotary", rotary_adjacent_pairs=True, rotary_dim=2,
                        parallel_attn_mlp=True),
            config=("GPTJConfig", dict(n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, vocab_size=D_VOCAB, n_positions=N_CTX,
                                       n_inner=D_MLP, rotary_dim=2, activation_function="gelu_new", tie_word_embeddings=False)),
            convert="convert_gptj_weights",
            where=_block("transformer.h.{i}", q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", o="attn.out_proj",
                         in_="mlp.fc_in", out="mlp.fc_out"),
        ),
        Family(
            "Llama",
            hooked=_RMS_GROUPED,
            config=("LlamaConfig", dict(_SIZES, **_ROOMY, **_GROUPED)),
            convert="convert_llama_weights",
            native=dict(_RMS_GROUPED, rotary_adjacent_pairs=True),
            where=_LLAMA_LIKE,
            kv_heads=N_KV,
        ),
        Family(
            "Mistral",
            hooked=dict(_RMS_GROUPED, use_local_attn=True, window_size=4, attn_types=["local"] * N_LAYERS),
            config=("MistralConfig", dict(_SIZES, **_ROOMY, **_GROUPED, sliding_window=4, head_dim=D_HEAD)),
            convert="convert_mistral_weights",
            where=_LLAMA_LIKE,
            kv_heads=N_KV,
        ),
        Family(
            "Qwen2",
            hooked=_RMS_GROUPED,
            config=("Qwen2Config", dict(_SIZES, **_ROOMY, **_GROUPED)),
            convert="convert_qwen2_weights",
            where=_LLAMA_LIKE,
            kv_heads=N_KV,
        ),
        Family(
            "Qwen3",
            hooked=dict(_RMS_GROUPED, use_qk_norm=True),
            config=("Qwen3Config", dict(_SIZES, **_ROOMY, **_GROUPED, head_dim=D_HEAD)),
            convert="convert_qwen3_weights",
            where=_LLAMA_LIKE,
            kv_heads=N_KV,
        ),
        Family(
            "Gemma-2",
            hooked=dict(_RMS_GROUPED, act_fn="gelu_pytorch_tanh", use_local_attn=True, window_size=4,
                        attn_types=["local", "global"], attn_scores_soft_cap=50.0,
                        output_logits_soft_cap=30.0, use_normalization_before_and_after=True),
            config=("Gemma2Config", dict(_SIZES, **_ROOMY, **_GROUPED, head_dim=D_HEAD, sliding_window=4,
                                         query_pre_attn_scalar=D_HEAD, hidden_activation="gelu_pytorch_tanh",
                                         attn_logit_softcapping=50.0, final_logit_softcapping=30.0)),
            convert="convert_gemma_weights",
            where=_LLAMA_LIKE,
            kv_heads=N_KV,
        ),
        Family(
            "Phi-3",
            hooked=dict(_RMS_GROUPED, eps=1e-5),
            config=("Phi3Config", dict(_SIZES, **_ROOMY, **_GROUPED, **_TOKENS, original_max_position_embeddings=N_CTX)),
            convert="convert_phi3_weights",
            where=_block("model.layers.{i}", qkv="self_attn.qkv_proj", o="self_attn.o_proj", gate_in="mlp.gate_up_proj",
                         out="mlp.down_proj"),
            kv_heads=N_KV,
        ),
        Family(
            "OPT",
            hooked=dict(_LN, act_fn="relu"),
            config=("OPTConfig", dict(_SIZES, **_TOKENS, max_position_embeddings=N_CTX, ffn_dim=D_MLP,
                                  word_embed_proj_dim=D_MODEL)),
            convert="convert_opt_weights",
            native=dict(_LN, act_fn="relu"),
            where=_block("model.decoder.layers.{i}", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
                         o="self_attn.out_proj", in_="fc1", out="fc2"),
        ),
        Family(
            "Bloom",
            hooked=dict(_LN, act_fn="gelu_fast", positional_embedding_type="alibi", post_embedding_ln=True, d_mlp=4 * D_MODEL),
            config=("BloomConfig", dict(_TOKENS, hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, vocab_size=D_VOCAB)),
            convert="convert_bloom_weights",
            where=_block("transformer.h.{i}", qkv="self_attention.query_key_value", o="self_attention.dense",
                         in_="mlp.dense_h_to_4h", out="mlp.dense_4h_to_h"),
            fused="heads",
        ),
        Family("attention only", hooked=dict(_LN, attn_only=True), native=dict(_LN, attn_only=True)),
        Family("SoLU", hooked=dict(_LN, act_fn="solu_ln"), native=dict(_LN, act_fn="solu_ln")),
        Family("no norm", hooked=dict(_LN, normalization_type=None), native=dict(_LN, normalization_type=None)),
    )
}  # fmt: skip


def native_where(family: Family) -> dict[str, str]:
    """The paths of a native model's weights."""
    assert family.native is not None
    paths = {short: f"layers.{{i}}.attn.{short}" for short in ("q", "k", "v", "o")}
    if family.native.get("attn_only"):
        return paths
    mlp = dict(gate="gate", in_="in", out="out") if family.native.get("gated_mlp") else dict(in_="fc_in", out="fc_out")
    return paths | _block("layers.{i}.mlp", **mlp)


def locations(where: Mapping[str, str], *, kv_heads: int, fused: str) -> dict[str, Location]:
    """Every site's Location, in TransformerLens's names."""
    results: dict[str, Location] = {}
    weights: dict[str, Callable[[int], str]] = {
        **{s: (lambda i, s=s: f"blocks.{i}.attn.W_{s.upper()}") for s in ("q", "k", "v", "o")},
        **{s: (lambda i, s=s: f"blocks.{i}.mlp.W_{s}") for s in ("gate", "in", "out")},
    }
    for i in range(N_LAYERS):
        for short, path in where.items():
            full = path.format(i=i)
            if short == "qkv":
                for part, columns in _fused_heads(kv_heads, fused).items():
                    results[weights[part](i)] = Location(full, columns)
            elif short == "gate_in":
                results[weights["gate"](i)] = Location(full, tuple(range(D_MLP)))
                results[weights["in"](i)] = Location(full, tuple(range(D_MLP, 2 * D_MLP)))
            else:
                results[weights[short](i)] = Location(full)
    return results


def _fused_heads(kv_heads: int, fused: str) -> dict[str, tuple[int, ...]]:
    if fused == "heads":  # (head, q|k|v, d_head)
        return {
            part: tuple(h * 3 * D_HEAD + at * D_HEAD + j for h in range(N_HEADS) for j in range(D_HEAD))
            for at, part in enumerate("qkv")
        }
    q, kv = N_HEADS * D_HEAD, kv_heads * D_HEAD
    return {"q": tuple(range(q)), "k": tuple(range(q, q + kv)), "v": tuple(range(q + kv, q + 2 * kv))}
