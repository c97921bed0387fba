"""At which tokens each subcomponent is important: what clustering reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_vpd.checks import instance, integer, number, seed_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel
from tl_vpd.printing import Printed
from tl_vpd.site import ConcatenatedAxis


@dataclass(frozen=True)
class Patterns(Printed):
    """Tokens at which subcomponents are important, on the CPU; those that are nowhere important are left out.

    Attributes:
        important: ``[token, n]``, nonzero where subcomponent n is important.
        chosen: each column's place on ``site_axis``, ascending.
        site_axis: of the decomposition.
        threshold: a subcomponent is important where its importance exceeds it.
        lengths: real tokens of every row.
        norms: of the decomposition, by which it is known (``norms_of``).
    """

    important: scipy.sparse.csc_matrix
    chosen: Int[np.ndarray, " n"]
    site_axis: ConcatenatedAxis
    threshold: float
    lengths: Int[np.ndarray, " row"]
    norms: Mapping[str, float] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Tokens looked at, padding left out."""
        return self.important.shape[0]

    def shuffled(self, seed: int = 0) -> Patterns:
        """The null: each subcomponent is important at as many tokens, at random ones, independently of the others."""
        generator, columns = np.random.default_rng(seed_of(seed) % (1 << 64)), self.important
        counts = np.diff(columns.indptr)
        tokens = [np.sort(generator.choice(self.n_tokens, size, replace=False)) for size in counts]
        entries = np.concatenate(tokens) if tokens else columns.indices
        matrix = scipy.sparse.csc_matrix((columns.data, entries, columns.indptr), shape=columns.shape)
        return replace(self, important=matrix)


@torch.no_grad()
def importance_patterns(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    *,
    threshold: float = 0.01,
    batch_size: int = 32,
    attention_mask: Tensor | None = None,
) -> Patterns:
    """Runs Γ over rows of tokens once and notes which subcomponents are important where.

    Memory is that of one batch's importances and of 4 bytes per important (token, subcomponent) pair.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: strings, or rows of tokens ``[n, pos]``; padding is left out.
        threshold: a subcomponent is important where its importance exceeds this (the paper's 0.01).
        batch_size: rows run at once.
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Raises:
        TypeError: an argument is of another type.
        ValueError: the prompts are not this model's, it has other weights, a number is out of range, or no subcomponent is
            important anywhere.
    """
    instance("decomposition", decomposition, Decomposition)
    threshold = number("threshold", threshold, minimum=0, maximum=1)
    batch_size = integer("batch_size", batch_size, minimum=1)
    site_axis, columns, ends = decomposition.site_axis, [], [np.zeros(1, dtype=np.int64)]
    lengths: list[int] = []
    with MaskedModel(decomposition, model) as masked_model:
        tokens = masked_model.adapter.tokens(prompts)
        token_mask = masked_model.adapter.padding(tokens, attention_mask)
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            batch_mask = None if token_mask is None else token_mask[rows]
            _, inputs = masked_model.clean(tokens[rows], batch_mask)
            g = decomposition.importances(inputs, batch_mask)
            important = (g > threshold).flatten(0, -2) if batch_mask is None else (g > threshold)[batch_mask]
            n_pos = g.shape[1] if g.ndim > 2 else 1
            lengths += [n_pos] * len(g) if batch_mask is None else batch_mask.sum(1).tolist()
            token, subcomponent = (axis.cpu().numpy() for axis in important.nonzero(as_tuple=True))
            columns.append(subcomponent.astype(np.int32))
            ends.append(ends[-1][-1] + np.bincount(token, minlength=len(important)).cumsum())
    entries, indptr = np.concatenate(columns), np.concatenate(ends)
    shape = (len(indptr) - 1, site_axis.total)
    matrix = scipy.sparse.csr_matrix((np.ones(len(entries), dtype=bool), entries, indptr), shape=shape).tocsc()
    chosen = np.diff(matrix.indptr).nonzero()[0]
    if not len(chosen):
        raise ValueError(
            f"No subcomponent has an importance above {threshold:g} at any of {shape[0]} tokens: lower the threshold."
        )
    return Patterns(matrix[:, chosen], chosen, site_axis, threshold, np.array(lengths), norms_of(decomposition))


@torch.no_grad()
def norms_of(decomposition: Decomposition) -> dict[str, float]:
    """``Σ_c ‖V[:, c]‖ ‖U[c]‖`` by site."""
    pairs = ((name, decomposition.V[name], decomposition.U[name]) for name in decomposition.sites)
    return {name: float((V.norm(dim=0) * U.norm(dim=-1)).double().sum()) for name, V, U in pairs}


def is_of(norms: Mapping[str, float], decomposition: Decomposition) -> bool:
    """Whether norms are of this decomposition, which may have been rounded to half precision since (none are of any)."""
    return not norms or all(abs(norms[name] - x) <= 1e-3 * abs(x) for name, x in norms_of(decomposition).items())
