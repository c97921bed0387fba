"""Other forms of right arguments give the same numbers, to the bit.

A script of its own; ``tests/test_wrong_calls.py`` runs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import SiteMask, Subcomponent, bundled

Q = "blocks.0.attn.W_Q"
model = tiny_model()
vpd = decomposition_of(model).double()
integer_dtypes = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
several = settings(max_examples=40, deadline=None, database=None)


@st.composite
def layouts(draw: Any) -> tuple[Tensor, Any]:
    """Tokens, and the same in another type and layout."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    tokens = some_tokens(draw(st.integers(0, 99)), shape)
    array = tokens.numpy().astype(draw(st.sampled_from(integer_dtypes)))
    form = draw(st.sampled_from(["array", "tensor", "transposed", "reversed", "strided", "lists", "rows", "arrays"]))
    other: Any = {
        "array": lambda: array,
        "tensor": lambda: torch.tensor(array),
        "transposed": lambda: torch.tensor(array.T.copy()).T,
        "reversed": lambda: array[:, ::-1].copy()[:, ::-1],
        "strided": lambda: torch.tensor(np.repeat(array, 2, axis=1))[:, ::2],
        "lists": lambda: tokens.tolist(),
        "rows": lambda: tuple(torch.tensor(row) for row in array),
        "arrays": lambda: list(array),
    }[form]()
    return tokens, other[0] if len(tokens) == 1 and draw(st.booleans()) else other


@several
@given(layouts())
def tokens_of_any_type_and_layout(forms: tuple[Tensor, Any]) -> None:
    tokens, _ = forms
    expected, got = (vpd.causal_importances(model, prompts) for prompts in forms)
    assert got.tokens.dtype == torch.int64 and torch.equal(got.tokens, tokens)
    assert torch.equal(got.concatenated, expected.concatenated)
    acts = [vpd.component_acts(model, prompts)[Q] for prompts in forms]
    assert torch.equal(*acts)
    attacks = [vpd.adversarial_masks(model, prompts, steps=1, seed=0)[Q].mask for prompts in forms]
    assert torch.equal(*attacks)


@several
@given(
    real=st.lists(st.integers(1, 7), min_size=2, max_size=2),
    dtype=st.sampled_from([*integer_dtypes, np.bool_, np.float16, np.float32, np.float64]),
    form=st.sampled_from([lambda m: m, torch.tensor, lambda m: m.tolist()]),
)
def attention_masks_of_any_type(real: list[int], dtype: Any, form: Any) -> None:
    mask = np.array([[position < n for position in range(7)] for n in real])
    tokens = some_tokens()
    expected = vpd.causal_importances(model, tokens, attention_mask=torch.tensor(mask))
    got = vpd.causal_importances(model, tokens, attention_mask=form(mask.astype(dtype)))
    assert torch.equal(got.concatenated, expected.concatenated)
    assert (expected.token_mask is None) == bool(mask.all())
    for row, n in enumerate(real):
        alone = vpd.causal_importances(model, tokens[row : row + 1, :n]).concatenated
        torch.testing.assert_close(got.concatenated[row : row + 1, :n], alone, rtol=1e-9, atol=1e-9)
    if real[0] == real[1]:  # one row counts for all
        one = vpd.causal_importances(model, tokens, attention_mask=form(mask[:1].astype(dtype)))
        assert torch.equal(one.concatenated, expected.concatenated)


@several
@given(index=st.integers(0, 5), dtype=st.sampled_from(integer_dtypes), seed=st.integers(-9, 9), amount=st.floats(-2, 2))
def numbers_of_any_type(index: int, dtype: Any, seed: int, amount: float) -> None:
    tokens = some_tokens()
    addresses: list[Any] = [f"{Q}:{index}", Subcomponent(Q, dtype(index)), Subcomponent(Q, torch.tensor(index))]  # type: ignore[arg-type]
    amounts: list[Any] = [amount, np.float64(amount), torch.tensor(amount, dtype=torch.float64)]
    with torch.no_grad(), vpd.attach(model) as attached:
        outputs = []
        for address, number in zip(addresses, amounts, strict=True):
            hooks = vpd.ablation_hooks(address, amount=number) + vpd.delta_hooks(number)
            outputs.append(model.run_with_hooks(tokens, fwd_hooks=hooks))
            with attached.masked("stochastic", seed=np.int64(seed) if number is amounts[1] else seed, delta=number):
                outputs.append(model(tokens))
    assert all(torch.equal(outputs[i % 2], output) for i, output in enumerate(outputs))


@several
@given(
    bits=st.lists(st.booleans(), min_size=6, max_size=6), dtype=st.sampled_from([torch.bool, torch.int8, torch.int64])
)
def masks_of_zeros_and_ones_of_any_type(bits: list[bool], dtype: torch.dtype) -> None:
    tokens = some_tokens()
    mask = torch.tensor(bits)
    with torch.no_grad(), vpd.attach(model) as attached:
        outputs = []
        for form in (mask.double(), mask.to(dtype), SiteMask(mask.to(dtype), None), mask.to(dtype).expand(1, 1, 6)):
            with attached.masked({Q: form}):  # type: ignore[dict-item]
                outputs.append(model(tokens))
            with attached.masked(lambda site, acts, form=form: form if site == Q else SiteMask(None, None)):  # type: ignore[misc]
                outputs.append(model(tokens))
            outputs.append(model.run_with_hooks(tokens, fwd_hooks=vpd.mask_hooks({Q: form})))  # type: ignore[dict-item]
    assert all(torch.equal(outputs[0], output) for output in outputs)


def text_in_lists_and_tuples() -> None:
    shipped, its = bundled.model(), bundled.decomposition()
    prompts = ["import os", "def f(x):\n    return x"]
    expected = its.causal_importances(shipped, prompts)
    for other in (tuple(prompts), expected.tokens, expected.tokens.int().numpy()):
        assert torch.equal(its.causal_importances(shipped, other).concatenated, expected.concatenated)


if __name__ == "__main__":
    tokens_of_any_type_and_layout()
    attention_masks_of_any_type()
    numbers_of_any_type()
    masks_of_zeros_and_ones_of_any_type()
    text_in_lists_and_tuples()
