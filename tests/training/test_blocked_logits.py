"""Logits that are made for a few tokens at a time give the losses and gradients of whole ones, and never stand whole."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.analysis.test_graph import BRIDGES, case
from tests.tiny import GAMMA, some_tokens, tiny_model
from tests.training.test_compiled import Vectors, same, steps
from tests.training.test_trainer import SETTINGS
from tl_vpd import VPDConfig
from tl_vpd.adapters import Unsupported, adapt
from tl_vpd.forward import MaskedModel
from tl_vpd.losses import unembedding as module
from tl_vpd.training import ExecutionConfig, Trainer, new_decomposition
from tl_vpd.training.engine.recording import RECORDED


@pytest.fixture(autouse=True)
def _two_tokens_at_once(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 4 * 22)


@pytest.mark.parametrize("compile", [False, RECORDED])
@pytest.mark.parametrize("name", ["paper", "merged", "stochastic alone"])
def test_steps_are_those_with_whole_logits(name, compile):
    whole = steps(False, how={"blocked_logits": False}, **SETTINGS[name])
    blocked = steps(compile, how={"blocked_logits": True}, **SETTINGS[name])
    assert whole[3].unembedding is None and blocked[3].unembedding is not None
    same(whole, blocked)


@pytest.mark.parametrize("how", [{"checkpoint": True}, {"micro_batch": 2}], ids=str)
def test_with_other_options(how):
    same(steps(False), steps(False, how={"blocked_logits": True, **how}))


def test_with_padding():
    token_mask = torch.ones(4, 6, dtype=torch.bool)
    token_mask[1, 4:] = token_mask[3, 2:] = False
    for compile in (False, RECORDED):
        same(steps(False, token_mask=token_mask), steps(compile, token_mask=token_mask, how={"blocked_logits": True}))


@pytest.mark.parametrize("flags", [{"d_vocab_out": 5}, {"normalization_type": "RMS"}], ids=str)
def test_with_other_models(flags):
    whole, blocked = (steps(False, model=tiny_model(**flags), how={"blocked_logits": b}) for b in (False, True))
    same(whole, blocked)


def test_with_a_model_in_float32():
    whole, blocked = (steps(False, model=tiny_model(torch.float32), how={"blocked_logits": b}) for b in (False, True))
    for field in ("total", "stochastic", "adversarial"):
        assert getattr(blocked[0][0], field) == pytest.approx(getattr(whole[0][0], field), rel=1e-5), field


@pytest.mark.parametrize("name", BRIDGES)
def test_with_bridges(name):
    models = [case(name)[0] for _ in range(2)]
    tokens = [torch.randint(3, 11, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    whole, blocked = (
        steps(False, model=model, how={"blocked_logits": b}, batches=tokens, sites=None)
        for model, b in zip(models, (False, True), strict=True)
    )
    assert blocked[3].unembedding is not None
    same(whole, blocked)


class Largest(TorchDispatchMode):
    """Notes the sizes of all results that end in the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[-1] == 11:
            self.rows = max(self.rows, result.numel() // 11)
        return result


def test_logits_never_stand_whole():
    # 24 tokens; the check on one row makes 6 tokens' logits, once; W_U of width 8 is no logits.
    rows = {}
    for blocked in (False, True):
        with Largest() as largest:
            steps(False, how={"blocked_logits": blocked})
        rows[blocked] = largest.rows
    assert rows[False] >= 24 and rows[True] <= 8


def test_they_are_made_in_blocks_where_there_are_many(monkeypatch):
    assert steps(False)[3].unembedding is None
    monkeypatch.setattr("tl_vpd.training.engine.left_out_logits.LARGE", 4 * 6 * 11 * 4 - 1)
    assert steps(False)[3].unembedding is not None
    monkeypatch.setattr("tl_vpd.training.engine.left_out_logits.LARGE", 4 * 6 * 11 * 4)
    assert steps(False)[3].unembedding is None


def capped():
    return tiny_model(output_logits_soft_cap=2.0)


def hooked():
    model = tiny_model()
    model.unembed.register_forward_hook(lambda module, arguments, output: output * 2)
    return model


@pytest.mark.parametrize("make", [capped, hooked])
def test_logits_that_are_more_than_a_product_are_left_whole(make, monkeypatch):
    with pytest.raises(Unsupported, match=r"blocked_logits=True needs a model whose logits are unembed's product"):
        steps(False, model=make(), how={"blocked_logits": True})
    whole = steps(False, model=make())
    monkeypatch.setattr("tl_vpd.training.engine.left_out_logits.LARGE", 0)
    unasked = steps(False, model=make())
    assert unasked[3].unembedding is None
    same(whole, unasked)


def test_a_model_of_ones_own_has_no_unembedding():
    model = Vectors(torch.relu)
    assert adapt(model).unembedding() is None
    batches = [torch.randn(4, 3, 4, dtype=torch.float64)]
    with pytest.raises(Unsupported, match="leave blocked_logits out"):
        steps(False, model=model, batches=batches, sites=None, how={"blocked_logits": True})


def test_outputs_that_are_no_logits_are_said_to_be_that():
    batches = [torch.randn(4, 3, 4, dtype=torch.float64)]
    with pytest.raises(ValueError, match=r"goes with output='kl'"):
        steps(False, model=Vectors(torch.relu), batches=batches, sites=None, output="mse", how={"blocked_logits": True})


def test_in_bfloat16_it_is_the_same_to_its_rounding():
    losses = []
    for blocked in (False, True):
        model = tiny_model(dtype=torch.float32)
        config = VPDConfig(steps=2, batch_size=4, C=5, gamma=GAMMA, faithfulness={"warm_up_steps": 0})
        with MaskedModel(new_decomposition(model, config), model) as masked_model:
            trainer = Trainer(
                masked_model, config, (4, 6), execution=ExecutionConfig(precision="bfloat16", blocked_logits=blocked)
            )
            losses.append(trainer.step(some_tokens(shape=(4, 6))))
    assert losses[1].stochastic == pytest.approx(losses[0].stochastic, rel=0.1)
    assert losses[1].grad_norm == pytest.approx(losses[0].grad_norm, rel=0.1)


def test_the_model_is_put_back():
    model = tiny_model()
    before = model(some_tokens())
    steps(False, model=model, how={"blocked_logits": True})
    assert "forward" not in model.unembed.__dict__
    assert torch.equal(model(some_tokens()), before)
