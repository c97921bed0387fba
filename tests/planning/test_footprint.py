"""Bytes and FLOPs from shapes alone, against parameters, tensors and products as they are."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import ExecutionConfig, VPDConfig
from tl_vpd.forward import MaskedModel
from tl_vpd.planning import Target, TransformerShape, footprint
from tl_vpd.training import Trainer, new_decomposition
from tl_vpd.training.engine import left_out_logits

CONFIG = VPDConfig(steps=9, batch_size=4, C=5, gamma=GAMMA, stochastic_routing="all")
WIDE = VPDConfig(C=64, batch_size=8)
ATEN = torch.ops.aten
OPERATIONS = {
    ATEN.addmm_: lambda target, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1],
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad, q, k, v
    ),
}
"""What torch's counter leaves out on a CPU."""


def trained(config: VPDConfig, micro_batch: int | None = None, **flags):
    """A trainer after one step, the FLOPs of the next, and the footprint of its shapes."""
    model = tiny_model(dtype=torch.float32, **flags)
    decomposition = new_decomposition(model, config)
    tokens, execution = some_tokens(shape=(4, 6)), ExecutionConfig(micro_batch=micro_batch)
    with MaskedModel(decomposition, model) as masked_model:
        trainer = Trainer(masked_model, config, (4, 6), execution=execution)
        trainer.step(tokens)
        with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
            trainer.step(tokens)
    result = footprint(Target.of(model), config, context=6, execution=execution)
    return trainer, counter.get_total_flops(), result


def changed(**update) -> VPDConfig:
    return VPDConfig(**{**CONFIG.model_dump(), **update})


@pytest.mark.parametrize(
    ("config", "micro_batch", "flags"),
    [
        (CONFIG, None, {}),
        (CONFIG, 2, {}),
        (CONFIG, None, dict(gated_mlp=True, act_fn="silu", n_heads=4, d_head=2, rotary_dim=2)),
        (changed(merged=0.5, adversary={"pool": 3}), None, {}),
        (changed(adversary={"inner_steps": 1}, C={"*.W_[QK]": 3, "*.W_[VO]": 7, "*.W_in": 2, "*.W_out": 4}), None, {}),
        (changed(gamma={**GAMMA, "kind": "chunked_transformers", "chunk": 5}), None, {}),
        (changed(gamma={**GAMMA, "reads": "residual"}), None, {}),
        (changed(gamma={**GAMMA, "kind": "chunked_transformers", "chunk": 5, "reads": "residual"}), None, {}),
        (changed(optimizer={"kind": "muon"}), None, {}),
        (changed(gamma={"kind": "per_site_mlps", "hidden": 6}), None, {}),
        (changed(gamma={"kind": "global_mlp", "hidden": 6}), None, {}),
        (changed(gamma={"kind": "per_subcomponent_mlps", "hidden": 6}), None, {}),
        (changed(coefficients={"adversarial": 0.0}), None, {}),
        (changed(sites=("blocks.1.attn.*", "blocks.1.mlp.*")), None, {}),
    ],
)
def test_flops_and_bytes_are_those_of_a_step(config, micro_batch, flags):
    trainer, flops, result = trained(config, micro_batch, **flags)
    assert result.step_flops == flops
    decomposition = trainer.decomposition
    assert result.counts["components"] == sum(p.numel() for p in decomposition.components.parameters())
    assert result.counts["gamma"] == sum(p.numel() for p in decomposition.gamma.parameters())
    moments = [t for o in trainer.optimizers for state in o.state.values() for t in state.values() if t.ndim]
    assert result.bytes["moments"] == sum(t.numel() * 4 for t in moments)
    assert (
        result.bytes["parameters"]
        == result.bytes["gradients"]
        == sum(p.numel() * 4 for p in decomposition.parameters())
    )
    assert result.counts["sources"] == trainer.sources.values.numel()
    assert result.bytes["target"] == sum(p.numel() * 4 for p in trainer.masked_model.model.parameters())


@pytest.mark.parametrize(("config", "micro_batch"), [(CONFIG, None), (CONFIG, 2), (changed(merged=0.5), None)])
def test_flops_are_those_of_a_step_with_logits_in_blocks(config, micro_batch, monkeypatch):
    monkeypatch.setattr(left_out_logits, "LARGE", 0)
    trainer, flops, result = trained(config, micro_batch)
    assert trainer.engine.unembedding is not None
    assert result.step_flops == flops


