"""Probes: the ridge regression against an independent solution, and labels that only importances, or anything, can tell."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.evaluation import handmade
from tests.evaluation.handmade import IN, rows
from tl_vpd import Decomposition
from tl_vpd.evaluation import probe_null
from tl_vpd.evaluation.probe_null import _outputs

TOKENS = rows(40, 8, seed=3)


def with_gamma_of_tokens(model, feature) -> Decomposition:
    """Pieces whose first importance is a function of the tokens so far; the others are 1."""
    V, U = handmade.parts(model)

    def gives(inputs: Mapping[str, Tensor]) -> Tensor:
        tokens = (inputs[IN] @ model.embed.W_E.detach().T).argmax(-1)
        g = torch.ones(*tokens.shape, 2 * handmade.NEURONS)
        g[..., 0] = feature(tokens).float()
        return g

    return handmade.handmade(model, V, U, gives)


def parity(tokens: Tensor) -> Tensor:
    return (tokens < 8).long().cumsum(1) % 2


def test_what_only_importances_tell_beats_every_null():
    model = handmade.known_model()
    result = probe_null(with_gamma_of_tokens(model, parity), model, TOKENS, parity(TOKENS))
    table = result.to_pandas()
    assert list(table.index) == ["importances", "untrained", "untrained, as sparse", "shuffled", "activations"]
    assert table.loc["importances", "accuracy"] == 1.0 and result.chance == 0.5
    assert table["accuracy"].drop("importances").max() < 0.75
    assert table.loc["shuffled", "gain"] == pytest.approx(1 - table.loc["shuffled", "accuracy"])
    assert result.as_good == [] and not result.check.fault
    assert result.check.sentence.startswith("Importances say more than every null: the probe reads 100.0%")
    assert result.tokens == 12 * 8 and table.loc["activations", "n_features"] == 8 + 16


def test_what_the_inputs_tell_as_well_is_said():
    model = handmade.known_model()
    labels = torch.where(torch.arange(8) > 0, TOKENS, -1)
    result = probe_null(with_gamma_of_tokens(model, lambda t: t < 8), model, TOKENS, labels.clamp(max=1))
    assert "activations" in result.as_good and result.check.fault
    assert result.check.sentence.startswith("A null does as well (")
    assert result.tokens == 12 * 7


@pytest.mark.parametrize("n", [30, 6])
def test_the_probe_is_weighted_ridge_regression(n: int):
    """Solved over features and over tokens, as least squares with √(λ n) I below."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(n + 5, 9, generator=generator, dtype=torch.float64), torch.arange(n + 5) % 3
    Y, weights = torch.nn.functional.one_hot(y).double(), 1.0 + torch.rand(n + 5, generator=generator).double()
    fit = torch.arange(n + 5) < n
    (result,) = _outputs(X, Y, weights, fit, ~fit, [0.3])
    w = (weights[fit] / weights[fit].mean()).numpy()
    x, t = X[fit].numpy(), Y[fit].numpy()
    mean, target = np.average(x, axis=0, weights=w), np.average(t, axis=0, weights=w)
    scale = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=w))
    A = np.concatenate([np.sqrt(w)[:, None] * (x - mean) / scale, np.sqrt(0.3 * n) * np.eye(9)])
    B = np.concatenate([np.sqrt(w)[:, None] * (t - target), np.zeros((9, 3))])
    solution = np.linalg.lstsq(A, B, rcond=None)[0]
    expected = (X[~fit].numpy() - mean) / scale @ solution + target
    assert np.allclose(result.numpy(), expected, atol=1e-9)


def test_labels_that_do_not_fit_are_refused():
    model = handmade.known_model()
    vpd = handmade.right(model)
    with pytest.raises(ValueError, match=r"labels are \(40, 7\), and the tokens \(40, 8\)"):
        probe_null(vpd, model, TOKENS, parity(TOKENS)[:, 1:])
    with pytest.raises(ValueError, match="fewer than two classes"):
        probe_null(vpd, model, TOKENS, torch.zeros_like(TOKENS))
