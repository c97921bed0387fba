"""Products by head against every matrix formed: any shape, masks, patches, repeats."""

from __future__ import annotations

from unittest.mock import Mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tl_vpd.adapters import Adapter
from tl_vpd.components import Layout
from tl_vpd.forward import SiteProduct, masked_output
from tl_vpd.masking import SiteMask

SHAPES = dict(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    pos=st.none() | st.integers(1, 3),
    heads=st.integers(1, 3),
    d_head=st.integers(1, 3),
    d_model=st.integers(1, 4),
    C=st.integers(1, 5),
    bias=st.booleans(),
    masked=st.booleans(),
    delta=st.booleans(),
    patched=st.booleans(),
    routed=st.booleans(),
)


def product_of(layout, x, y, V, U, bias=None):
    """A site's product in a layout."""
    adapter = Mock(spec=Adapter)
    adapter.layout.return_value, adapter.bias.return_value = layout, bias
    return SiteProduct("site", adapter, x, y, V, U)


class RandomSite:
    """Random float64 tensors of one site."""

    def __init__(self, seed, batch, pos, **flags):
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = (batch,) if pos is None else (batch, pos)
        self.flags = flags

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def masks(self, C):
        """A random mask, and the same with None filled in."""
        mask, delta = torch.rand(*self.rows, C, generator=self.generator).double(), self.normal(*self.rows)
        routed = torch.rand(*self.rows, generator=self.generator) < 0.5
        site_mask = SiteMask(
            mask if self.flags["masked"] else None,
            delta if self.flags["delta"] else None,
            routed if self.flags["routed"] else None,
        )
        full = (
            mask if self.flags["masked"] else torch.ones_like(mask),
            delta if self.flags["delta"] else torch.ones_like(delta),
            routed if self.flags["routed"] else torch.ones_like(routed),
        )
        return site_mask, full


@settings(max_examples=60, deadline=None)
@given(**SHAPES, repeats=st.integers(1, 2), whole=st.booleans())
def test_q_k_v_by_head_are_each_heads_own_masked_product(
    seed, batch, pos, heads, d_head, d_model, C, bias, masked, delta, patched, routed, repeats, whole
):
    case = RandomSite(seed, batch, pos, masked=masked, delta=delta, routed=routed)
    W, V, U = case.normal(d_model, heads * d_head), case.normal(d_model, C), case.normal(C, heads * d_head)
    b = case.normal(heads * d_head) if bias else None
    n = heads * repeats
    if whole:
        one = case.normal(*case.rows, d_model)
        layout = Layout("whole", heads, repeats, x_has_heads=False, y_has_heads=True)
        x, by_head = one, one.unsqueeze(-2).expand(*case.rows, n, d_model)
    else:
        layout = Layout("split", heads, repeats, x_has_heads=True, y_has_heads=True)
        x = by_head = case.normal(*case.rows, n, d_model)
    site_mask, (mask, m_delta, where) = case.masks(C)
    change = case.normal(*case.rows, C) if patched else torch.zeros(*case.rows, C, dtype=torch.float64)

    def of(matrix, head):
        return matrix[..., head // repeats * d_head : (head // repeats + 1) * d_head]

    y, expected = [], []
    for head in range(n):
        read = by_head[..., head, :]
        y.append(read @ of(W, head) + (0 if b is None else of(b, head)))
        acts = (read @ V + change) * mask
        full = acts @ of(U, head) + m_delta[..., None] * (read @ (of(W, head) - V @ of(U, head)))
        full = full + (0 if b is None else of(b, head))
        expected.append(torch.where(where[..., None], full, y[-1]))
    y, expected = torch.stack(y, -2), torch.stack(expected, -2)

    product = product_of(layout, x, y.clone(), V, U, b)
    acts = product.acts()
    shown = layout.shown(acts)
    assert_close(shown, by_head.mean(-2) @ V, rtol=1e-10, atol=1e-10)
    assert_close(layout.input_of_site(x), by_head.mean(-2), rtol=1e-10, atol=1e-10)
    after = layout.patched(acts, shown, shown + change) if patched else None
    out = product.masked(site_mask, acts=acts, patched_acts=after)
    assert_close(out, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_results_by_head_add_up_to_the_whole_masked_product(
    seed, batch, pos, heads, d_head, d_model, C, bias, masked, delta, patched, routed
):
    case = RandomSite(seed, batch, pos, masked=masked, delta=delta, routed=routed)
    W, V, U = case.normal(heads * d_head, d_model), case.normal(heads * d_head, C), case.normal(C, d_model)
    z = case.normal(*case.rows, heads, d_head)
    site_mask, _ = case.masks(C)
    change = case.normal(*case.rows, C) if patched else None
    flat = z.flatten(-2)
    acts = flat @ V
    whole = masked_output(
        flat @ W,
        acts,
        U,
        None,
        mask=site_mask.mask,
        delta_mask=site_mask.delta,
        routed=site_mask.routed,
        patched_acts=None if change is None else acts + change,
    )

    layout = Layout("result", heads, x_has_heads=True, y_has_heads=True)
    result = torch.einsum("...hd,hdm->...hm", z, W.unflatten(0, (heads, d_head)))
    product = product_of(layout, z, result.clone(), V, U, case.normal(d_model) if bias else None)
    by_head = product.acts()
    shown = layout.shown(by_head)
    assert by_head.shape == (*case.rows, heads, C)
    assert_close(shown, acts, rtol=1e-10, atol=1e-10)
    assert_close(layout.input_of_site(z), flat)
    after = None if change is None else layout.patched(by_head, shown, shown + change)
    out = product.masked(site_mask, acts=by_head, patched_acts=after)
    assert_close(out.sum(-2), whole, rtol=1e-9, atol=1e-9)


def test_ones_by_head_change_no_bit():
    case = RandomSite(0, 2, 3, masked=True, delta=True, routed=False)
    V, U = case.normal(4, 5), case.normal(5, 6)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, y = case.normal(2, 3, 2, 4).to(dtype), case.normal(2, 3, 2, 3).to(dtype)
        layout = Layout("split", 2, x_has_heads=True, y_has_heads=True)
        ones = torch.ones(2, 3, 5, dtype=dtype)
        out = product_of(layout, x, y.clone(), V.to(dtype), U.to(dtype)).masked(SiteMask(ones, ones[..., 0]))
        assert torch.equal(out, y)
