"""Features for Neuronpedia are read by SAEDashboard's own classes, without a change."""

from __future__ import annotations

import json

import pytest

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.formats import save_neuronpedia

dashboard = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")


def test_every_file_is_a_batch_of_sae_dashboard(tmp_path):
    model = tiny_model()
    folder = save_neuronpedia(
        decomposition_of(model), model, some_tokens(shape=(4, 7)), tmp_path / "f", model_id="tiny"
    )
    files = list(folder.rglob("*.json"))
    assert len(files) == 12
    for file in files:
        content = json.loads(file.read_text())
        batch = dashboard.NeuronpediaDashboardBatch(**content)
        assert batch.to_dict() == content and len(batch.features) == len(content["features"]) > 0
