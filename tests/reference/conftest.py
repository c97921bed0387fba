"""The reference model, decomposition and inputs, renamed from the independent implementation's modules to our sites.

``data/`` holds what an independent PyTorch implementation of VPD computed in float32 for a small Llama-like model
(``outputs_f64`` in float64). There Γ's inputs and outputs are concatenated over sites in alphabetical order of the module
names; here in the order of the forward pass, so rows and columns of its first and last projection are permuted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_vpd import Decomposition
from tl_vpd.adapters import adapt
from tl_vpd.components.fingerprint import Fingerprint
from tl_vpd.importance import GammaConfig
from tl_vpd.site import ConcatenatedAxis

DATA = Path(__file__).parent / "data"
MODULES = {
    f"h.{layer}.{module}": f"blocks.{layer}.{weight}"
    for layer in range(2)
    for module, weight in {
        "attn.q_proj": "attn.W_Q",
        "attn.k_proj": "attn.W_K",
        "attn.v_proj": "attn.W_V",
        "attn.o_proj": "attn.W_O",
        "mlp.c_fc": "mlp.W_in",
        "mlp.down_proj": "mlp.W_out",
    }.items()
}
"""Their module -> our site, in the order of the forward pass."""


def read(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def by_site(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """``{prefix}/{module}`` tensors under our names."""
    return {site: tensors[f"{prefix}/{module}"] for module, site in MODULES.items()}


def pack(tensors: dict[str, Tensor], prefix: str) -> Tensor:
    """``[..., C]`` tensors on our concatenated axis."""
    return torch.cat([tensors[f"{prefix}/{module}"] for module in MODULES], dim=-1)


def pack_sources(tensors: dict[str, Tensor], prefix: str) -> Tensor:
    """``[..., C + 1]`` sources as our concatenated source: all subcomponents, then all Δs."""
    tensors_of_prefix = by_site(tensors, prefix).values()
    return torch.cat([*(s[..., :-1] for s in tensors_of_prefix), *(s[..., -1:] for s in tensors_of_prefix)], dim=-1)


def gamma_names(d_in: dict[str, int], counts: dict[str, int]) -> dict[str, tuple[str, Tensor | None, int]]:
    """Our parameter of Γ -> (their key, permutation, dimension it permutes)."""

    def permutation(width: dict[str, int]) -> Tensor:
        start, where = 0, {}
        for module in sorted(MODULES):
            where[module] = torch.arange(start, start + width[MODULES[module]])
            start += width[MODULES[module]]
        return torch.cat([where[module] for module in MODULES])

    names: dict[str, tuple[str, Tensor | None, int]] = {
        "embed.weight": ("ci/proj_in.weight", permutation(d_in), 1),
        "embed.bias": ("ci/proj_in.bias", None, 0),
        "unembed.weight": ("ci/proj_out.weight", permutation(counts), 0),
        "unembed.bias": ("ci/proj_out.bias", permutation(counts), 0),
    }
    for i in range(2):
        for letter in "qkvo":
            names[f"blocks.{i}.{letter}.weight"] = (f"ci/blocks.{i}.attn.{letter}_proj.weight", None, 0)
        for kind in ("weight", "bias"):
            names[f"blocks.{i}.mlp_in.{kind}"] = (f"ci/blocks.{i}.mlp.0.{kind}", None, 0)
            names[f"blocks.{i}.mlp_out.{kind}"] = (f"ci/blocks.{i}.mlp.2.{kind}", None, 0)
    return names


@dataclass(frozen=True)
class Reference:
    model: HookedTransformer
    decomposition: Decomposition
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    scalars: dict

    @property
    def site_axis(self) -> ConcatenatedAxis:
        return self.decomposition.site_axis

    @property
    def tokens(self) -> Tensor:
        return self.inputs["tokens"]

    def parameters(self, stored: dict[str, Tensor]) -> dict[str, tuple[torch.nn.Parameter, Tensor]]:
        """Every parameter of ours beside what ``stored`` holds for it (parameters that it lacks are left out)."""
        pairs = {}
        for module, site in MODULES.items():
            for letter, parts in (("V", self.decomposition.V), ("U", self.decomposition.U)):
                if f"{letter}/{module}" in stored:
                    pairs[f"{letter}/{site}"] = (parts[site], stored[f"{letter}/{module}"])
        d_in = {s.name: s.d_in for s in self.decomposition.sites.values()}
        parameters = dict(self.decomposition.gamma.named_parameters())
        for name, (key, order, dim) in gamma_names(d_in, self.decomposition.counts).items():
            if key in stored:
                theirs = stored[key] if order is None else stored[key].index_select(dim, order)
                pairs[f"gamma/{name}"] = (parameters[name], theirs)
        return pairs


def hooked_model() -> HookedTransformer:
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=32, d_mlp=96, n_heads=4, d_head=8, d_vocab=64, n_ctx=12, act_fn="gelu_new",
        normalization_type="RMS", final_rms=True, eps=1e-6, positional_embedding_type="rotary", rotary_dim=8,
        rotary_base=10000, rotary_adjacent_pairs=False, device="cpu", seed=0,
    )  # fmt: skip
    model, stored = HookedTransformer(cfg), read("target")
    state = {k: torch.zeros_like(v) if ".b_" in k else v for k, v in model.state_dict().items()}
    state |= {"embed.W_E": stored["wte.weight"], "unembed.W_U": stored["lm_head.weight"].T}
    state |= {"unembed.b_U": torch.zeros(64), "ln_final.w": stored["ln_f.weight"]}
    for i in range(2):
        for letter in "QKV":
            W = stored[f"h.{i}.attn.{letter.lower()}_proj.weight"]
            state[f"blocks.{i}.attn.W_{letter}"] = rearrange(W, "(h d) m -> h m d", h=4)
        state[f"blocks.{i}.attn.W_O"] = rearrange(stored[f"h.{i}.attn.o_proj.weight"], "m (h d) -> h d m", h=4)
        state[f"blocks.{i}.mlp.W_in"] = stored[f"h.{i}.mlp.c_fc.weight"].T
        state[f"blocks.{i}.mlp.W_out"] = stored[f"h.{i}.mlp.down_proj.weight"].T
        state[f"blocks.{i}.ln1.w"] = stored[f"h.{i}.rms_1.weight"]
        state[f"blocks.{i}.ln2.w"] = stored[f"h.{i}.rms_2.weight"]
    model.load_state_dict(state)
    return model


@pytest.fixture
def reference() -> Reference:
    model, stored = hooked_model(), read("params")
    sites = adapt(model).sites
    assert list(sites) == list(MODULES.values())
    counts = {site: stored[f"V/{module}"].shape[1] for module, site in MODULES.items()}
    decomposition = Decomposition(
        list(sites.values()),
        counts,
        GammaConfig(d_ci=48, n_blocks=2, n_heads=4, d_mlp=96, causal=False),
        fingerprints={name: Fingerprint.of(adapt(model).weight(name)) for name in sites},
    )
    scalars = json.loads((DATA / "scalars.json").read_text())
    result = Reference(model, decomposition, read("inputs"), read("outputs"), scalars)
    with torch.no_grad():
        for parameter, value in result.parameters(stored).values():
            parameter.copy_(value)
    return result
