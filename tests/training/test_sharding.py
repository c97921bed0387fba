"""Sharded parameters and moments: the steps of whole ones, half the bytes per process, states for any number of processes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import Decomposition
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.distributed.sharding import copy_whole, is_sharded, shard, unshard, whole

from .a_run import ROWS
from .test_processes import finish, history, start

LOSSES = ("stochastic", "adversarial", "importance", "frequency", "faithfulness", "total", "l0", "grad_norm")


def test_a_kind_that_does_not_exist_is_refused_and_one_process_splits_nothing():
    vpd = decomposition_of(tiny_model())
    before = list(vpd.parameters())
    shard(vpd, "full", World())
    shard(vpd, "none", World(0, 2))
    unshard(vpd)
    assert not is_sharded(vpd) and all(a is b for a, b in zip(before, vpd.parameters(), strict=True))
    with pytest.raises(ValueError, match="sharding='most': choose from 'none', 'optimizer', 'full'"):
        inspect.unwrap(shard)(vpd, "most", World())  # past the type checker of the tests


def test_an_old_pytorch_is_refused(monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms")
    with pytest.raises(RuntimeError, match=f"and this is {torch.__version__.split('+')[0]}"):
        shard(decomposition_of(tiny_model()), "full", World(0, 2))


def test_a_whole_parameter_is_copied_and_read_as_it_is():
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    copy_whole(parameter, torch.ones(3, 2))
    assert torch.equal(whole(parameter), torch.ones(3, 2)) and not whole(parameter).requires_grad


LOW = ("precision=bfloat16",)
ACTS = ("gamma=per_subcomponent_mlps", "merged")
SITES = "gamma=per_site_mlps"
HARD = ("micro_batch=1", "gamma=chunked_transformers", "dtype=bfloat16")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders of runs by name: alone, and by two processes with each sharding."""
    root = tmp_path_factory.mktemp("sharding")
    np.save(root / "tokens.npy", some_tokens(shape=ROWS).numpy().astype(np.uint16))
    one = [root / "alone", "--", root / "hard-alone", *HARD, "--", root / "low-alone", *LOW]
    one += ["--", root / "acts-alone", *ACTS, "--", root / "sites-alone", SITES]
    finish(start(*one))
    two = [root / "optimizer", "sharding=optimizer", "data=mapped", "--", root / "full", "sharding=full"]
    two += ["--", root / "resumed", "sharding=full", "until=4", "--", root / "resumed", "sharding=full", "resume"]
    two += ["--", root / "moved", "sharding=full", "until=4", "--", root / "hard-full", "sharding=full", *HARD]
    two += ["--", root / "low-full", "sharding=full", *LOW]
    two += ["--", root / "again-full", "sharding=full", "checkpoint=1"]
    two += ["--", root / "acts-full", "sharding=full", *ACTS, "--", root / "sites-full", "sharding=full", SITES]
    finish(start(*two, processes=2))
    finish(start(root / "moved", "resume"))
    return root


def assert_alike(one: Path, other: Path, rel: float = 2e-4, atol: float = 1e-4) -> None:
    """The same losses in every step, and the same state and decomposition, to rounding."""
    a, b = history(one), history(other)
    assert [row["step"] for row in a] == [row["step"] for row in b] == list(range(8))
    for x, y in zip(a, b, strict=True):
        for field in LOSSES:
            assert y[field] == pytest.approx(x[field], rel=rel), (x["step"], field)
    for name in ("state/step-00000008.safetensors", "decomposition/decomposition.safetensors"):
        x, y = load_file(one / name), load_file(other / name)
        assert x.keys() == y.keys()
        for key in x:
            assert x[key].shape == y[key].shape and x[key].dtype == y[key].dtype, key
            if x[key].is_floating_point() and not key.startswith(("sources/", "adamw/")):
                # Adam gives an entry whose gradient is rounding noise a full-length step. Metrics have units of their own.
                most = atol + rel * x[key].abs() if key == "history" else atol
                assert float((x[key] - y[key]).abs().gt(most).float().mean()) < 0.05, key


@pytest.mark.parametrize("kind", ["optimizer", "full"])
def test_two_processes_with_sharded_parameters_take_the_steps_of_one(runs, kind):
    assert_alike(runs / "alone", runs / kind)
    Decomposition.load(runs / kind / "decomposition")


def test_activations_computed_again_see_whole_parameters(runs):
    assert_alike(runs / "alone", runs / "again-full")


def test_sharding_works_with_small_mlps_as_gamma_and_merged_passes(runs):
    assert_alike(runs / "acts-alone", runs / "acts-full")
    assert_alike(runs / "sites-alone", runs / "sites-full")


def test_sharding_works_with_micro_batches_other_gammas_and_targets_in_bfloat16(runs):
    # bfloat16 rounds logits to three digits, in whatever order rows are added.
    assert_alike(runs / "hard-alone", runs / "hard-full", rel=2e-2, atol=2e-3)


def test_sharding_works_with_products_in_bfloat16(runs):
    assert_alike(runs / "low-alone", runs / "low-full", rel=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", ["optimizer", "full"])
def test_two_processes_store_each_byte_once_and_about_half_of_them_each(runs, kind):
    alone = json.loads((runs / "alone" / "bytes-0.json").read_text())
    both = [json.loads((runs / kind / f"bytes-{rank}.json").read_text()) for rank in (0, 1)]
    sharded = {"parameters", "moments"} | ({"parameters after a pass"} if kind == "full" else set())
    for what, n in alone.items():
        if what in sharded:
            assert sum(stored[what] for stored in both) == n, what
            assert max(stored[what] for stored in both) < 0.6 * n, (
                what
            )  # of an odd number of rows the first has one more
        else:
            assert [stored[what] for stored in both] == [n, n], what


def test_a_sharded_run_goes_on_bit_for_bit(runs):
    for name in ("state/step-00000008.safetensors", "decomposition/decomposition.safetensors"):
        a, b = load_file(runs / "full" / name), load_file(runs / "resumed" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert history(runs / "full") == history(runs / "resumed")


def test_a_run_goes_on_with_another_number_of_processes_and_another_sharding(runs):
    assert_alike(runs / "alone", runs / "moved")
