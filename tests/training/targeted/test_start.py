"""Where a targeted run of a few prompts starts: exact on the prompts, and as silent as possible elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny import some_tokens, tiny_model
from tests.training.a_run import PROMPTS, TARGETED
from tl_vpd import decompose_targeted
from tl_vpd.forward import MaskedModel
from tl_vpd.masking import constant_masks
from tl_vpd.training import TargetedConfig
from tl_vpd.training.targeted.start import RIDGE, different, readers, readers_of_dataset

SETTINGS = {"init": "target", "C": 10, "steps": 1, "optimizer": {"lr": 1e-12}, "decay": 0.0}


def config_of(**changes):
    return TargetedConfig(**TARGETED.model_dump(exclude_unset=True) | SETTINGS | changes)


def test_readers_pass_each_input_once_and_read_others_least():
    generator = np.random.default_rng(0)
    X, x = generator.normal(size=(3, 7)), generator.normal(size=(50, 7)) * np.arange(1, 8)
    S = x.T @ x / 50
    V = readers(torch.tensor(X), torch.tensor(S)).numpy()
    np.testing.assert_allclose(X @ V, np.eye(3), atol=1e-10)
    R = np.linalg.inv(S + RIDGE * S.diagonal().mean() * np.eye(7))
    np.testing.assert_allclose(V, R @ X.T @ np.linalg.inv(X @ R @ X.T), atol=1e-10)
    least = np.square(x @ V).sum()
    for _ in range(20):  # of all V that pass the inputs: moved along what the inputs do not read
        move = generator.normal(size=(7, 3))
        move -= np.linalg.pinv(X) @ X @ move
        assert np.square(x @ (V + 0.1 * move)).sum() > least


def test_repeated_inputs_are_one():
    X = torch.tensor([[1.0, 0.0], [1.0, 1e-5], [0.0, 1.0], [0.0, 1.0]])
    assert torch.equal(different(X), X[[0, 2]])


def test_readers_of_a_dataset_read_the_target_most_beside_other_data():
    generator = np.random.default_rng(0)
    x, y = (
        generator.normal(size=(50, 7)) * scales for scales in (np.arange(7), np.arange(8, 1, -1))
    )  # x has no first input
    T, S = x.T @ x / 50, y.T @ y / 50
    V, regression = (t.numpy() for t in readers_of_dataset(torch.tensor(T), torch.tensor(S)))
    assert V.shape == (7, 6)  # the direction that the target does not have is not read
    R = S + RIDGE * S.diagonal().mean() * np.eye(7)
    values, vectors = np.linalg.eig(np.linalg.solve(R, T))
    order = np.argsort(-values.real)[:6]
    np.testing.assert_allclose(np.diag(V.T @ T @ V) / np.diag(V.T @ R @ V), values.real[order], rtol=1e-8)
    for v, w in zip(V.T, vectors.real.T[order], strict=True):
        assert abs(v @ w) / np.linalg.norm(v) / np.linalg.norm(w) > 1 - 1e-8
    by_regression = np.linalg.lstsq(x @ V, x, rcond=None)[0]  # what is read says most of the inputs in this way
    np.testing.assert_allclose(regression, by_regression, atol=1e-8)
    np.testing.assert_allclose(x @ V @ regression, x, atol=1e-8)  # all of them together lose nothing


def test_a_run_of_a_dataset_starts_there():
    model, rows = tiny_model(dtype=torch.float32), some_tokens(shape=(12, 6))
    run = decompose_targeted(
        model, rows[:6], rows[6:], config_of(C=4, batch_size=6, nontarget_batch_size=6), progress=False
    )
    vpd = run.decomposition
    with torch.no_grad(), MaskedModel(vpd, model) as masked_model:
        moments = [
            {name: x.flatten(0, 1).T @ x.flatten(0, 1) / 36 for name, x in masked_model.clean(part)[1].items()}
            for part in (rows[:6], rows[6:])
        ]
        for name, W in ((name, masked_model.adapter.weight(name)) for name in vpd.sites):
            V, regression = readers_of_dataset(moments[0][name], moments[1][name])
            n = min(4, V.shape[1])
            torch.testing.assert_close(
                vpd.V[name][:, :n] @ vpd.U[name][:n], V[:, :n] @ regression[:n] @ W, atol=2e-3, rtol=2e-3
            )


@pytest.mark.parametrize("C", [8, 12])
def test_a_run_starts_at_the_prompts(C):
    model = tiny_model(dtype=torch.float32)
    run = decompose_targeted(model, PROMPTS, some_tokens(shape=(12, 6)), config_of(C=C), progress=False)
    first, vpd = run.history.iloc[0], run.decomposition
    assert abs(first["unmasked"]) < 1e-5 < first["stochastic"]  # all masks at 1 and Δ at 0: the model itself
    with torch.no_grad(), MaskedModel(vpd, model) as masked_model:
        for prompt in PROMPTS:
            tokens = torch.tensor([prompt])
            clean, inputs = masked_model.clean(tokens)
            ones = torch.ones(*tokens.shape, vpd.site_axis.total)
            torch.testing.assert_close(
                masked_model.masked(tokens, constant_masks(ones, 0.0, vpd.site_axis)), clean, atol=1e-4, rtol=1e-4
            )
            for name, x in inputs.items():
                W = masked_model.adapter.weight(name)
                torch.testing.assert_close(x @ vpd.V[name] @ vpd.U[name], x @ W, atol=1e-4, rtol=1e-4)
                norms = vpd.V[name].norm(dim=0), vpd.U[name].norm(dim=1)
                written = norms[1] > 1e-6
                torch.testing.assert_close(norms[0][written], norms[1][written], atol=1e-4, rtol=1e-4)


def test_what_cannot_start_there_is_refused():
    model, rows = tiny_model(dtype=torch.float32), some_tokens(shape=(12, 6))
    with pytest.raises(
        ValueError, match=r"init='target': blocks\..* has \d different inputs .* C=2 subcomponents: give"
    ):
        decompose_targeted(model, PROMPTS, rows, config_of(C=2), progress=False)
    with pytest.raises(ValueError, match=r"init_scale=0.5.*init='target' sets V and U"):
        config_of(init_scale=0.5)
