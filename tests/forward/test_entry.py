"""Passes that start at the first decomposed block are the passes that run every block."""

from __future__ import annotations

import pytest
import torch

from tests.matrix.models import build
from tests.matrix.models import tokens as tokens_of_family
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.adapters import adapt
from tl_vpd.analysis.pruning import PruneConfig, prune
from tl_vpd.forward import MaskedModel, SitePass
from tl_vpd.forward.entry import entry_of
from tl_vpd.masking import Masks

FLAGS = {
    "rotary": {},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "alibi": {"positional_embedding_type": "alibi"},
    "parallel": {"parallel_attn_mlp": True},
}


def masks_of(vpd, tokens):
    generator = torch.Generator().manual_seed(0)
    shape = tokens.shape
    return Masks({n: torch.rand(*shape, c, generator=generator).double() for n, c in vpd.counts.items()})


def ran(model):
    """Counts how often each block runs."""
    counts = [0] * model.cfg.n_layers

    def count(i):
        def hook(module, arguments, output):
            counts[i] += 1

        return hook

    # On a point inside, since a skipped block passes its input through.
    for i, block in enumerate(model.blocks):
        block.hook_resid_pre.register_forward_hook(count(i))
    return counts


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("flags", FLAGS)
def test_outputs_and_gradients_are_the_same_to_the_bit(flags, padded):
    model, tokens = tiny_model(n_layers=3, **FLAGS[flags]), some_tokens()
    vpd = decomposition_of(model, sites=("blocks.1.mlp.*", "blocks.2.*")).double()
    token_mask = torch.ones_like(tokens, dtype=torch.bool) if padded else None
    if token_mask is not None:
        token_mask[0, :2] = False
    masks, counts = masks_of(vpd, tokens), ran(model)
    with MaskedModel(vpd, model) as masked_model:
        assert masked_model.can_start_late(tokens, token_mask)
        run = SitePass(collect=True)
        with torch.no_grad():
            masked_model.run(tokens, run, token_mask)
        counts[:] = [0, 0, 0]
        results = {}
        for start in (None, run.residual):
            vpd.zero_grad()
            output = masked_model.masked(tokens, masks, token_mask, start=start)
            output.square().sum().backward()
            results[start is None] = output, [p.grad.clone() for p in vpd.components.parameters()]
    assert counts == [1, 2, 2]  # the first block ran in one of the two
    assert torch.equal(results[True][0], results[False][0])
    assert all(torch.equal(a, b) for a, b in zip(results[True][1], results[False][1], strict=True))
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_a_failing_pass_puts_the_blocks_back(model, tokens):
    vpd = decomposition_of(model, sites=("blocks.1.*",)).double()
    hooks = [len(block._forward_pre_hooks) for block in model.blocks]
    with MaskedModel(vpd, model) as masked_model, pytest.raises(RuntimeError):
        masked_model.masked(tokens, Masks({}), start=torch.zeros(2, 7, 3).double())
    assert all("forward" not in block.__dict__ for block in model.blocks)
    assert [len(block._forward_pre_hooks) for block in model.blocks] == hooks


@pytest.mark.parametrize("sites", [("blocks.0.mlp.W_in",), ("blocks.0.attn.W_Q", "blocks.1.*")])
def test_where_the_first_block_is_decomposed_every_block_runs(model, tokens, sites):
    vpd = decomposition_of(model, sites=sites).double()
    assert entry_of(adapt(model), list(vpd.sites)) is None
    with MaskedModel(vpd, model) as masked_model:
        assert not masked_model.can_start_late(tokens)


def test_a_model_whose_later_blocks_read_more_than_the_residual_stream_is_noticed(model, tokens):
    """A later block adds what an earlier one has put aside: without the earlier one, the output is another."""
    vpd = decomposition_of(model, sites=("blocks.1.*",)).double()
    aside = []
    model.blocks[0].hook_resid_post.register_forward_hook(lambda *_: aside.append(1.0))
    model.blocks[1].hook_resid_post.register_forward_hook(lambda _, __, x: x + sum(aside.pop() for _ in aside[:1]))
    with MaskedModel(vpd, model) as masked_model:
        assert not masked_model.can_start_late(tokens)


@pytest.mark.parametrize("family", ["GPT-2", "Llama"])
def test_a_bridge_starts_late_too(family):
    model = build(family, "bridge")
    vpd = decomposition_of(model, sites=("blocks.1.*",)).double()
    inputs = tokens_of_family()
    with MaskedModel(vpd, model) as masked_model:
        assert masked_model.can_start_late(inputs)
        run = SitePass(collect=True)
        with torch.no_grad():
            masked_model.run(inputs, run)
            masks = masks_of(vpd, inputs)
            late, whole = (masked_model.masked(inputs, masks, start=start) for start in (run.residual, None))
    assert torch.equal(late, whole)


def test_pruning_starts_late_with_the_same_numbers(tokens, monkeypatch):
    model = tiny_model(n_layers=3)
    vpd, counts = decomposition_of(model, sites=("blocks.2.*",)).double(), ran(model)

    def result():
        counts[:] = [0, 0, 0]
        return prune(vpd, model, tokens[:1], 3, config=PruneConfig(steps=4)).importances

    late, few = result(), counts[0]
    assert few < counts[2] - 3
    monkeypatch.setattr(MaskedModel, "late_start", lambda *_: None)
    assert torch.equal(late, result()) and counts[0] == counts[2]
