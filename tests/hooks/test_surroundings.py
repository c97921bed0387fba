"""What surrounds a call: inference mode, autocast, torch.func, gradients switched off, other processes, pickles."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import signal

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

from tests.hooks.snapshots import assert_same, snapshot
from tests.tiny import decomposition_of, options_of, some_tokens, tiny_model
from tl_vpd.hooks.attachment import Attachment

MODES = ["unmasked", "stochastic", "rounded", "ci", "adversarial", "zero"]


def masked_logits(model, vpd, tokens, mode):
    with vpd.attach(model) as attached, attached.masked(mode, **options_of(mode, seed=1, steps=2)):
        return model(tokens)


@pytest.mark.parametrize("mode", MODES)
def test_inference_mode_gives_the_same(model, vpd, tokens, mode):
    expected = masked_logits(model, vpd, tokens, mode)
    with torch.inference_mode():
        assert torch.equal(masked_logits(model, vpd, tokens, mode), expected)
        ci = vpd.causal_importances(model, tokens)
        masks = vpd.adversarial_masks(model, tokens, steps=2, seed=0)
    assert torch.equal(ci.concatenated, vpd.causal_importances(model, tokens).concatenated)
    again = vpd.adversarial_masks(model, tokens, steps=2, seed=0)
    assert all(torch.equal(masks[name].mask, again[name].mask) for name in again)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_switched_off_for_everything_give_the_same_and_stay_off(model, vpd, tokens, mode):
    expected = masked_logits(model, vpd, tokens, mode)
    torch.set_grad_enabled(False)
    try:
        logits = masked_logits(model, vpd, tokens, mode)
        masks = vpd.adversarial_masks(model, tokens, steps=2, seed=0)
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    again = vpd.adversarial_masks(model, tokens, steps=2, seed=0)
    assert all(torch.equal(masks[name].mask, again[name].mask) for name in again)


def test_autocast_is_near_the_full_precision(tokens):
    model = tiny_model(torch.float32)
    vpd = decomposition_of(model)
    for mode in MODES:
        expected = masked_logits(model, vpd, tokens, mode)
        with torch.autocast("cpu", torch.bfloat16):
            plain = (model(tokens).float() - model(tokens)).abs().max()
            logits = masked_logits(model, vpd, tokens, mode)
        assert plain == 0 and logits.isfinite().all()
        assert (logits.float() - expected).norm() < 0.3 * expected.norm(), mode


def test_functional_call_uses_the_parameters_it_is_given(model, vpd, tokens):
    other = {name: p * 1.1 for name, p in model.named_parameters()}
    with vpd.attach(model):
        called = torch.func.functional_call(model, other, (tokens,))
    expected = copy.deepcopy(model)
    expected.load_state_dict({**model.state_dict(), **other})
    assert_close(called, expected(tokens))


def test_gradients_of_masks_by_torch_func(model, vpd, tokens):
    name = "blocks.1.mlp.W_in"

    def loss(mask):
        with attached.masked({name: mask}):
            return model(tokens).square().sum()

    mask = torch.full((6,), 0.5, dtype=torch.float64)
    with vpd.attach(model) as attached:
        by_func = torch.func.grad(loss)(mask)
        mask.requires_grad_()
        (by_backward,) = torch.autograd.grad(loss(mask), mask)
        with pytest.raises(TypeError, match=r"mask for blocks.1.mlp.W_in is a tensor inside torch.func.vmap: leave"):
            torch.func.vmap(loss)(torch.stack([mask.detach(), 2 * mask.detach()]))
    assert_close(by_func, by_backward)


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_results_and_decompositions_are_copied_whole(model, vpd, tokens, copied):
    ci = vpd.causal_importances(model, tokens)
    other, ci_again = copied(vpd), copied(ci)
    assert torch.equal(ci_again.concatenated, ci.concatenated) and ci_again.top(3).equals(ci.top(3))
    assert torch.equal(other.causal_importances(model, tokens).concatenated, ci.concatenated)
    masks = ci.masks("stochastic", seed=0)
    with other.attach(model) as attached, attached.masked(copied(masks)):
        logits = model(tokens)
    with vpd.attach(model) as attached, attached.masked(masks):
        assert torch.equal(model(tokens), logits)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_attachment_is_not_copied(model, vpd, copied):
    with vpd.attach(model) as attached:
        with pytest.raises(TypeError, match=r"^An attachment cannot be copied or pickled: copy model and .* again\.$"):
            copied(attached)
        vpd.attach(copy.deepcopy(model)).detach()


def in_a_process(model, vpd, tokens, queue):
    torch.set_num_threads(1)
    queue.put(vpd.causal_importances(model, tokens).concatenated.tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_gets_the_same(model, vpd, tokens, method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    with vpd.attach(model):
        process = context.Process(target=in_a_process, args=(model, vpd, tokens, queue))
        process.start()
        result = queue.get(timeout=240)
        process.join(timeout=60)
    assert process.exitcode == 0
    expected = vpd.causal_importances(model, tokens).concatenated
    assert_close(torch.tensor(result, dtype=torch.float64), expected, rtol=1e-10, atol=1e-12)


class Importances(Dataset):
    """Importances of rows, computed where the rows are loaded."""

    def __init__(self, model, vpd):
        self.model, self.vpd = model, vpd

    def __len__(self):
        return 3

    def __getitem__(self, i):
        torch.set_num_threads(1)
        return self.vpd.causal_importances(self.model, some_tokens(i)).concatenated


def test_a_data_loaders_workers_get_the_same(model, vpd):
    with vpd.attach(model):
        loaded = list(
            DataLoader(Importances(model, vpd), batch_size=None, num_workers=1, multiprocessing_context="fork")
        )
    for i, g in enumerate(loaded):
        assert_close(g, vpd.causal_importances(model, some_tokens(i)).concatenated, rtol=1e-10, atol=1e-12)


def test_ctrl_c_waits_for_a_change_and_then_interrupts(model, vpd, monkeypatch):
    before, handler = snapshot(model), signal.getsignal(signal.SIGINT)
    plain, reached = Attachment._end, []
    monkeypatch.setattr(
        Attachment, "_end", lambda self: (signal.raise_signal(signal.SIGINT), reached.append(1), plain(self))
    )
    attached = vpd.attach(model)
    with pytest.raises(KeyboardInterrupt):
        attached.detach()
    assert reached == [1] and signal.getsignal(signal.SIGINT) is handler
    assert_same(before, snapshot(model))
