"""Trains the bundled model: a two-layer GPT-NeoX on the standard library's source.

Run ``python -m scripts.bundled.train_model --out DIR`` (about 20 minutes on two cores). The folder then has the
bundled files: ``config.json``, ``model.safetensors`` and the tokenizer in the layout of transformers, ``tokens.safetensors``
(training and validation windows) and ``training.json`` (the validation curve that *compute recovered* reads).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.numpy import save_file
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from scripts.bundled import corpus

log = logging.getLogger(__name__)

CONTEXT = 128
CONFIG: dict[str, Any] = dict(  # noqa: C408 (keywords as GPTNeoXConfig takes them)
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=384,
    max_position_embeddings=CONTEXT,
    vocab_size=corpus.VOCABULARY,
    rotary_pct=1.0,
    use_parallel_residual=False,
    hidden_act="gelu",
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
)


def next_token_ce(logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token, in nats."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(
    out: Path, *, steps: int = 4500, batch: int = 64, lr: float = 4e-3, seed: int = 0, root: Path | None = None
) -> None:
    """Trains tokenizer and model and writes them to a folder.

    Args:
        out: the folder.
        steps: of training.
        batch: rows in a batch.
        lr: largest learning rate.
        seed: of the weights.
        root: of the standard library (None: this Python's).
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    training, validation = corpus.split(corpus.files(root))
    raw = corpus.train_tokenizer(training)
    streams = {"training": corpus.token_stream(raw, training), "validation": corpus.token_stream(raw, validation)}
    log.info("tokens: %s", {k: len(v) for k, v in streams.items()})
    held_out = corpus.windows(streams["validation"], CONTEXT, 256, seed=1)
    windows = {"validation": held_out, "training": corpus.windows(streams["training"], CONTEXT, 2000, seed=2)}
    save_file(windows, out / "tokens.safetensors")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=corpus.BOS, eos_token=corpus.BOS, pad_token=corpus.BOS, model_max_length=CONTEXT
    )
    tokenizer.save_pretrained(out)
    _name_for_every_version(out / "tokenizer_config.json")

    model = GPTNeoXForCausalLM(GPTNeoXConfig(**CONFIG))
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (decay if p.ndim == 2 and "embed" not in name else plain).append(p)
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    held_out_tokens = torch.from_numpy(held_out.astype(np.int64))
    measured_steps = {round(10 ** (i / 20)) for i in range(200)} | set(range(0, steps + 1, 250)) | {steps}
    curve: list[list[float]] = []
    stream = corpus.batches(streams["training"], CONTEXT, batch, seed=1000)
    start = time.monotonic()
    for step in range(steps + 1):
        if step in measured_steps:
            model.eval()
            with torch.no_grad():
                ce = next_token_ce(model(held_out_tokens[:64]).logits, held_out_tokens[:64]).item()
            model.train()
            curve.append([step, ce])
            log.info("step %d  validation CE %.4f  %.0f s", step, ce, time.monotonic() - start)
        if step == steps:
            break
        progress = step / steps
        rate = lr * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = torch.from_numpy(next(stream).astype(np.int64))
        loss = next_token_ce(model(tokens).logits, tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 499:
            model.save_pretrained(out)
    model.save_pretrained(out)
    _name_rotary_for_older_transformers(out / "config.json")
    record = {
        "steps": steps,
        "batch": batch,
        "context": CONTEXT,
        "lr": lr,
        "seed": seed,
        "training_tokens": len(streams["training"]),
        "validation_tokens": len(streams["validation"]),
        "training_files": [p.name for p in training],
        "validation_files": [p.name for p in validation],
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(record) + "\n")


def _name_rotary_for_older_transformers(path: Path) -> None:
    """Before version 5, transformers reads the rotary settings under other names, and would use defaults instead."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"rotary_pct": CONFIG["rotary_pct"], "rotary_emb_base": 10_000}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(arguments.out, steps=arguments.steps, seed=arguments.seed)


def _name_for_every_version(path: Path) -> None:
    """Names the tokenizer's class as transformers 4 and 5 both know it."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
