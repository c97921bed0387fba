"""The shared transformer: an independent forward written out head by head, its rotation, padding, shared inputs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tl_vpd.importance.chunked import ChunkedTransformers
from tl_vpd.importance.transformer import GammaCache, SharedTransformer, rms_norm, rotary

D_IN, COUNTS = {"a": 5, "b": 3, "c": 4}, {"a": 2, "b": 6, "c": 1}


def build(cls=SharedTransformer, **more):
    torch.manual_seed(0)
    return cls(D_IN, COUNTS, d_ci=8, n_blocks=2, n_heads=2, **more).double().requires_grad_(False)


def inputs(seed=0, pos=4):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(2, pos, d, generator=g, dtype=torch.float64) for n, d in D_IN.items()}


def rotation(angle):
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)


def by_hand(gamma, x, *, causal=False):
    """One row and position at a time, every attention score separately, float64."""

    def norm(v):
        return v / math.sqrt(float(v.detach().square().mean()) + 1.1920928955078125e-07)

    out = []
    for row in range(2):
        stream = [gamma.embed(torch.cat([norm(x[n][row, t]) for n in D_IN])) for t in range(x["a"].shape[1])]
        for block in gamma.blocks:
            normed = [norm(h) for h in stream]
            heads = [[f(h).split(4) for h in normed] for f in (block.q, block.k, block.v)]
            z = []
            for t in range(len(stream)):
                parts = []
                for head in range(2):
                    q = turned(heads[0][t][head], t)
                    visible = range(t + 1) if causal else range(len(stream))
                    scores = [q @ turned(heads[1][s][head], s) / 2 for s in visible]
                    pattern = torch.stack(scores).softmax(0)
                    parts.append(sum(p * heads[2][s][head] for s, p in enumerate(pattern)))
                z.append(torch.cat(parts))
            stream = [h + block.o(v) for h, v in zip(stream, z, strict=True)]
            stream = [h + block.mlp_out(F.gelu(block.mlp_in(norm(h)))) for h in stream]
        out.append(torch.stack([gamma.unembed(h) for h in stream]))
    return torch.stack(out)


def turned(v, t):
    """Dimensions i and i + 2 turn together by t · 10000^(−i/2)."""
    first, second = (rotation(t * 10_000 ** (-i / 2)) @ v[[i, i + 2]] for i in range(2))
    return torch.stack([first[0], second[0], first[1], second[1]])


@pytest.mark.parametrize("causal", [False, True])
def test_forward_equals_one_written_out_by_hand(causal):
    gamma, x = build(causal=causal), inputs()
    # Angles are computed in float32, which bounds the agreement.
    assert_close(gamma(x), by_hand(gamma, x, causal=causal), rtol=0, atol=1e-6)


def test_rotation_depends_on_the_difference_of_positions_alone():
    q, k = (torch.randn(1, 1, 1, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    turned_q, turned_k = rotary(q.expand(1, 1, 6, 4)), rotary(k.expand(1, 1, 6, 4))
    scores = (turned_q @ turned_k.transpose(-1, -2))[0, 0]
    for offset in range(-3, 4):
        diagonal = scores.diagonal(offset)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-6)


def test_rms_norm_has_no_scale_and_the_epsilon_of_float32():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert_close(rms_norm(x), x / math.sqrt(12.5 + 2**-23))


def test_the_papers_attention_is_bidirectional():
    gamma, x = build(), inputs()
    z = gamma(x)
    x["b"] = x["b"].clone()
    x["b"][:, -1] += 1
    assert bool((gamma(x)[:, 0] - z[:, 0]).abs().max() > 1e-4)


@pytest.mark.parametrize("cls", [SharedTransformer, ChunkedTransformers])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_causal_gamma_does_not_see_the_future(cls, padded, dtype):
    """Bit for bit: whatever the later tokens are, the values of the prefix are the same numbers."""
    gamma = build(cls, causal=True, **({"chunk": 2} if cls is ChunkedTransformers else {})).to(dtype)
    x, other = ({n: t.to(dtype) for n, t in inputs(seed, pos=40).items()} for seed in (0, 1))
    token_mask = torch.arange(40) >= torch.tensor([[0], [5]]) if padded else None
    z = gamma(x, token_mask)
    for cut in (1, 7, 39):
        changed = {n: torch.cat([x[n][:, :cut], 1e3 * other[n][:, cut:]], dim=1) for n in x}
        assert torch.equal(gamma(changed, token_mask)[:, :cut], z[:, :cut])
        assert not torch.equal(gamma(changed, token_mask)[:, cut:], z[:, cut:])


@pytest.mark.parametrize("cls", [SharedTransformer, ChunkedTransformers])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 4], [9]])
def test_with_a_cache_tokens_may_come_one_after_the_other(cls, padded, steps):
    gamma, x = build(cls, causal=True, **({"chunk": 2} if cls is ChunkedTransformers else {})), inputs(pos=9)
    token_mask = torch.arange(9) >= torch.tensor([[0], [3]]) if padded else None
    whole, cache, values, end = gamma(x, token_mask), GammaCache(), [], 0
    for n in steps:
        start, end = end, end + n
        mask = None if token_mask is None else token_mask[:, :end]
        values.append(gamma({name: t[:, start:end] for name, t in x.items()}, mask, cache))
        assert cache.length == end
    real = torch.ones(2, 9, dtype=torch.bool) if token_mask is None else token_mask
    assert_close(torch.cat(values, dim=1)[real], whole[real], rtol=0, atol=1e-6)


def test_a_bidirectional_gamma_cannot_go_on_from_a_cache():
    with pytest.raises(ValueError, match="reads later tokens too"):
        build()(inputs(), None, GammaCache())


def test_values_at_real_positions_do_not_depend_on_padding():
    gamma, x = build(), inputs(pos=4)
    left = {n: torch.cat([torch.full((2, 3, t.shape[-1]), 9.0).double(), t], dim=1) for n, t in x.items()}
    token_mask = torch.tensor([[False] * 3 + [True] * 4] * 2)
    assert_close(gamma(left, token_mask)[:, 3:], gamma(x), rtol=0, atol=1e-6)
    other = {n: torch.where(token_mask[..., None], t, -t) for n, t in left.items()}
    assert_close(gamma(other, token_mask)[:, 3:], gamma(left, token_mask)[:, 3:], rtol=1e-12, atol=1e-12)
    assert bool(gamma(left, token_mask).isfinite().all())


def test_an_input_that_sites_share_is_the_same_as_copies_of_it():
    shared = torch.randn(1, 3, 4, dtype=torch.float64)
    torch.manual_seed(0)
    gamma = SharedTransformer({"a": 4, "b": 4}, {"a": 2, "b": 3}, d_ci=4, n_blocks=1, n_heads=1).double()
    assert torch.equal(gamma({"a": shared, "b": shared}), gamma({"a": shared, "b": shared.clone()}))


def test_chunks_see_their_own_sites_only_and_come_out_in_order():
    gamma, x = build(ChunkedTransformers, chunk=2), inputs()
    z = gamma(x)
    assert len(gamma.parts) == 2
    assert torch.equal(z[..., :8], gamma.parts[0](x)) and torch.equal(z[..., 8:], gamma.parts[1](x))
    changed = gamma({**x, "c": x["c"] + 1})
    assert torch.equal(changed[..., :8], z[..., :8]) and not torch.equal(changed[..., 8:], z[..., 8:])


@pytest.mark.parametrize(("d_ci", "n_heads"), [(9, 2), (6, 2), (8, 3)])
def test_widths_that_do_not_divide_into_even_heads_are_refused(d_ci, n_heads):
    with pytest.raises(ValueError, match=f"d_ci={d_ci} does not divide into n_heads={n_heads}"):
        SharedTransformer(D_IN, COUNTS, d_ci=d_ci, n_blocks=1, n_heads=n_heads)
