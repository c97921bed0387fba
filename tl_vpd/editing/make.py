"""Edits of write directions: removed, scaled, a token's, another subcomponent's, or any vector; and added pieces.

=====================  ===============================================================================
``remove``             U[c] → 0
``scale``              U[c] → factor · U[c]
``write_direction``    U[c] → vector
``write_token``        U[c] → ± alpha · û,  û = W_U[token] / ‖W_U[token]‖
``swap``               U[c] → r · U[c'],  U[c'] → U[c] / r,  r = ā_c' / ā_c
``add``                W → W + read ⊗ write
=====================  ===============================================================================

ā is the mean inner activation ``x @ V[:, c]`` where the subcomponent is important: an activation that is negative there would
write the opposite of û, so the sign of ``write_token`` is that of ā_c (VPD paper, section on editing; alpha 3 there).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.checks import check_finite, flag, instance, integer, number, shown
from tl_vpd.decomposition import Decomposition
from tl_vpd.editing.activity import activity
from tl_vpd.editing.edit import Edit
from tl_vpd.editing.piece import Piece
from tl_vpd.forward import MaskedModel
from tl_vpd.hooks.ablations import Subcomponents, indices_by_site
from tl_vpd.site import Subcomponent

WRITES_STREAM = ("o", "out")
"""The short names of sites that write into the residual stream."""


def piece_of(
    decomposition: Decomposition, subcomponent: Subcomponent, write: Float[Tensor, " d_out"], about: str
) -> Piece:
    """The piece that gives a subcomponent another write direction; it has copies of the directions as they are now.

    Args:
        decomposition: that has the subcomponent.
        subcomponent: which.
        write: the write direction that it gets.
        about: what that does, in a few words.
    """
    V = decomposition.V[subcomponent.site][:, subcomponent.index].detach().clone()
    U = decomposition.U[subcomponent.site][subcomponent.index].detach().clone()
    return Piece(subcomponent.site, subcomponent.index, about, V, U, write.detach().to(U) - U)


def remove(decomposition: Decomposition, subcomponents: Subcomponents) -> Edit:
    """Takes subcomponents out of the weights: their write directions become 0.

    Args:
        decomposition: that has them.
        subcomponents: ``"blocks.1.mlp.W_out:12"`` or Subcomponents, one or several.

    Raises:
        TypeError: an argument is of another type.
        KeyError: a site does not exist.
        IndexError: a site has no such subcomponent.
        ValueError: none is named, or an address is not written ``site:index``.
    """
    chosen = chosen_subcomponents(decomposition, subcomponents)
    U = decomposition.U
    return Edit.of(decomposition, [piece_of(decomposition, c, 0 * U[c.site][c.index], "removed") for c in chosen])


def scale(decomposition: Decomposition, subcomponents: Subcomponents, factor: float) -> Edit:
    """Multiplies write directions, and so what subcomponents contribute, by a factor.

    Args:
        decomposition: that has them.
        subcomponents: one or several.
        factor: any finite number but 1; negative ones reverse the contribution.

    Raises:
        TypeError: an argument is of another type.
        KeyError: a site does not exist.
        IndexError: a site has no such subcomponent.
        ValueError: the factor is 1, NaN or infinite, or none is named.
    """
    factor = number("factor", factor)
    if factor == 1:
        raise ValueError("factor=1 changes nothing: give another factor.")
    chosen, U = chosen_subcomponents(decomposition, subcomponents), decomposition.U
    pieces = [piece_of(decomposition, c, factor * U[c.site][c.index], f"scaled by {factor:.4g}") for c in chosen]
    return Edit.of(decomposition, pieces)


def write_direction(
    decomposition: Decomposition, subcomponent: str | Subcomponent, vector: Float[Tensor, " d_out"]
) -> Edit:
    """Gives a subcomponent another write direction.

    Args:
        decomposition: that has it.
        subcomponent: which.
        vector: what it writes per unit of inner activation.

    Raises:
        TypeError: an argument is of another type.
        KeyError: the site does not exist.
        IndexError: the site has no such subcomponent.
        ValueError: the vector has another length, is not finite, or is the present direction.
    """
    [c] = chosen_subcomponents(decomposition, subcomponent)
    U = decomposition.U[c.site][c.index].detach()
    vector = _vector("vector", vector, len(U)).to(U)
    if torch.equal(vector, U):
        raise ValueError(f"vector is the present write direction of {c}: the edit would change nothing.")
    return Edit.of(decomposition, [piece_of(decomposition, c, vector, "another write direction")])


def write_token(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    subcomponent: str | Subcomponent,
    token: str | int,
    *,
    alpha: float = 3.0,
) -> Edit:
    """Makes a subcomponent write a token: its write direction becomes ``± alpha · û`` of the token's unembedding direction.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: strings or tokens on which the subcomponent is important; they tell the sign.
        subcomponent: of a site that writes into the residual stream (W_O, W_out).
        token: its text, or its number.
        alpha: the length of the write direction; a negative one makes the token less likely.

    Raises:
        TypeError: an argument is of another type.
        KeyError: the site does not exist.
        IndexError: the site has no such subcomponent, or the vocabulary no such token.
        ValueError: alpha is 0, NaN or infinite, the site does not write into the residual stream, the text is not one token, or
            the model has no unembedding that is a plain product.

    Warns (RuntimeWarning) where the subcomponent is not important at any token of the prompts.
    """
    alpha = number("alpha", alpha)
    if alpha == 0:
        raise ValueError("alpha=0 would write nothing: use remove(vpd, subcomponent), or give another length.")
    [c] = chosen_subcomponents(decomposition, subcomponent)
    if decomposition.sites[c.site].short not in WRITES_STREAM:
        raise ValueError(f"{c} does not write into the residual stream: a token can be written at W_O and W_out.")
    adapter = adapt(model)
    index, direction = _unembedding_direction(adapter, token)
    sign = -1.0 if _mean_activations(decomposition, model, prompts, [c])[0] < 0 else 1.0
    about = f"writes {sign * alpha:+.3g} · û of {_word(adapter, index)}"
    return Edit.of(decomposition, [piece_of(decomposition, c, sign * alpha * direction, about)])


def swap(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    subcomponent: str | Subcomponent,
    other: str | Subcomponent,
    *,
    both: bool = True,
) -> Edit:
    """Exchanges the write directions of two subcomponents, scaled by the ratio of their inner activations where important.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: strings or tokens on which both are important.
        subcomponent: the first.
        other: the second, of the same site, or where both write into the residual stream.
        both: whether the second gets the first one's direction too; otherwise the second stays as it is.

    Raises:
        TypeError: an argument is of another type.
        KeyError: a site does not exist.
        IndexError: a site has no such subcomponent.
        ValueError: they are the same, do not write into the same space, or have a mean activation of 0.

    Warns (RuntimeWarning) where one is not important at any token of the prompts.
    """
    both = flag("both", both)
    [c], [d] = chosen_subcomponents(decomposition, subcomponent), chosen_subcomponents(decomposition, other)
    if c == d:
        raise ValueError(f"{c} cannot be swapped with itself: name two subcomponents.")
    shorts = [decomposition.sites[s.site].short for s in (c, d)]
    if c.site != d.site and not all(short in WRITES_STREAM for short in shorts):
        raise ValueError(f"{c} and {d} do not write into the same space: swap within a site, or between W_O and W_out.")
    mean_c, mean_d = _mean_activations(decomposition, model, prompts, [c, d])
    if mean_c == 0 or mean_d == 0:
        raise ValueError(f"The mean activation of {c if mean_c == 0 else d} is 0 on these prompts: give others.")
    ratio, U = mean_d / mean_c, decomposition.U
    pieces = [piece_of(decomposition, c, ratio * U[d.site][d.index], f"writes {ratio:+.3g} · U of {d}")]
    if both:
        pieces.append(piece_of(decomposition, d, U[c.site][c.index] / ratio, f"writes {1 / ratio:+.3g} · U of {c}"))
    return Edit.of(decomposition, pieces)


def add(decomposition: Decomposition, site: str, read: Float[Tensor, " d_in"], write: Float[Tensor, " d_out"]) -> Edit:
    """Adds a rank-one piece to a weight, ``W + read ⊗ write``; under masks it belongs to Δ.

    Args:
        decomposition: of the weight.
        site: the name of the weight.
        read: its read direction.
        write: its write direction.

    Raises:
        TypeError: an argument is of another type.
        KeyError: the site is not decomposed.
        ValueError: a direction has another length, is not finite, or is 0.
    """
    instance("decomposition", decomposition, Decomposition)
    name = decomposition.subcomponent(Subcomponent(site, 0)).site
    V, U = decomposition.V[name], decomposition.U[name]
    read, write = _vector("read", read, V.shape[0]).to(V), _vector("write", write, U.shape[1]).to(U)
    if not bool(read.any() and write.any()):
        raise ValueError("read or write is 0 everywhere: the piece would change nothing.")
    return Edit.of(decomposition, [Piece(name, None, "added", read.clone(), torch.zeros_like(write), write.clone())])


def chosen_subcomponents(decomposition: Decomposition, subcomponents: Subcomponents) -> list[Subcomponent]:
    """Subcomponents in order, each once; raises ValueError if there are none."""
    instance("decomposition", decomposition, Decomposition)
    by_site = indices_by_site(decomposition, subcomponents)
    chosen = [Subcomponent(site, index) for site, indices in by_site.items() for index in indices]
    if not chosen:
        raise ValueError("There are no subcomponents to edit: the list is empty. Name one or more, as 'site:index'.")
    return chosen


def _mean_activations(
    decomposition: Decomposition, model: nn.Module, prompts: Any, subcomponents: list[Subcomponent]
) -> list[float]:
    """Mean inner activations where subcomponents are important; warns of those that are so nowhere."""
    with MaskedModel(decomposition, model) as masked_model:
        result = activity(decomposition, masked_model, prompts, subcomponents)
    result.warn_of_dead()
    return result.mean.tolist()


def _vector(name: str, value: Any, length: int) -> Tensor:
    """A finite vector of a length."""
    vector = instance(name, value, Tensor).detach()
    if vector.shape != (length,) or vector.is_complex():
        raise ValueError(f"{name} is {tuple(vector.shape)} of {vector.dtype}: give {length} real numbers.")
    check_finite(name, vector)
    return vector


def _unembedding_direction(adapter: Adapter, token: str | int) -> tuple[int, Float[Tensor, " d_model"]]:
    """A token's number, and the unit vector of its unembedding."""
    unembedding = adapter.unembedding()
    if unembedding is None:
        raise ValueError(
            f"The unembedding of this {type(adapter.model).__name__} is not a plain product, or is hooked: use "
            "write_direction with a vector."
        )
    index = adapter.token(token) if isinstance(token, str) else integer("token", token, minimum=0)
    if index >= unembedding.vocabulary:
        raise IndexError(f"token={shown(token)}: the vocabulary has tokens 0 to {unembedding.vocabulary - 1}.")
    direction = unembedding.weight[index].double()
    return index, direction / direction.norm()


def _word(adapter: Adapter, index: int) -> str:
    return repr(adapter.words(torch.tensor([index]))[0])
