"""What a masked model must compute, found without the package's adapters, layouts and taps.

Weights are read and written where the model itself keeps them. Masks that differ by position are applied in a plain module's
forward, site by site, with Δ formed:

    y = ((x @ V) ⊙ m) @ U + m_Δ · (x @ Δ) + b,      Δ = W − V @ U
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.matrix.families import Location
from tests.tiny import matrix_of, weight_of
from tl_vpd import Decomposition
from tl_vpd.masking import Masks

SHORT = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o", "W_in": "in", "W_gate": "gate", "W_out": "out"}


def logits_of(output: Any) -> Tensor:
    """The logits in what a model gives back."""
    return output if isinstance(output, Tensor) else output.logits


# -- weights -----------------------------------------------------------------------------------------------------------


def oriented(module: nn.Module) -> Tensor:
    """A product's weight as ``[d_in, d_out]``, a view of the parameter."""
    return module.weight if type(module).__name__ == "Conv1D" else module.weight.T


def _in_bridge(bridge: nn.Module, site: str) -> tuple[nn.Module, str, nn.Module]:
    owner_name, weight = site.rsplit(".", 1)
    owner = bridge.get_submodule(owner_name)
    return owner, SHORT[weight], owner._modules[SHORT[weight]].original_component


def _processed(owner: nn.Module, short: str) -> Tensor | None:
    """The copy of a processed weight that 3.x's gated MLPs compute with."""
    return getattr(owner, f"_processed_W_{short}", None) if getattr(owner, "_use_processed_weights", False) else None


def read(model: nn.Module, site: str) -> Tensor:
    """A site's weight in a HookedTransformer or a bridge."""
    if not hasattr(model, "original_model"):
        return matrix_of(model, site).clone()
    owner, short, product = _in_bridge(model, site)
    processed = _processed(owner, short)
    return oriented(product).detach().clone() if processed is None else processed.detach().T.clone()


@torch.no_grad()
def write(model: nn.Module, site: str, W: Tensor) -> None:
    """Writes a site's weight into a HookedTransformer or a bridge."""
    if hasattr(model, "original_model"):
        owner, short, product = _in_bridge(model, site)
        oriented(product).copy_(W)
        if (processed := _processed(owner, short)) is not None:
            processed.copy_(W.T)
        return
    stored = weight_of(model, site)
    axis = {"W_Q": 1, "W_K": 1, "W_V": 1, "W_O": 0}.get(site.rpartition(".")[2])
    stored.copy_(W if axis is None else torch.stack(W.chunk(stored.shape[0], dim=axis)))


def read_source(source: nn.Module, at: Location) -> Tensor:
    """A site's weight in a plain module."""
    W = oriented(source.get_submodule(at.path)).detach()
    return W if at.columns is None else W[:, list(at.columns)]


@torch.no_grad()
def write_source(source: nn.Module, at: Location, W: Tensor) -> None:
    """Writes a site's weight into a plain module."""
    weight = oriented(source.get_submodule(at.path))
    weight[:, slice(None) if at.columns is None else list(at.columns)] = W.to(weight.dtype)


@torch.no_grad()
def write_processed(source: nn.Module, where: Mapping[str, Location], bridge: Any) -> None:
    """Gives a transformers model the processed weights of a bridge: sites by Location, the others by name."""
    source.lm_head.weight = nn.Parameter(
        source.lm_head.weight.detach().clone()
    )  # processing unties it from the embedding
    tensors = {**dict(bridge.original_model.named_parameters()), **dict(bridge.original_model.named_buffers())}
    tensors = {
        name.replace("._original_component", "").replace(".original_component", ""): p for name, p in tensors.items()
    }
    if "lm_head.bias" in tensors:
        source.lm_head.bias = nn.Parameter(tensors["lm_head.bias"].detach().clone())
    for name, p in source.named_parameters():
        if name in tensors and tensors[name].shape == p.shape:
            p.copy_(tensors[name])
    for site, at in where.items():
        write_source(source, at, read(bridge, site))
        owner, short, product = _in_bridge(bridge, site)
        bias = getattr(owner, f"_processed_b_{short}", None) if _processed(owner, short) is not None else product.bias
        module = source.get_submodule(at.path)
        if bias is None:
            continue
        if module.bias is None:
            width = oriented(module).shape[1]
            module.bias = nn.Parameter(torch.zeros(width, dtype=bias.dtype))
        module.bias[slice(None) if at.columns is None else list(at.columns)] = bias.flatten()


