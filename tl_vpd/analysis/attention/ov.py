"""What heads read and write through W_OV, weighted by the data: do two heads move the same information?

With x̄ the centred inputs of W_V (one row per token), their covariance ``C = x̄ᵀ x̄ / N = Z̄ S̄² Z̄ᵀ`` and ``W_OV = W_V^h
W_O^h`` (rows are read, columns written; transposed against the paper's column convention):

    M_h = (Z̄ S̄)ᵀ W_OV          read  M_h M_hᵀ,   write  M_hᵀ M_h,   raw  W_OV        compared by Frobenius cosine

so *read* and *write* count directions by how much the data vary along them. The inner products need no ``d_model × d_model``
matrix per head; with A = W_V, B = W_O of the heads a and b they are traces of ``d_head × d_head`` matrices:

    raw    Σ (A_aᵀ A_b) ⊙ (B_a B_bᵀ)
    read   Σ (Pᵀ G_a P) ⊙ G_b,       P = A_aᵀ C A_b,   G_h = B_h B_hᵀ
    write  Σ (Dᵀ H_a D) ⊙ H_b,       D = B_a B_bᵀ,     H_h = A_hᵀ C A_h

The baselines are what unrelated heads score: for unweighted matrices ``d_head / (d_model + d_head + 1)`` (``random_overlap``),
for weighted ones the mean over random heads on the same data. Source: VPD paper, section on attention.

    >>> overlap = ov_overlap(vpd, model, tokens, 1)                                                       # doctest: +SKIP
    >>> overlap.read, overlap.random_read                                                                 # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.analysis.attention.layer import attention_site
from tl_vpd.checks import check_fields, choice, config_of, integer
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel
from tl_vpd.hooks.importances import causal_importances
from tl_vpd.losses.precision import at_least_float32
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent


@dataclass(frozen=True)
class OVConfig:
    """What ``ov_overlap`` counts, and its baselines.

    Attributes:
        threshold: with a key, tokens where its importance exceeds this count.
        draws: random heads for the weighted baselines, two at a time.
        seed: of the random heads.
    """

    threshold: float = 0.0
    draws: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, draws=1)


@dataclass(frozen=True)
class OVOverlap(Printed):
    """Frobenius cosines between the heads of a layer, and what unrelated heads score on the same data.

    Attributes:
        layer: the block's index.
        tokens: how many tokens the data were.
        raw: of W_OV itself (signed).
        read: of what the heads read, weighted by the data.
        write: of what the heads write, weighted by the data.
        random_read: the weighted baseline of ``read``.
        random_write: the weighted baseline of ``write``.
    """

    layer: int
    tokens: int
    raw: Float[Tensor, "head head"]
    read: Float[Tensor, "head head"]
    write: Float[Tensor, "head head"]
    random_read: float
    random_write: float

    def to_pandas(self) -> pd.DataFrame:
        """One row per pair of heads: head, other, raw, read, write, random_read, random_write."""
        n = len(self.raw)
        i, j = torch.triu_indices(n, n, offset=1).tolist()
        return pd.DataFrame(
            {
                "head": i,
                "other": j,
                "raw": self.raw[i, j].tolist(),
                "read": self.read[i, j].tolist(),
                "write": self.write[i, j].tolist(),
                "random_read": self.random_read,
                "random_write": self.random_write,
            }
        )

    def top(self, k: int = 10, *, by: str = "read") -> pd.DataFrame:
        """The ``k`` pairs of heads of the largest ``raw``, ``read`` or ``write`` overlap."""
        k, by = integer("k", k, minimum=0), choice("by", by, ("raw", "read", "write"))
        return self.to_pandas().nlargest(k, by).reset_index(drop=True)


@torch.no_grad()
def ov_overlap(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    layer: int,
    *,
    key: str | Subcomponent | None = None,
    config: OVConfig | None = None,
    attention_mask: Tensor | None = None,
) -> OVOverlap:
    """Overlap of what the heads of a layer read and write on prompts.

    Args:
        decomposition: with W_V of the block.
        model: the target.
        prompts: a string, strings, or tokens ``[batch, pos]``.
        layer: the block's index.
        key: a subcomponent of W_K: only tokens where it is important count (None: all real tokens).
        config: the importance that counts, and the baselines (None: the defaults).
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Raises:
        KeyError: the block has no W_V and W_O, or a site is not decomposed.
        IndexError: there is no such subcomponent.
        ValueError: the prompts do not fit, fewer than two tokens count, the key is of another site, the threshold is given
            without a key, or the model has other weights.

    Warns (RuntimeWarning) of heads that move nothing, where overlaps are not defined (NaN).
    """
    config = config_of(OVConfig, config)
    if key is None and config.threshold:
        raise ValueError(
            f"threshold={config.threshold} without key=: give the subcomponent of W_K whose importance counts."
        )
    site = attention_site(decomposition, layer, "W_V")
    W_V, W_O = ov_factors(adapt(model), layer)
    with MaskedModel(decomposition, model) as masked_model:
        tokens, token_mask, inputs = masked_model.clean_prompts(prompts, attention_mask)
    counted = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device) if token_mask is None else token_mask
    if key is not None:
        address = decomposition.subcomponent(key)
        if address.site != f"blocks.{layer}.attn.W_K":
            raise ValueError(
                f"key={str(address)!r} is not of blocks.{layer}.attn.W_K, whose importances choose the tokens."
            )
        g = causal_importances(decomposition, model, tokens, attention_mask=attention_mask)
        counted = counted & (g[address.site][..., address.index] > config.threshold)
    x = at_least_float32(inputs[site.name])[counted]
    if len(x) < 2:
        raise ValueError(f"{len(x)} real tokens remain: at least two are needed to measure how the data vary.")
    covariance, d_head = covariance_of(x), W_O.shape[1]
    raw, read, write = overlaps(W_V, W_O, covariance)
    undefined = ~torch.stack([raw, read, write]).isfinite().all(0).diagonal()
    if bool(undefined.any()):
        warnings.warn(
            f"Heads {undefined.nonzero().flatten().tolist()} of block {layer} move nothing on these tokens: overlaps are NaN.",
            RuntimeWarning,
            stacklevel=3,
        )
    random_read, random_write = random_overlaps(covariance, W_O.shape[2], d_head, config.draws, config.seed)
    return OVOverlap(int(layer), len(x), raw, read, write, random_read, random_write)


def ov_factors(
    adapter: Adapter, layer: int
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head d_out"]]:
    """``W_V^h`` and ``W_O^h`` of every query head, in float32 or better; raises KeyError where the block has none."""
    v, o = (adapter.sites.get(f"blocks.{layer}.attn.{w}") for w in ("W_V", "W_O"))
    if v is None or o is None or not v.n_heads or not o.n_heads:
        raise KeyError(f"Block {layer} has no W_V and W_O.")
    W_V = at_least_float32(adapter.weight(v.name)).unflatten(1, (v.n_heads, -1)).transpose(0, 1)
    W_O = at_least_float32(adapter.weight(o.name)).unflatten(0, (o.n_heads, -1))
    return W_V.repeat_interleave(o.n_heads // v.n_heads, dim=0), W_O


def covariance_of(x: Float[Tensor, "token d_model"]) -> Float[Tensor, "d_model d_model"]:
    """The covariance of the data."""
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def overlaps(
    W_V: Float[Tensor, "head d_model d_head"],
    W_O: Float[Tensor, "head d_head d_out"],
    covariance: Float[Tensor, "d_model d_model"],
) -> tuple[Float[Tensor, "head head"], Float[Tensor, "head head"], Float[Tensor, "head head"]]:
    """The raw, read and write Frobenius cosines of every two heads."""
    weighed = covariance @ W_V
    G, H = W_O @ W_O.mT, W_V.mT @ weighed
    rows = []
    for a in range(len(W_V)):  # one head with all, so that nothing of head² × d_head² is made
        P, D = weighed[a].T @ W_V, W_O[a] @ W_O.mT
        raw = (W_V[a].T @ W_V) * D
        rows.append(torch.stack([raw.sum((-2, -1)), _product(P, G[a], G), _product(D, H[a], H)]))
    products = torch.stack(rows, dim=1)  # [3, head, head]
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    raw, read, write = products / (norms[:, :, None] * norms[:, None, :])
    return raw, read, write


def _product(
    between: Float[Tensor, "*batch d_head d_head"],
    left: Float[Tensor, "*#batch d_head d_head"],
    right: Float[Tensor, "*#batch d_head d_head"],
) -> Float[Tensor, "*batch"]:
    """``Σ (betweenᵀ left between) ⊙ right``."""
    return (between.mT @ left @ between * right).sum((-2, -1))


def random_overlap(d_model: int, d_head: int) -> float:
    """The Frobenius cosine of ``B Bᵀ`` of unrelated Gaussian ``B [d_model, d_head]``: d_head / (d_model + d_head + 1)."""
    d_model, d_head = integer("d_model", d_model, minimum=1), integer("d_head", d_head, minimum=1)
    return d_head / (d_model + d_head + 1)


def random_overlaps(
    covariance: Float[Tensor, "d_model d_model"], d_out: int, d_head: int, draws: int, seed: int
) -> tuple[float, float]:
    """Mean read and write overlap of pairs of unrelated heads: the compared side Gaussian, the other orthonormal.

    With the identity for the covariance both are near ``random_overlap``.
    """
    generator = torch.Generator().manual_seed(seed)
    d_model, identity = len(covariance), torch.eye(d_head).to(covariance)

    def gaussian(d: int) -> Float[Tensor, "2 d d_head"]:
        return torch.randn(2, d, d_head, generator=generator, dtype=torch.float64).to(covariance)

    # read: M Mᵀ of M = (Z̄ S̄)ᵀ B, whatever orthonormal rows follow B
    read = [_cosine(B.mT @ (covariance @ B[:, None]), identity) for B in (gaussian(d_model) for _ in range(draws))]
    # write: B H Bᵀ of Gaussian B, with H what orthonormal columns read of the data
    bases = [torch.linalg.qr(gaussian(d_model))[0] for _ in range(draws)]
    H = [Q.mT @ covariance @ Q for Q in bases]
    write = [_cosine(B.mT @ B[:, None], h) for B, h in zip((gaussian(d_out) for _ in range(draws)), H, strict=True)]
    return float(torch.stack(read).mean()), float(torch.stack(write).mean())


def _cosine(grams: Float[Tensor, "2 2 d_head d_head"], middle: Float[Tensor, "*2 d_head d_head"]) -> Float[Tensor, ""]:
    """The Frobenius cosine of ``B₀ H₀ B₀ᵀ`` and ``B₁ H₁ B₁ᵀ`` from ``grams[j, i] = B_iᵀ B_j`` and H."""
    H = middle.expand(2, *middle.shape[-2:])
    pairs = [(0, 1), (0, 0), (1, 1)]
    inner, first, second = (_product(grams[j, i], H[i], H[j]) for i, j in pairs)
    return inner / (first * second).sqrt()
