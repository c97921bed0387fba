"""A pre-norm rotary transformer as plain functions of a HookedTransformer's weights: no hooks, no modules, nothing of ours."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.tiny import matrix_of

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}


class FunctionalTarget:
    """``target(tokens, real, site)``: the logits of the model; decomposed products are computed as ``site(name, x)``.

    Args:
        model: a HookedTransformer with rotary positions and LayerNorm or RMSNorm.
        sites: names of the decomposed weights (None: all).
    """

    def __init__(self, model, sites=None):
        self.cfg, self.sites = model.cfg, sites
        self.parameters = {name: p.detach() for name, p in model.named_parameters()}
        self.W, self.b = {}, {}
        self.streams: dict[str, torch.Tensor] = {}  # what entered each block in the last call
        for layer in range(model.cfg.n_layers):
            for weight in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_gate", "mlp.W_in", "mlp.W_out"):
                name = f"blocks.{layer}.{weight}"
                if "gate" in name and not model.cfg.gated_mlp:
                    continue
                self.W[name] = matrix_of(model, name)
                inside = model.cfg.gated_mlp and ("gate" in name or "W_in" in name)  # the bias is added after the gate
                self.b[name] = self.W[name].new_zeros(self.W[name].shape[1]) if inside else self._bias(name).flatten()

    def clean(self, name, x):
        """A site of the target itself."""
        return x @ self.W[name] + self.b[name]

    def __call__(self, tokens, real, site):
        def product(name, x):
            return site(name, x) if self.sites is None or name in self.sites else self.clean(name, x)

        cfg, x = self.cfg, self.parameters["embed.W_E"][tokens]
        for layer in range(cfg.n_layers):
            block = f"blocks.{layer}"
            self.streams[f"{block}.hook_resid_pre"] = x.detach()
            h = self._norm(x, f"{block}.ln1")
            q, k, v = (self._heads(product(f"{block}.attn.{weight}", h)) for weight in ("W_Q", "W_K", "W_V"))
            x = x + product(f"{block}.attn.W_O", self._attention(q, k, v, real))
            h = self._norm(x, f"{block}.ln2")
            if cfg.gated_mlp:
                gate = ACTIVATIONS[cfg.act_fn](product(f"{block}.mlp.W_gate", h))
                inside = gate * product(f"{block}.mlp.W_in", h) + self.parameters[f"{block}.mlp.b_in"]
            else:
                inside = ACTIVATIONS[cfg.act_fn](product(f"{block}.mlp.W_in", h))
            x = x + product(f"{block}.mlp.W_out", inside)
        return self._norm(x, "ln_final") @ self.parameters["unembed.W_U"] + self.parameters["unembed.b_U"]

    def _bias(self, name):
        owner, weight = name.rsplit(".", 1)
        bias = weight.replace("W_", "b_")
        return self.parameters.get(f"{owner}._{bias}", self.parameters.get(f"{owner}.{bias}"))

    def _norm(self, x, name):
        rms = self.cfg.normalization_type == "RMS"
        x = x if rms else x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.cfg.eps).sqrt() * self.parameters[f"{name}.w"]
        return x if rms else x + self.parameters[f"{name}.b"]

    def _heads(self, x):
        return x.unflatten(-1, (-1, self.cfg.d_head)).transpose(1, 2)  # [batch head pos d_head]

    def _attention(self, q, k, v, real):
        """Causal attention that does not look at padding; positions count real tokens."""
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        q, k = self._rotated(q, positions), self._rotated(k, positions)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        pos = q.shape[2]
        visible = torch.ones(pos, pos, dtype=torch.bool).tril() & real[:, None, None, :]
        scores = (q @ k.transpose(-1, -2) / math.sqrt(self.cfg.d_head)).masked_fill(~visible, torch.finfo(q.dtype).min)
        pattern = scores.softmax(-1) * visible  # a padded position in front sees nothing
        return (pattern @ v).transpose(1, 2).flatten(2)

    def _rotated(self, x, positions):
        half = self.cfg.rotary_dim // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
        angles = positions[:, None, :, None] * frequencies
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