def edit(W: Tensor, V: Tensor, U: Tensor, mask: Tensor, delta: float) -> Tensor:
    """``V diag(m) U + m_Δ (W − V U)``, in float64 and W's dtype."""
    w, v, u = W.double(), V.detach().double(), U.detach().double()
    return ((v * mask.double()) @ u + delta * (w - v @ u)).to(W.dtype)


# -- forwards ----------------------------------------------------------------------------------------------------------


def product(x: Tensor, W: Tensor, b: Tensor | float, V: Tensor, U: Tensor, mask: Tensor, delta: Tensor) -> Tensor:
    """The masked output of one site with Δ formed."""
    return ((x @ V) * mask) @ U + delta[..., None] * (x @ (W - V @ U)) + b


@contextmanager
def masked_source(source: nn.Module, where: Mapping[str, Location], vpd: Decomposition, masks: Masks) -> Iterator[None]:
    """Inside, a plain module computes every site under masks that differ by position."""
    at: dict[str, list[str]] = defaultdict(list)
    for site in vpd.sites:
        at[where[site].path].append(site)

    def hook(module: nn.Module, arguments: Any, y: Tensor) -> Tensor:
        new = y.clone()
        for site in at[paths[module]]:
            site_mask, columns = masks[site], where[site].columns
            index = slice(None) if columns is None else list(columns)
            x = arguments[0].reshape(*site_mask.mask.shape[:-1], -1)
            b = 0.0 if module.bias is None else module.bias[index]
            V, U = vpd.V[site].detach().to(x), vpd.U[site].detach().to(x)
            out = product(x, oriented(module)[:, index], b, V, U, site_mask.mask, site_mask.delta)
            new[..., index] = out.reshape(*y.shape[:-1], -1)
        return new

    paths = {source.get_submodule(path): path for path in at}
    handles = [module.register_forward_hook(hook) for module in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hand_written(model: Any, tokens: Tensor, vpd: Decomposition, masks: Masks) -> Tensor:
    """A HookedTransformer of standard positions, LayerNorm or none, GELU or SoLU, MLPs or none, masked by position."""
    cfg = model.cfg

    def norm(x: Tensor, ln: nn.Module) -> Tensor:
        if cfg.normalization_type is None:
            return x
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * ln.w + ln.b

    def linear(x: Tensor, site: str, bias: Tensor) -> Tensor:
        site_mask, V, U = masks[site], vpd.V[site].detach().to(x), vpd.U[site].detach().to(x)
        return product(x, matrix_of(model, site), bias.flatten(), V, U, site_mask.mask, site_mask.delta)

    batch, pos = tokens.shape
    x = model.embed.W_E[tokens] + model.pos_embed.W_pos[:pos]
    for i, block in enumerate(model.blocks):
        h, a = norm(x, getattr(block, "ln1", None)), block.attn
        heads = [
            linear(h, f"blocks.{i}.attn.W_{n}", b).view(batch, pos, cfg.n_heads, -1).transpose(1, 2)
            for n, b in zip("QKV", (a.b_Q, a.b_K, a.b_V), strict=True)
        ]
        scores = heads[0] @ heads[1].transpose(2, 3) / math.sqrt(cfg.d_head)
        scores = scores.masked_fill(torch.ones(pos, pos).triu(1).bool(), -math.inf)
        z = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
        x = x + linear(z, f"blocks.{i}.attn.W_O", a.b_O)
        if cfg.attn_only:
            continue
        h = linear(norm(x, getattr(block, "ln2", None)), f"blocks.{i}.mlp.W_in", block.mlp.b_in)
        if cfg.act_fn == "solu_ln":
            h = norm(h * h.softmax(-1), block.mlp.ln)
        else:
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"blocks.{i}.mlp.W_out", block.mlp.b_out)
    return norm(x, getattr(model, "ln_final", None)) @ model.unembed.W_U + model.unembed.b_U


# -- precision ---------------------------------------------------------------------------------------------------------


class _Narrowing(TorchDispatchMode):
    """Notes whether anything is turned from float64 into a smaller floating dtype."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.dtype != torch.float64 and out.ndim > 1:
            self.found |= any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        return out


@torch.no_grad()
def in_float64_throughout(model: Any, tokens: Tensor) -> bool:
    """Whether a model of float64 weights computes in nothing smaller (libraries pin some norms and softmaxes to float32)."""
    with _Narrowing() as recorded:
        model(tokens)
    return not recorded.found
