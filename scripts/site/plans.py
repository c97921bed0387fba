"""The table of docs/scaling.md: what the planner says of three models."""

from __future__ import annotations

from typing import Any

from tl_vpd import ExecutionConfig, VPDConfig
from tl_vpd.planning import Target, TransformerShape, footprint

CONTEXT, ROWS, GIB = 512, 64, 2**30
CHUNKS = {"kind": "chunked_transformers", "d_ci": 4096, "n_blocks": 4, "chunk": 14}
LLAMA_SHAPE: dict[str, Any] = {"layers": 32, "d_model": 4096, "heads": 32, "kv_heads": 8, "d_mlp": 14336}
Model = tuple[TransformerShape, dict[str, Any]]
"""Shapes of a model, and Γ's settings."""
GPT2: Model = (
    TransformerShape(layers=12, d_model=768, heads=12, d_mlp=3072, vocabulary=50257),
    {"d_ci": 1536, "n_blocks": 6},
)
PYTHIA: Model = (
    TransformerShape(layers=24, d_model=1024, heads=16, d_mlp=4096, vocabulary=50304),
    {"d_ci": 2048, "n_blocks": 8},
)
LLAMA: Model = (TransformerShape(**LLAMA_SHAPE, vocabulary=128256, gated=True, itemsize=2), CHUNKS)
Run = tuple[str, Model, dict[str, Any], dict[str, Any], int]
RUNS: list[Run] = [
    ("GPT-2 small, the whole batch at once", GPT2, {}, {}, 1),
    ("4 rows at once", GPT2, {}, {"micro_batch": 4}, 1),
    ("4 rows, a pool of 8", GPT2, {"adversary": {"pool": 8}}, {"micro_batch": 4}, 1),
    ("1 row, a pool of 8", GPT2, {"adversary": {"pool": 8}}, {"micro_batch": 1}, 1),
    ("4 rows, a pool of 8", GPT2, {"adversary": {"pool": 8}}, {"micro_batch": 4, "sharding": "full"}, 8),
    ("Pythia-410M, 2 rows, a pool of 8", PYTHIA, {"adversary": {"pool": 8}}, {"micro_batch": 2}, 1),
    ("the same", PYTHIA, {"adversary": {"pool": 8}}, {"micro_batch": 2, "sharding": "optimizer"}, 8),
    ("the same", PYTHIA, {"adversary": {"pool": 8}}, {"micro_batch": 2, "sharding": "full"}, 8),
    ("8B, Llama-like in bfloat16, 1 row, a pool of 4", LLAMA, {"adversary": {"pool": 4}}, {"micro_batch": 1}, 1),
    ("the same", LLAMA, {"adversary": {"pool": 4}}, {"micro_batch": 1, "sharding": "full"}, 8),
    ("the same", LLAMA, {"adversary": {"pool": 4}}, {"micro_batch": 1, "sharding": "full"}, 64),
    (
        "its last block alone, Γ a chunk of 7 sites",
        LLAMA,
        {"adversary": {"pool": 4}, "sites": ["blocks.31.*"], "gamma": {**CHUNKS, "chunk": 7}},
        {"micro_batch": 1},
        1,
    ),
]
"""Name, model, settings of ``VPDConfig`` and of ``ExecutionConfig``, and number of processes."""


def plans() -> list[dict[str, str]]:
    """GiB of one process by what they hold, and TFLOP of its step."""
    rows = []
    for name, (shape, gamma), settings, execution, processes in RUNS:
        config, how = VPDConfig(**{"batch_size": ROWS, "gamma": gamma, **settings}), ExecutionConfig(**execution)
        needs = footprint(Target.of(shape), config, context=CONTEXT, execution=how, processes=processes)
        state = sum(needs.bytes[part] for part in ("parameters", "gradients", "moments"))
        activations = needs.total - needs.bytes["target"] - state - needs.bytes["sources"]
        rows.append(
            {
                "run": name,
                "processes": "1" if processes == 1 else f"{processes}, `{execution['sharding']}`",
                "target": f"{needs.bytes['target'] / GIB:.1f}",
                "V, U, Γ, gradients, moments": f"{state / GIB:.1f}",
                "sources": f"{needs.bytes['sources'] / GIB:.1f}",
                "activations": f"{activations / GIB:.1f}",
                "**memory**": f"**{needs.total / GIB:.0f}**",
                "TFLOP": f"{needs.step_flops / 1e12:,.0f}",
            }
        )
    return rows
