"""Layerwise reconstruction, inputs that are vectors, and data without end."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.adapters.custom_models import TwoLayers, normal, seeded
from tl_vpd import Decomposition, VPDConfig
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.importance import lower_leaky
from tl_vpd.training import Coefficients, ExecutionConfig, SavingConfig, Trainer, decompose, new_decomposition
from tl_vpd.training.data import batches_of

GAMMA = dict(kind="per_subcomponent_mlps", hidden=4, output_bias=0.5)
ALONE = Coefficients(delta=0, stochastic=0, adversarial=0, importance=0, frequency=0, layerwise=1)


def config(**settings) -> VPDConfig:
    return VPDConfig(
        **{
            **dict(
                steps=4,
                batch_size=3,
                C=5,
                gamma=GAMMA,
                faithfulness={"warm_up_steps": 0},
                output="mse",
            ),
            **settings,
        }
    )


def one_site_masked(
    model: TwoLayers, vpd: Decomposition, x: torch.Tensor, site: str, sources: torch.Tensor
) -> torch.Tensor:
    """The output with a separate edited weight for each input at one site."""
    W = {"fc": model.fc.weight.T, "head.out": model.head.out.weight.T}
    with torch.no_grad():
        inputs = {"fc": x, "head.out": model.fc(x).relu()}
        g = vpd.site_axis.split_sites(lower_leaky(vpd.pre_sigmoid(inputs)))[site]
        outputs = []
        for row, importances, r in zip(x, g, sources, strict=True):
            V, U = vpd.V[site], vpd.U[site]
            mask = importances + (1 - importances) * r[:-1]
            edited = dict(W)
            edited[site] = (V * mask) @ U + r[-1] * (W[site] - V @ U)
            outputs.append((row @ edited["fc"] + model.fc.bias).relu() @ edited["head.out"])
    return torch.stack(outputs)


def test_the_layerwise_loss_is_the_mean_over_sites_of_the_error_with_that_site_masked():
    model = seeded(TwoLayers).float()
    vpd = new_decomposition(model, config(coefficients=ALONE))
    x = normal(3, 1, 4).float()
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(masked_model, config(coefficients=ALONE), (3, 1))
        drawn = trainer.stream.sampler.sources("layerwise", 0, range(3)).flatten(0, 1)
        sources = {"fc": drawn[:, [*range(5), 10]], "head.out": drawn[:, [*range(5, 10), 11]]}
        target = model(x[:, 0])
        errors = [
            (one_site_masked(model, vpd, x[:, 0], site, source) - target).square().mean()
            for site, source in sources.items()
        ]
        metrics = trainer.step(x)
    assert metrics.layerwise == pytest.approx(float(sum(errors) / 2), rel=1e-5)
    assert metrics.total == pytest.approx(metrics.layerwise, rel=1e-6) and metrics.layerwise > 1e-3


@pytest.mark.parametrize("merged", [0.0, 0.5])
def test_parts_of_a_batch_give_the_layerwise_loss_of_the_whole(merged):
    x, results = normal(4, 2, 4).float(), []
    settings = config(batch_size=4, coefficients=Coefficients(layerwise=0.7), merged=merged, stochastic_routing="all")
    for micro_batch in (None, 2):
        model = seeded(TwoLayers).float()
        with MaskedModel(vpd := new_decomposition(model, settings), model) as masked_model:
            metrics = Trainer(masked_model, settings, (4, 2), execution=ExecutionConfig(micro_batch=micro_batch)).step(
                x
            )
        results.append((metrics.layerwise, metrics.total, metrics.grad_norm, vpd.V["fc"].detach().clone()))
    assert results[0][:3] == pytest.approx(results[1][:3], rel=1e-4)
    assert_close(results[0][3], results[1][3], atol=2e-3, rtol=0)


def test_without_the_coefficient_nothing_is_drawn_for_it():
    model = seeded(TwoLayers).float()
    with MaskedModel(new_decomposition(model, config()), model) as masked_model:
        trainer = Trainer(masked_model, config(), (3, 1))
        drawn, draw = [], trainer.stream.sampler.sources
        trainer.stream.sampler.sources = lambda what, *rest: drawn.append(what) or draw(what, *rest)
        assert trainer.step(normal(3, 1, 4).float()).layerwise == 0
    assert drawn == ["stochastic"]


@pytest.mark.parametrize("settings", [{}, dict(coefficients=Coefficients(layerwise=1)), dict(merged=0.5, batch_size=4)])
def test_vectors_without_positions_are_sequences_of_one(settings):
    values, results = config(**settings), []
    data = normal(values.batch_size * 2, 4).float()
    for rows in (data, data[:, None]):
        model = seeded(TwoLayers).float()
        run = decompose(model, rows, values, saving=SavingConfig(log_every=1), progress=False)
        results.append((run.history, run.decomposition))
    assert_close(results[0][0].to_numpy(), results[1][0].to_numpy(), rtol=1e-4, atol=1e-7)
    assert_close(results[0][1].V["fc"], results[1][1].V["fc"], rtol=0, atol=1e-3)


def test_a_memory_mapped_file_of_vectors_is_read_row_by_row(tmp_path):
    rows = normal(12, 4).float().numpy()
    np.save(tmp_path / "rows.npy", rows)
    mapped = batches_of(np.load(tmp_path / "rows.npy", mmap_mode="r"), 3, seed=1)
    plain = batches_of(torch.from_numpy(rows), 3, seed=1)
    assert mapped.context == plain.context == 1
    assert torch.equal(mapped.at(5), plain.at(5)) and mapped.at(5).dtype == torch.float32


class Endless:
    """Vectors that follow from the step."""

    context, batch_size = 2, 3

    def at(self, step: int) -> torch.Tensor:
        return normal(3, 2, 4, seed=step).float()

    def describe(self) -> dict:
        return {"rows": "endless", "context": 2}

    def close(self) -> None:
        pass


def test_data_without_end_give_the_batch_of_each_step_and_a_run_resumes_on_them(tmp_path):
    model, settings = seeded(TwoLayers).float(), config(coefficients=Coefficients(layerwise=1))
    whole = decompose(copy.deepcopy(model), Endless(), settings, progress=False)
    half = decompose(
        model, Endless(), settings, saving=SavingConfig(folder=tmp_path, save_every=2, keep_states=5), progress=False
    )
    for late in tmp_path.glob("state/*0004*"):
        late.unlink()
    resumed = decompose(model, Endless(), settings, saving=SavingConfig(folder=tmp_path), resume=True, progress=False)
    for a, b, c in zip(*(r.decomposition.parameters() for r in (whole, half, resumed)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(ValueError, match="batches of 3 rows and batch_size is 4: give both the same number"):
        decompose(model, Endless(), config(batch_size=4))


def test_a_scaled_start_is_the_start_times_the_scale():
    model = seeded(TwoLayers).float()
    whole, small = (new_decomposition(model, config(init_scale=scale)) for scale in (1.0, 0.25))
    for site in whole.sites:
        assert torch.equal(small.V[site], 0.25 * whole.V[site]) and torch.equal(small.U[site], 0.25 * whole.U[site])
    assert torch.equal(small.gamma.w_in, whole.gamma.w_in)


def test_a_state_written_before_a_setting_existed_can_be_resumed(tmp_path, monkeypatch):
    model, settings = seeded(TwoLayers).float(), config()
    dumped = VPDConfig.model_dump_json

    def older(self) -> str:
        import json

        plain = json.loads(dumped(self))
        del plain["coefficients"]["layerwise"]
        return json.dumps(plain)

    with monkeypatch.context() as patch:
        patch.setattr(VPDConfig, "model_dump_json", older)
        decompose(
            model,
            Endless(),
            settings,
            saving=SavingConfig(folder=tmp_path, save_every=2, keep_states=5),
            progress=False,
        )
    for late in tmp_path.glob("state/*0004*"):
        late.unlink()
    assert decompose(
        model, Endless(), settings, saving=SavingConfig(folder=tmp_path), resume=True, progress=False
    ).finished


@pytest.mark.parametrize("as_array", [False, True])
def test_vectors_in_another_dtype_than_the_models_are_refused(as_array, tmp_path):
    x = normal(8, 4)
    saving = SavingConfig(folder=tmp_path / "run")
    message = r"vectors in torch.float64 and the model is in torch.float32: convert either, such as with data.astype"
    with pytest.raises(ValueError, match=message):
        decompose(seeded(TwoLayers).float(), x.numpy() if as_array else x, config(), saving=saving, progress=False)
    assert not (tmp_path / "run").exists()
    assert decompose(seeded(TwoLayers), x, config(), progress=False).finished


def test_how_outputs_of_a_custom_model_are_compared_must_be_said(tmp_path):
    settings = config().model_dump()
    del settings["output"]
    saving = SavingConfig(folder=tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"outputs of a TwoLayers .* output='kl' in VPDConfig .*, and output='mse' where not\.$"
    ):
        decompose(seeded(TwoLayers), normal(8, 4), VPDConfig(**settings), saving=saving, progress=False)
    assert not (tmp_path / "run").exists()