def test_logits_in_blocks_do_not_grow_with_the_tokens():
    small, large = (footprint(gpt2(), VPDConfig(C=8, batch_size=n), context=512).bytes["logits"] for n in (4, 64))
    assert small == 3 * 4 * (2**24 + 4 * 512 * 768)
    assert large - small == 3 * 4 * 60 * 512 * 768
    below = footprint(gpt2(), VPDConfig(C=8, batch_size=1), context=512).bytes["logits"]
    assert below == 512 * 50257 * 12


def test_uniform_k_routing_costs_its_expected_share():
    gpt = {"C": 8, "batch_size": 2}
    everywhere, some = (
        footprint(gpt2(), c, context=8).flops for c in (changed(**gpt), changed(**gpt, stochastic_routing="uniform_k"))
    )
    products = 3 * 2 * 16 * 8 * sum(s.d_in + s.d_out for s in gpt2().sites)
    first = 2 * 16 * 8 * 3 * 768  # what Q, K and V of block 0 read wants no gradient
    assert everywhere["stochastic pass"] - some["stochastic pass"] == pytest.approx((products - first) * (1 - 73 / 144))


def gpt2() -> Target:
    return Target.of(TransformerShape(layers=12, d_model=768, heads=12, d_mlp=3072, vocabulary=50257))


def test_shapes_of_a_model_and_numbers_given_outright_agree():
    model = tiny_model(dtype=torch.bfloat16, n_heads=2, n_key_value_heads=1, gated_mlp=True, act_fn="silu")
    target = Target.of(model)
    weights = sum(s.d_in * s.d_out for s in target.sites) + 2 * 8 * 11
    numbers = dict(layers=2, d_model=8, heads=2, d_mlp=12, vocabulary=11, kv_heads=1, gated=True, itemsize=2)
    given = Target.of(TransformerShape(**numbers, others=target.parameters - weights))
    assert {s.name: (s.d_in, s.d_out) for s in given.sites} == {s.name: (s.d_in, s.d_out) for s in target.sites}
    one, other = (footprint(t, VPDConfig(C=4, gamma=GAMMA, batch_size=2), context=5) for t in (target, given))
    assert one.bytes == other.bytes
    assert one.step_flops == other.step_flops


def test_gpt2_has_as_many_parameters_as_it_has():
    assert sum(s.d_in * s.d_out for s in gpt2().sites) == 12 * 12 * 768**2
    with pytest.raises(TypeError, match="Linear is not a transformer"):
        Target.of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("sharding", ["none", "optimizer", "full"])
def test_processes_divide_what_they_share(sharding):
    one = footprint(gpt2(), WIDE, context=32)
    four = footprint(gpt2(), WIDE, context=32, processes=4, execution=ExecutionConfig(sharding=sharding))
    assert four.bytes["sources"] * 4 == one.bytes["sources"]
    assert four.bytes["target"] == one.bytes["target"]
    gathered = (
        4 * (12 * (5 * 768 + 3072) + 1) * 1536
    )  # Γ's first projection, which reads every site's input, and its bias
    whole = {
        "none": dict.fromkeys(("moments", "parameters", "gradients"), 0),
        "optimizer": {"moments": 0, "parameters": one.bytes["parameters"], "gradients": gathered},
        "full": {"moments": 0, "parameters": 2 * gathered, "gradients": gathered},
    }[sharding]
    for part, more in whole.items():
        split = one.bytes[part] / (1 if sharding == "none" else 4)
        assert split + more - 8 <= four.bytes[part] <= split + more + 8, part
    with pytest.raises(ValueError, match="batch_size 8 cannot be split among 3 processes"):
        footprint(gpt2(), WIDE, context=32, processes=3)


def test_micro_batches_save_memory_and_cost_a_second_look():
    whole = footprint(gpt2(), WIDE, context=32)
    parts = footprint(gpt2(), WIDE, context=32, execution=ExecutionConfig(micro_batch=2))
    for part in ("values of gamma", "logits", "masked pass", "gamma's activations"):
        assert parts.bytes[part] < 0.5 * whole.bytes[part] + 2 * 4 * sum(s.d_in * s.d_out for s in gpt2().sites)
    assert parts.flops["clean pass"] == 2 * whole.flops["clean pass"]


def test_the_table_has_a_row_a_part():
    table = footprint(gpt2(), WIDE, context=32).table().set_index("part")
    parts = table.index.get_loc("memory")
    assert table["GiB"][:parts].sum() == pytest.approx(table["GiB"]["memory"])
    assert table["GFLOP"][parts + 1 : -1].sum() == pytest.approx(table["GFLOP"]["step"])
