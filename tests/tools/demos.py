"""Three notebooks that TransformerLens's users know, as functions of a model: what they compute, on an offline model.

The main demo, activation patching, and the head detector, rebuilt call for call in their order; nothing here knows of this
package. Numbers come back by name; ``pictures`` are the pages that circuitsvis draws.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import circuitsvis as cv
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.head_detector import detect_head

from tl_vpd.adapters.versions import get_act_name

TEXT = "def run(self, value):\n    return self.run(value)\n"
CLEAN = ["    for name in self.names:\n        if name", "    if value is not None:\n        return value"]
CORRUPTED = ["    for item in self.items:\n        if item", "    if other is not None:\n        return other"]


def same_length(model: Any, one: str, other: str) -> tuple[Tensor, Tensor]:
    """Two prompts as tokens, cut to the shorter."""
    a, b = model.to_tokens(one), model.to_tokens(other)
    n = min(a.shape[1], b.shape[1], 6)
    return a[:, :n], b[:, :n]


def main_demo(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load, cache, look at attention, ablate a head, patch the residual stream, find induction heads, generate."""
    results: dict[str, Tensor] = {"loss": model(TEXT, return_type="loss")}
    tokens = model.to_tokens(TEXT)
    logits, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    pattern = cache["pattern", 0, "attn"]
    results |= {"logits": logits, "pattern": pattern, "resid_mid": cache["resid_mid", 1]}
    picture = cv.attention.attention_patterns(tokens=model.to_str_tokens(TEXT), attention=pattern)
    pictures = {"attention": re.sub(r"circuits-vis-[\w-]+", "", str(picture))}

    def ablate_head(value: Tensor, hook: Any) -> Tensor:
        value[:, :, 2, :] = 0.0
        return value

    hooks = [(get_act_name("v", 0), ablate_head)]
    results["ablated loss"] = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks)

    clean, corrupted = same_length(model, CLEAN[0], CORRUPTED[0])
    clean_logits, clean_cache = model.run_with_cache(clean)
    answer, wrong = clean_logits[0, -1].topk(2).indices

    def difference(logits: Tensor) -> Tensor:
        return logits[0, -1, answer] - logits[0, -1, wrong]

    def patch_position(resid: Tensor, hook: Any, position: int) -> Tensor:
        resid[:, position, :] = clean_cache[hook.name][:, position, :]
        return resid

    for layer in range(model.cfg.n_layers):
        for position in range(clean.shape[1]):
            hook = partial(patch_position, position=position)
            patched = model.run_with_hooks(corrupted, fwd_hooks=[(get_act_name("resid_pre", layer), hook)])
            results[f"patched {layer} {position}"] = difference(patched)

    half = torch.randint(20, 700, (4, 10), generator=torch.Generator().manual_seed(0))
    repeated = torch.cat([half, half], dim=1)
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, dtype=logits.dtype)

    def score_induction(pattern: Tensor, hook: Any) -> None:
        stripe = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - half.shape[1])
        scores[hook.layer(), :] = stripe.mean(dim=(0, 2))

    is_pattern = lambda name: name.endswith("pattern")  # noqa: E731
    model.run_with_hooks(repeated, return_type=None, fwd_hooks=[(is_pattern, score_induction)])
    results["induction scores"] = scores

    text = model.generate(tokens[:, :10], max_new_tokens=6, do_sample=False, verbose=False, return_type="tokens")
    results["generated"] = text
    with model.hooks(fwd_hooks=hooks):
        results["generated without the head"] = model.generate(
            tokens[:, :10], max_new_tokens=6, do_sample=False, verbose=False, return_type="tokens"
        )

    gradients: dict[str, Tensor] = {}

    def keep_gradient(grad: Tensor, hook: Any) -> None:
        gradients["gradient"] = grad.clone()

    model.add_hook(get_act_name("resid_post", 0), keep_gradient, dir="bwd")
    with torch.enable_grad():
        model(tokens, return_type="loss").backward()
    model.reset_hooks()
    model.zero_grad()
    return {**results, **gradients}, pictures


def patching_demo(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A metric between 0 (corrupted) and 1 (clean), and every sweep of ``transformer_lens.patching`` that the demo makes."""
    clean, corrupted = same_length(model, CLEAN[1], CORRUPTED[1])
    clean_logits, clean_cache = model.run_with_cache(clean)
    corrupted_logits, _ = model.run_with_cache(corrupted)
    answer, wrong = clean_logits[0, -1].topk(2).indices

    def difference(logits: Tensor) -> Tensor:
        return (logits[:, -1, answer] - logits[:, -1, wrong]).mean()

    low, high = difference(corrupted_logits), difference(clean_logits)

    def metric(logits: Tensor) -> Tensor:
        return (difference(logits) - low) / (high - low)

    sweeps = {
        "resid_pre": patching.get_act_patch_resid_pre,
        "attn_out": patching.get_act_patch_attn_out,
        "mlp_out": patching.get_act_patch_mlp_out,
        "every block": patching.get_act_patch_block_every,
        "heads": patching.get_act_patch_attn_head_out_all_pos,
        "heads by position": patching.get_act_patch_attn_head_out_by_pos,
        "every head": patching.get_act_patch_attn_head_all_pos_every,
        "patterns": patching.get_act_patch_attn_head_pattern_all_pos,
    }
    results = {name: sweep(model, corrupted, clean_cache, metric) for name, sweep in sweeps.items()}
    table = patching.generic_activation_patch(
        model,
        corrupted,
        clean_cache,
        metric,
        patch_setter=patching.layer_pos_patch_setter,
        activation_name="resid_mid",
        index_axis_names=("layer", "pos"),
    )
    return {**results, "metrics": torch.stack([low, high]), "by hand": table}, {}


def head_detector_demo(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Heads by what they should attend to: by name, by a custom pattern, a few heads alone, two measures, many prompts."""
    pattern = torch.tril(torch.ones(model.to_tokens(TEXT).shape[1], model.to_tokens(TEXT).shape[1]))
    pattern = pattern / pattern.sum(-1, keepdim=True)
    results = {
        "previous": detect_head(model, TEXT, "previous_token_head"),
        "duplicate": detect_head(model, TEXT, "duplicate_token_head", exclude_current_token=True),
        "induction": detect_head(model, TEXT, "induction_head", exclude_bos=True),
        "some": detect_head(model, TEXT, "previous_token_head", heads=[(0, 1), (1, 3)]),
        "measure": detect_head(model, TEXT, pattern.to(model.cfg.dtype), error_measure="abs"),
        "prompts": detect_head(model, [TEXT, CLEAN[0]], "induction_head"),
    }
    return results, {}


DEMOS = {"main demo": main_demo, "activation patching": patching_demo, "head detector": head_detector_demo}
