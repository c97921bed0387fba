"""A plain pass that is under way in another thread is right, whatever this thread's passes put on the model meanwhile."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.analysis import GraphConfig, attribution_graph
from tl_vpd.analysis.graph.direct import DirectModel
from tl_vpd.evaluation import EvaluationConfig, evaluate
from tl_vpd.forward import MaskedModel
from tl_vpd.masking import Masks

MODES = EvaluationConfig(measures=(), budgets=(), controls=False)


@pytest.fixture(scope="module")
def target():
    model = tiny_model(n_layers=3)
    return model, decomposition_of(model, sites=("blocks.2.*",)).double(), some_tokens(), some_tokens(1)


class Halves:
    """A plain pass in another thread that stops at a HookPoint, and goes on when it is told to.

    Args:
        model: that runs.
        tokens: of the pass.
        point: where it stops.
    """

    def __init__(self, model, tokens, point):
        self.stopped, self.go, self.result = threading.Event(), threading.Event(), []

        def stop(module, arguments, output):
            if threading.current_thread() is self.thread:
                self.stopped.set()
                self.go.wait(60)

        self.handle = model.hook_dict[point].register_forward_hook(stop)
        self.thread = threading.Thread(target=lambda: self.result.append(model(tokens).detach()))
        self.thread.start()
        assert self.stopped.wait(60)

    def rest(self):
        """The output, once it has gone on."""
        self.go.set()
        self.thread.join(60)
        self.handle.remove()
        return self.result[0]


def late(vpd, model, tokens):
    with MaskedModel(vpd, model) as masked_model, masked_model.entry.at(masked_model.late_start(tokens)):
        yield model.blocks[0]


def fused(vpd, model, tokens):
    with MaskedModel(vpd, model) as masked_model, masked_model.adapter.fused_attention():
        yield model.blocks[0].attn


def without_logits(vpd, model, tokens):
    with MaskedModel(vpd, model) as masked_model, masked_model.adapter.unembedding_left_out():
        yield model.unembed


@pytest.mark.parametrize("point", ["hook_embed", "blocks.0.attn.hook_q", "blocks.1.attn.hook_attn_scores"])
@pytest.mark.parametrize("inside", [late, fused, without_logits])
def test_the_second_half_of_a_pass_is_plain(target, inside, point):
    model, vpd, tokens, others = target
    expected, halves = model(others), Halves(model, others, point)
    for changed in inside(vpd, model, tokens):
        assert {"forward", "calculate_z_scores"} & set(vars(changed))
        output = halves.rest()
    assert torch.equal(output, expected)


def checkpointed(vpd, model, tokens):
    masks = Masks({name: torch.full((C,), 0.5, dtype=torch.float64) for name, C in vpd.counts.items()})
    with MaskedModel(vpd, model) as masked_model:
        output = masked_model.masked(tokens, masks, checkpoint=True)
        return torch.autograd.grad(output.square().sum(), vpd.V["blocks.2.mlp.W_in"])[0]


def stream(vpd, model, tokens):
    with MaskedModel(vpd, model) as masked_model:
        return masked_model.late_start(tokens)


def embeddings(vpd, model, tokens):
    with DirectModel(vpd, model) as direct:
        return direct.direct(tokens).embeddings


USES = {
    "evaluation": lambda vpd, model, tokens: evaluate(vpd, model, tokens, MODES).record["kl"],
    "graph": lambda vpd, model, tokens: (
        attribution_graph(vpd, model, tokens[:1], config=GraphConfig(fixed=("norms", "patterns"))).weight
    ),
    "checkpoint": checkpointed,
    "residual stream": stream,
    "embeddings": embeddings,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("point", ["hook_embed", "blocks.2.hook_resid_mid"])
def test_passes_of_two_threads_do_not_mix(target, use, point):
    """Amid each pass of this thread another one runs the modules one after the other: a call of the model would wait."""
    model, vpd, tokens, others = target
    passes = []

    def plain():
        x = model.embed(others)
        for block in model.blocks:
            x = block(x)
        passes.append(model.unembed(model.ln_final(x)).detach())

    def between(module, arguments, output):
        if threading.current_thread() is threading.main_thread() and len(passes) < 20:
            thread = threading.Thread(target=plain)
            thread.start()
            thread.join(60)

    plain()
    expected, output = USES[use](vpd, model, tokens), passes.pop()
    handle = model.hook_dict[point].register_forward_hook(between)
    try:
        result = USES[use](vpd, model, tokens)
    finally:
        handle.remove()
    assert passes and all(torch.equal(x, output) for x in passes)
    assert torch.equal(result, expected) if isinstance(expected, torch.Tensor) else result == expected
