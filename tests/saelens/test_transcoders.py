"""Transcoders and SAEs that this package writes, loaded by SAELens's own classes, which give the same outputs."""

from __future__ import annotations

import pytest
import torch

from tests.baselines.test_transcoders import random_transcoders
from tl_vpd.formats import load_saelens, save_saelens

sae_lens = pytest.importorskip("sae_lens")


@pytest.mark.parametrize("options", [{}, {"skip": True}, {"reads": "mlp_out"}])
def test_saelens_loads_what_is_written_and_its_own_files_are_read(tmp_path, options):
    transcoders = random_transcoders(**options)
    folder = save_saelens(transcoders, tmp_path / "ours")
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for layer in (0, 1):
        theirs = sae_lens.SAE.load_from_disk(folder / f"blocks.{layer}")
        with torch.no_grad():
            acts = transcoders.encode(layer, x)
            torch.testing.assert_close(theirs.encode(x), acts)
            torch.testing.assert_close(theirs(x), transcoders.decode(layer, {layer: acts}, x))
        theirs.save_model(tmp_path / "theirs" / str(layer))
    again = load_saelens([tmp_path / "theirs" / str(layer) for layer in (0, 1)])
    for one, other in zip(again.parameters(), transcoders.parameters(), strict=True):
        torch.testing.assert_close(one, other)
