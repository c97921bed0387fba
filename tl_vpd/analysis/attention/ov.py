"""What heads read and write through W_OV, weighed by the data: do two heads move the same information?

With x̄ the centred inputs of W_V (one row a token), ``C = x̄ᵀ x̄ / N = Z̄ S̄² Z̄ᵀ`` and ``W_OV = W_V^h W_O^h`` (rows are read, columns
written; transposed against the paper's column convention):

    M_h = (Z̄ S̄)ᵀ W_OV          read  M_h M_hᵀ,   write  M_hᵀ M_h,   raw  W_OV        compared by Frobenius cosine

so *read* and *write* count directions by how much the data vary along them. The baselines are what unrelated heads score: for
unweighted matrices ``d_head / (d_model + d_head + 1)`` (``random_overlap``), for weighted ones the mean over random heads on the
same data. Source: the VPD paper, section on attention.

    >>> overlap = ov_overlap(vpd, model, tokens, 1)                                                       # doctest: +SKIP
    >>> overlap.read, overlap.random_read                                                                 # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.analysis.attention.layer import attention_site
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.hooks.importances import causal_importances
from tl_vpd.site import Subcomponent

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition


def random_overlap(d_model: int, d_head: int) -> float:
    """The Frobenius cosine of ``B Bᵀ`` of unrelated Gaussian ``B [d_model, d_head]``: d_head / (d_model + d_head + 1)."""
    return d_head / (d_model + d_head + 1)


def frobenius_cosine(a: Float[Tensor, "*#batch r c"], b: Float[Tensor, "*#batch r c"]) -> Float[Tensor, "*batch"]:
    """``⟨A, B⟩ / (‖A‖ ‖B‖)``."""
    return (a * b).sum((-2, -1)) / (a.norm(dim=(-2, -1)) * b.norm(dim=(-2, -1)))


def between_heads(matrices: Float[Tensor, "head r c"]) -> Float[Tensor, "head head"]:
    """The Frobenius cosine of every two heads' matrices."""
    return frobenius_cosine(matrices[:, None], matrices[None])


def read_and_write(
    root: Float[Tensor, "d_model rank"], W: Float[Tensor, "head d_model d_out"]
) -> tuple[Float[Tensor, "head rank rank"], Float[Tensor, "head d_out d_out"]]:
    """``M Mᵀ`` and ``Mᵀ M`` of every head, with ``M = rootᵀ W`` and ``root = Z̄ S̄`` of the data (the identity: unweighted)."""
    M = root.T @ W
    return M @ M.mT, M.mT @ M


def root_of(x: Float[Tensor, "token d_model"]) -> Float[Tensor, "d_model d_model"]:
    """``Z̄ S̄ / √N``, a root of the covariance of the centred data."""
    _, s, Zt = torch.linalg.svd((x - x.mean(0)) / len(x) ** 0.5, full_matrices=False)
    root = Zt.T * s
    return torch.nn.functional.pad(root, (0, x.shape[1] - root.shape[1]))


@dataclass(frozen=True)
class OVOverlap:
    """Frobenius cosines between the heads of a layer, and what unrelated heads score on the same data.

    ``raw`` compares W_OV itself (signed); ``read`` and ``write`` what it reads and writes, weighed by the data.
    ``random_unweighted`` is the baseline for read and write matrices without weights. ``tokens``: how many the data were.
    """

    layer: int
    tokens: int
    raw: Float[Tensor, "head head"]
    read: Float[Tensor, "head head"]
    write: Float[Tensor, "head head"]
    random_read: float
    random_write: float
    random_unweighted: float

    def to_pandas(self) -> pd.DataFrame:
        """One row a pair of heads: head, other, raw, read, write, random_read, random_write."""
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
        return self.to_pandas().nlargest(k, by).reset_index(drop=True)


def ov_matrices(adapter: Adapter, layer: int) -> Float[Tensor, "head d_model d_model"]:
    """``W_V^h W_O^h`` of every query head, in float32 or better.

    Raises:
        KeyError: the block has no W_V and W_O.
    """
    v, o = (adapter.sites.get(f"blocks.{layer}.attn.{w}") for w in ("W_V", "W_O"))
    if v is None or o is None or not v.n_heads or not o.n_heads:
        raise KeyError(f"Block {layer} has no W_V and W_O.")
    W_V = _precise(adapter.weight(v.name)).unflatten(1, (v.n_heads, -1)).transpose(0, 1)
    W_O = _precise(adapter.weight(o.name)).unflatten(0, (o.n_heads, -1))
    return W_V.repeat_interleave(o.n_heads // v.n_heads, dim=0) @ W_O


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def ov_overlap(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    layer: int,
    *,
    key: str | Subcomponent | None = None,
    above: float = 0.0,
    draws: int = 100,
    seed: int = 0,
    attention_mask: Tensor | None = None,
) -> OVOverlap:
    """Overlap of what the heads of a layer read and write on prompts.

    Args:
        key: a subcomponent of W_K: only tokens where its importance exceeds ``above`` count (None: all real ones).
        draws: random heads for the weighted baselines, two at a time. seed: of these.

    Raises:
        KeyError, IndexError, ValueError: a block, subcomponent or prompt does not exist; fewer than two tokens count.
    """
    adapter = adapt(model)
    W = ov_matrices(adapter, layer)
    site = attention_site(decomposition, layer, "W_V")
    with MaskedModel(decomposition, model) as masked_model:
        tokens, token_mask, inputs = masked_model.clean_prompts(prompts, attention_mask)
    counted = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device) if token_mask is None else token_mask
    if key is not None:
        address = decomposition.subcomponent(key)
        g = causal_importances(decomposition, model, tokens, attention_mask=attention_mask)
        counted = counted & (g[address.site][..., address.index] > above)
    x = _precise(inputs[site.name])[counted]
    if len(x) < 2:
        raise ValueError(f"{len(x)} tokens count: at least two are needed to tell how the data vary.")
    root = root_of(x)
    read, write = read_and_write(root, W)
    random_read, random_write = random_overlaps(root, W.shape[-1], adapter.sites[site.name].d_head or 1, draws, seed)
    return OVOverlap(
        layer,
        len(x),
        between_heads(W),
        between_heads(read),
        between_heads(write),
        random_read,
        random_write,
        random_overlap(site.d_in, adapter.sites[site.name].d_head or 1),
    )


def random_overlaps(
    root: Float[Tensor, "d_model rank"], d_out: int, d_head: int, draws: int, seed: int
) -> tuple[float, float]:
    """Mean read and write overlap of pairs of unrelated heads: the compared side Gaussian, the other orthonormal.

    With the identity for ``root`` both come out at ``random_overlap``.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(d: int) -> Tensor:
        return torch.randn(draws, 2, d, d_head, generator=generator, dtype=torch.float64).to(root)

    d_in = root.shape[0]
    into = root.T @ gaussian(d_in)  # read: M Mᵀ = (rootᵀ B)(rootᵀ B)ᵀ whatever orthonormal rows follow
    read = into @ into.mT
    middle = root.T @ torch.linalg.qr(gaussian(d_in))[0]
    out = gaussian(d_out)
    write = out @ (middle.mT @ middle) @ out.mT
    return tuple(float(frobenius_cosine(m[:, 0], m[:, 1]).mean()) for m in (read, write))  # type: ignore[return-value]
