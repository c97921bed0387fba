"""Names in the authors' files: modules, keys of every variant, and the order in which their Γ reads and writes.

A module ``h.1.attn.q_proj`` is the site ``blocks.1.attn.W_Q``. Γ's inputs are concatenated, and its outputs split, in the
lexicographic order of the modules' names, in which ``h.10`` comes before ``h.2``.

    >>> site_of("h.1.mlp.c_fc"), module_of("blocks.1.mlp.W_in")
    ('blocks.1.mlp.W_in', 'h.1.mlp.c_fc')
    >>> canonical("patched_model.h.0.attn.q_proj.original.weight")
    'target_model.h.0.attn.q_proj.weight'
"""

from __future__ import annotations

import re

WEIGHTS = {
    "attn.q_proj": "attn.W_Q",
    "attn.k_proj": "attn.W_K",
    "attn.v_proj": "attn.W_V",
    "attn.o_proj": "attn.W_O",
    "mlp.c_fc": "mlp.W_in",
    "mlp.down_proj": "mlp.W_out",
}
"""A linear layer of the authors' block -> TransformerLens's name of its weight."""

OTHERS = {"rms_1": "ln1.w", "rms_2": "ln2.w"}
"""A norm of the authors' block -> TransformerLens's name."""

TARGET, COMPONENTS = "target_model.", "_components."
GLOBAL, LAYERWISE = "ci_fn._global_ci_fn.", "ci_fn._ci_fns."

_MODULE = re.compile(r"h\.(\d+)\.((?:attn|mlp)\.\w+)")
_SITE = re.compile(r"blocks\.(\d+)\.((?:attn|mlp)\.\w+)")
_FUSED = re.compile(r"(h\.\d+\.(?:attn|mlp)\.\w+)\.(?:components\.)?([UV])")


def site_of(module: str) -> str | None:
    """The site of a module (None: the architecture has no such linear layer)."""
    match = _MODULE.fullmatch(module)
    return f"blocks.{match[1]}.{WEIGHTS[match[2]]}" if match and match[2] in WEIGHTS else None


def module_of(site: str) -> str | None:
    """The module of a site (None: the architecture has no such weight)."""
    match, modules = _SITE.fullmatch(site), {weight: module for module, weight in WEIGHTS.items()}
    return f"h.{match[1]}.{modules[match[2]]}" if match and match[2] in modules else None


def target_keys(n_layers: int) -> dict[str, str]:
    """Keys of the target's tensors, without prefix -> names of ``adapters.arcee``; ``lm_head`` is the embedding again."""
    keys = {"wte.weight": "embed.W_E", "ln_f.weight": "ln_final.w"}
    for i in range(n_layers):
        keys |= {f"h.{i}.{norm}.weight": f"blocks.{i}.{name}" for norm, name in OTHERS.items()}
        keys |= {f"h.{i}.{module}.weight": f"blocks.{i}.{weight}" for module, weight in WEIGHTS.items()}
    return keys


def canonical(key: str) -> str:
    """A key of any variant as the newer code writes it, with the module's dots."""
    key = key.replace("_gates.", "_ci_fns.")
    if key.startswith("patched_model."):
        key = TARGET + key.removeprefix("patched_model.")
    if key.startswith(TARGET):
        path = key.removeprefix(TARGET)
        fused = _FUSED.fullmatch(path)
        if fused:
            return f"{COMPONENTS}{fused[1]}.{fused[2]}"
        for suffix in (".original.weight", ".linear.weight"):
            if path.endswith(suffix):
                return f"{TARGET}{path.removesuffix(suffix)}.weight"
        return key
    if key.startswith("_ci_fns."):
        key = f"ci_fn.{key}"
    for prefix in (COMPONENTS, LAYERWISE):
        if key.startswith(prefix):
            module, dot, rest = key.removeprefix(prefix).partition(".")
            return f"{prefix}{module.replace('-', '.')}{dot}{rest}"
    return key
