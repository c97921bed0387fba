"""Steps in bfloat16 are about those in float32, also inside the contexts that a run opens."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import VPDConfig
from tl_vpd.forward import MaskedModel
from tl_vpd.training import Trainer, decompose, new_decomposition, precision
from tl_vpd.training.config import ExecutionConfig
from tl_vpd.training.schedules import Schedule

CONFIG = VPDConfig(
    steps=6, batch_size=4, C=5, gamma=GAMMA, optimizer={"lr": 3e-2, "clip": None}, faithfulness={"warm_up_steps": 1}
)


@pytest.fixture(autouse=True)
def _any_processor(monkeypatch):
    """The rounding is the same on a processor without the instructions, where a user's run would be refused as slow."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)


@pytest.mark.parametrize("outer", [False, True])
def test_a_pass_computes_with_the_weights_as_they_are_now(outer):
    """Autocast keeps its copies of weights until the outermost context ends, and a run is inside one that is off."""
    model = tiny_model()
    vpd = new_decomposition(model, CONFIG)
    tokens = some_tokens(shape=(4, 6))
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(masked_model, CONFIG, (4, 6), execution=ExecutionConfig(precision="bfloat16"))
        stream = trainer.stream
        penalty = stream.minimality.penalty(Schedule.at(0, CONFIG))

        def output_of_gamma():
            return stream.engine.clean(stream.split.micro_batches[0], tokens, None, penalty).z.detach()

        with torch.autocast("cpu", enabled=False) if outer else nullcontext():
            before = output_of_gamma()
            with torch.no_grad():
                for p in vpd.gamma.parameters():
                    p.mul_(2.0)
            after = output_of_gamma()
    assert float((after - before).abs().max()) > 0.1 * float(before.abs().max())


def test_a_run_in_bfloat16_learns_what_one_in_float32_does():
    results = {}
    for how in ("float32", "bfloat16"):
        execution = ExecutionConfig(precision=how)
        run = decompose(tiny_model(), some_tokens(shape=(24, 6)), CONFIG, execution=execution, progress=False)
        results[how] = torch.cat([p.detach().flatten() for p in run.decomposition.parameters()])
    start = torch.cat([p.detach().flatten() for p in new_decomposition(tiny_model(), CONFIG).parameters()])
    moved = (results["float32"] - start).norm()
    assert float((results["bfloat16"] - results["float32"]).norm()) < 0.5 * float(moved)


def test_a_first_batch_with_padding_late_in_a_compiled_run():
    """Its graphs are recorded then, and compared with what the weights of that time give."""
    model, tokens = tiny_model(torch.float32), some_tokens(shape=(4, 6))
    padded = torch.ones(4, 6, dtype=torch.bool)
    padded[1, -1] = False
    execution = ExecutionConfig(precision="bfloat16", compile="recorded")
    with MaskedModel(new_decomposition(model, CONFIG), model) as masked_model, torch.autocast("cpu", enabled=False):
        trainer = Trainer(masked_model, CONFIG, (4, 6), execution=execution)
        for token_mask in (None, None, None, padded):
            trainer.step(tokens, token_mask)
    assert trainer.done == 4 and all(torch.isfinite(p).all() for p in trainer.decomposition.parameters())
