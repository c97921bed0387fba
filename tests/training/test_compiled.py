"""Recorded graphs (which need no compiler) give the eager engine's steps; what cannot be compiled is refused in a sentence.

``test_reference`` compares recorded graphs and Inductor's with the method on one page.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.marks import needs_bridge
from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import VPDConfig, bundled, decompose
from tl_vpd.adapters import Unsupported
from tl_vpd.adapters.versions import HookedRootModule, HookPoint
from tl_vpd.baselines import SPDConfig
from tl_vpd.forward import MaskedModel
from tl_vpd.training import Trainer, new_decomposition
from tl_vpd.training.config import Coefficients, ExecutionConfig, SavingConfig
from tl_vpd.training.engine.compiled import CompiledEngine
from tl_vpd.training.engine.recording import RECORDED, compiled

SOME = ("*W_Q", "*W_V", "*W_out")
MORE = {
    "all sites": {"sites": None},
    "stochastic alone": {"coefficients": Coefficients(adversarial=0.0)},
    "layerwise": {"coefficients": Coefficients(layerwise=1.0)},
    "a forward slope": {"kind": SPDConfig, "forward_slope": 0.1, "gamma": {**GAMMA, "output_bias": -0.5}},
    "two chunks of Γ": {"gamma": {**GAMMA, "kind": "chunked_transformers", "chunk": 4}},
    "small MLPs": {"gamma": {"kind": "per_subcomponent_mlps", "hidden": 3}},
}


def steps(compile, token_mask=None, model=None, how=None, batches=None, **settings):
    """Two steps in float64: metrics, parameters, sources, and the passes."""
    model = model or tiny_model()
    batches = batches or [some_tokens(seed=i, shape=(4, 6)) for i in range(2)]
    rows = len(batches[0])
    own = {
        "steps": 10,
        "batch_size": rows,
        "C": 5,
        "gamma": GAMMA,
        "faithfulness": {"warm_up_steps": 1},
        "sites": SOME,
        **settings,
    }
    config = own.pop("kind", VPDConfig)(**own)
    vpd = new_decomposition(model, config).double()
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(
            masked_model, config, (rows, batches[0].shape[1]), execution=ExecutionConfig(compile=compile, **(how or {}))
        )
        trainer.warm_up()
        metrics = [trainer.step(tokens, token_mask) for tokens in batches]
    return metrics, {k: p.detach() for k, p in vpd.named_parameters()}, trainer.sources.values, trainer.engine


def same(plain, compiled, rel=1e-9):
    """Raises where two results differ by more than rounding."""
    for a, b in zip(plain[0], compiled[0], strict=True):
        for field in ("total", "stochastic", "adversarial", "importance", "frequency", "layerwise", "l0", "grad_norm"):
            assert getattr(b, field) == pytest.approx(getattr(a, field), rel=rel, abs=1e-12), field
    for k, value in plain[1].items():
        assert_close(compiled[1][k], value, rtol=1e-7, atol=1e-8, msg=k)
    assert_close(compiled[2], plain[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MORE)
def test_recorded_steps_are_the_plain_ones(name):
    settings = MORE[name]
    plain, recorded = steps(False, **settings), steps(RECORDED, **settings)
    assert isinstance(recorded[3], CompiledEngine) and not isinstance(plain[3], CompiledEngine)
    same(plain, recorded)
    recordings = [key[0][0] if isinstance(key[0], tuple) else key[0] for key in recorded[3].graphs]
    gamma = {"small MLPs", "small MLPs, backward"} if name == "small MLPs" else {"gamma"}
    assert {"weights", "clean", "counts", "masked", "pullback"} | gamma == set(recordings) - {"ascend"}
    # The second step makes none anew.
    assert recordings.count("clean") == recordings.count("pullback") == 1


def test_large_mlps_of_gamma_run_as_they_are():
    settings = {"gamma": {"kind": "per_subcomponent_mlps", "hidden": 40}}
    plain, recorded = steps(False, **settings), steps(RECORDED, **settings)
    same(plain, recorded)
    assert not any("MLPs" in str(key[0]) for key in recorded[3].graphs)


LONG = {"batches": [some_tokens(seed=i, shape=(8, 8)) for i in range(2)]}
EVERYWHERE = {"adversary": {"routing": "uniform_k"}, "coefficients": Coefficients(layerwise=1.0)}


def masked_graphs(engine):
    return [key for key in engine.graphs if isinstance(key[0], tuple) and key[0][0] == "masked"]


ROUTED = {
    "the paper's": ({}, {}),
    "in parts": ({}, {"micro_batch": 3}),
    "the adversary's too": (EVERYWHERE, {}),
    "merged": ({"merged": 0.5, "adversary": {"pool": 2}}, {}),
}


@pytest.mark.parametrize(("settings", "how"), ROUTED.values(), ids=ROUTED)
def test_routed_tokens_alone_are_computed(settings, how):
    plain, recorded = (steps(c, how=how, **LONG, **settings) for c in (False, RECORDED))
    same(plain, recorded)
    # 8 rows of 8 tokens, 6 sites: 37.3 tokens are expected at a site, and 4 standard deviations of 3.94 more make 56 slots.
    if not how and not settings:
        assert {56} == {a[0][1] for key in masked_graphs(recorded[3]) for a in key[1] if a and a[0] == (6, 56)}


def test_a_model_whose_sites_share_a_head_is_routed_too():
    model = [tiny_model(n_key_value_heads=1, ungroup_grouped_query_attention=True) for _ in range(2)]
    same(*(steps(c, model=m, **LONG, **EVERYWHERE) for c, m in zip((False, RECORDED), model, strict=True)))


def test_a_pass_with_more_routed_tokens_than_slots_runs_as_it_is(monkeypatch):
    monkeypatch.setattr("tl_vpd.training.engine.masked_graph.ROOM", -4.0)
    plain, recorded = steps(False, **LONG), steps(RECORDED, **LONG)
    same(plain, recorded)
    assert len(masked_graphs(recorded[3])) == 2  # the adversary's own pass and the adversarial one
    assert len(masked_graphs(steps(RECORDED, stochastic_routing="all")[3])) == 3
    plain, recorded = (steps(c, **LONG, **EVERYWHERE) for c in (False, RECORDED))
    same(plain, recorded)
    assert len(masked_graphs(recorded[3])) == 6  # layerwise ones alone


def test_micro_batches_and_padding_are_recorded_too():
    how = {"micro_batch": 3}
    token_mask = torch.ones(4, 6, dtype=torch.bool)
    token_mask[0, :3] = token_mask[3, :1] = False
    same(steps(False, token_mask, how=how), steps(RECORDED, token_mask, how=how))


def test_heads_that_share_a_weight_are_recorded():
    models = [tiny_model(n_key_value_heads=1, ungroup_grouped_query_attention=True) for _ in range(2)]
    same(steps(False, model=models[0]), steps(RECORDED, model=models[1]))


class Vectors(HookedRootModule):
    """Two products on vectors; ``twist`` stands between them."""

    def __init__(self, twist):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64)
        self.hook_middle, self.twist = HookPoint(), twist
        self.setup()

    def forward(self, x):
        return self.second(self.hook_middle(self.twist(self.first(x))))


@pytest.mark.parametrize("shape", [(4, 3, 4), (4, 4)])
def test_models_of_vectors_are_recorded(shape):
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]
    if len(shape) == 2:
        batches = [x[:, None] for x in batches]
    found = [steps(c, model=Vectors(torch.relu), batches=batches, output="mse", sites=None) for c in (False, RECORDED)]
    same(*found)


def test_a_model_whose_operations_depend_on_its_data_is_refused():
    def by_size(x):
        return x if float(x.flatten()[0]) > 1e9 else x.relu()

    batches = [torch.randn(4, 3, 4, dtype=torch.float64)]
    with pytest.raises(Unsupported, match=r"leave compile out"):
        steps(RECORDED, model=Vectors(by_size), batches=batches, output="mse", sites=None)


def test_a_compiler_that_fails_is_named_with_the_way_round_it():
    with pytest.raises(Unsupported, match=r"cannot be compiled \(.*nowhere.*\): use compile='recorded', or leave"):
        compiled(lambda x: x * 2, [torch.ones(2)], "nowhere", 1e-3, gradients=False)


def test_a_recording_that_gives_something_else_on_other_data_is_refused():
    seen = []

    def first_only(x):
        seen.append(x.detach().clone() if not seen else None)
        return x + seen[0] if len(seen) > 1 else x

    with pytest.raises(Unsupported, match=r"off by .* on other data"):
        compiled(first_only, [torch.arange(3.0)], RECORDED, 1e-3, gradients=False)


def test_a_loss_that_is_not_finite_is_said_to_be_that_and_not_the_compilers_fault():
    model = tiny_model()
    with torch.no_grad():
        model.unembed.W_U.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="not finite"):
        steps(RECORDED, model=model)


def test_arguments_that_are_written_into_are_compared_as_well():
    made = compiled(lambda x, y: x.add_(y), [torch.ones(2), torch.ones(2)], RECORDED, 1e-3, gradients=False)
    x = torch.arange(2.0)
    made(x, torch.tensor([5.0, 7.0]))
    assert_close(x, torch.tensor([5.0, 8.0]))


@pytest.mark.parametrize(
    ("how", "settings", "message"),
    [
        ({"checkpoint": True}, {}, "compile=True cannot be combined with checkpoint=True"),
        ({}, {"dtype": torch.bfloat16}, r"needs a target in the dtype of V and U"),
    ],
)
def test_what_does_not_go_with_compiling_is_said(how, settings, message):
    model = tiny_model(**{"dtype": torch.float32, **settings})
    config = VPDConfig(steps=2, batch_size=4, C=5, gamma=GAMMA)
    vpd = new_decomposition(model, config)
    with MaskedModel(vpd, model) as masked_model, pytest.raises((ValueError, Unsupported), match=message):
        Trainer(masked_model, config, (4, 6), execution=ExecutionConfig(compile=True, **how))


def test_a_compiled_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    rows = some_tokens(shape=(12, 6))
    config = VPDConfig(steps=4, batch_size=4, C=5, gamma=GAMMA, faithfulness={"warm_up_steps": 2})
    options = {"execution": ExecutionConfig(compile=RECORDED), "progress": False}
    saving = SavingConfig(folder=tmp_path, save_every=2)
    whole = decompose(tiny_model(dtype=torch.float32), rows, config, **options)
    step = Trainer.step

    def killed(self, *arguments):
        if self.done == 3:
            raise SystemError("killed")
        return step(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(SystemError):
        patched.setattr(Trainer, "step", killed)
        decompose(tiny_model(dtype=torch.float32), rows, config, saving=saving, **options)
    again = decompose(tiny_model(dtype=torch.float32), rows, config, saving=saving, resume=True, **options)
    for a, b in zip(whole.decomposition.parameters(), again.decomposition.parameters(), strict=True):
        assert torch.equal(a, b)


@needs_bridge
def test_a_bridge_is_recorded_too():
    rows = bundled.tokens("validation")[:8, :12]
    config = VPDConfig(
        steps=2,
        batch_size=4,
        C=8,
        gamma=GAMMA,
        faithfulness={"warm_up_steps": 1},
        sites=("*blocks.1*",),
    )
    plain, recorded = (
        decompose(
            bundled.model(kind="bridge"),
            rows,
            config,
            execution=ExecutionConfig(compile=compile),
            saving=SavingConfig(log_every=1),
            progress=False,
        ).history
        for compile in (False, RECORDED)
    )
    for column in ("total", "stochastic", "adversarial", "importance", "l0"):
        assert recorded[column].tolist() == pytest.approx(plain[column].tolist(), rel=1e-5), column
