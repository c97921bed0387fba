"""Folders of the first format load as ever, say that their config is not proved, and become of the present one when saved."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import decomposition_of
from tl_vpd import Decomposition
from tl_vpd.components.format_1 import sha256_of

OLDER = r"is of an older format, in which nothing proves config\.json"


def write(vpd, folder, **changes):
    """A folder as versions before wrote it."""
    folder.mkdir(exist_ok=True)
    save_file(vpd.file_tensors(), folder / "decomposition.safetensors")
    config = {
        "format_version": 1,
        "sites": [asdict(site) for site in vpd.sites.values()],
        "C": vpd.counts,
        "gamma": vpd.gamma_config.model_dump(exclude={"rising"}),
        "fingerprints": {name: f.model_dump() for name, f in vpd.fingerprints.items()},
        "sha256": sha256_of(folder / "decomposition.safetensors"),
        "versions": {"torch": "2.6.0"},
        "training": {"steps": 3},
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture
def vpd(model):
    return decomposition_of(model)


def test_an_older_folder_loads_and_becomes_a_present_one(vpd, tmp_path):
    with pytest.warns(UserWarning, match=OLDER):
        older = Decomposition.load(write(vpd, tmp_path))
    again = Decomposition.load(older.save(tmp_path))
    for loaded in (older, again):
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), vpd.parameters(), strict=True))
        assert (loaded.sites, loaded.counts, loaded.gamma_config) == (vpd.sites, vpd.counts, vpd.gamma_config)
        assert loaded.fingerprints == vpd.fingerprints
        assert loaded.record == {"versions": {"torch": "2.6.0"}, "training": {"steps": 3}}


def test_tensors_that_were_cut_or_changed_are_refused(vpd, tmp_path):
    path = write(vpd, tmp_path) / "decomposition.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"checksum differs.*cut short or changed, copy the folder again\."):
        Decomposition.load(tmp_path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is not an intact safetensors file"):
        Decomposition.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, and decomposition.safetensors has no config"),
        ({"sha256": None}, "checksum differs"),
        ({"fingerprints": None}, "damaged: fingerprints=None"),
        ({"C": {}}, "disagree about blocks"),
        ({"gamma": {"kind": "oracle"}}, "damaged: gamma.kind='oracle'"),
        ({"gamma": {"d_ci": 8, "n_heads": 2, "n_blocks": 1_000_000}}, "n_blocks=1000000, and Γ has 12 tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*older format")
def test_a_config_that_is_wrong_says_where(vpd, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        Decomposition.load(write(vpd, tmp_path, **changes))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.filterwarnings("ignore:.*older format")
def test_values_that_are_not_finite_are_refused(vpd, tmp_path):
    with torch.no_grad():
        vpd.V["blocks.0.attn.W_Q"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"V/blocks\.0\.attn\.W_Q has 1 of 48 entries that are NaN or infinite"):
        Decomposition.load(write(vpd, tmp_path))
