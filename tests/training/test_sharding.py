"""Shares of parameters and moments: the same steps as without, half the bytes a process, states that fit any number of them."""

from __future__ import annotations

import copy
import inspect
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.tiny import some_tokens
from tl_vpd import Decomposition
from tl_vpd.components import Components
from tl_vpd.forward.cast_weights import CastWeights
from tl_vpd.site import Site
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.distributed.sharding import (
    FullSharding,
    OptimizerSharding,
    Sharding,
    Split,
    parameter_names,
    sharding_of,
)

from .a_run import ROWS
from .test_processes import finish, history, start

LOSSES = ("stochastic", "adversarial", "importance", "frequency", "faithfulness", "total", "l0", "grad_norm")


class Copying(World):
    """A world of one whose gathered tensors are new, as among many; counts them."""

    gathered = 0

    def gather_runs(self, run: Tensor) -> Tensor:
        type(self).gathered += 1
        return run.clone()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 5))
def test_shares_are_equally_long_and_make_up_the_whole(shape, size):
    whole = torch.randn(*shape)
    splits = [Split(whole.shape, World(rank, size)) for rank in range(size)]
    shares = [split.cut(whole) for split in splits]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) * size - whole.numel() < size
    assert torch.equal(torch.cat(shares)[: whole.numel()], whole.flatten())
    assert torch.equal(torch.cat([whole.flatten()[split.own] for split in splits]), whole.flatten())


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2, bias=False)).double()


def trained(own: nn.Module, sharding: Sharding, steps: int = 3) -> list[float]:
    """A few clipped AdamW steps; gives the norms before clipping."""
    sharding.start(own)
    kept = sharding.kept(own)
    optimizer = torch.optim.AdamW(kept, lr=0.1, fused=True)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    norms = []
    for _ in range(steps):
        with sharding.regathering():
            optimizer.zero_grad(set_to_none=True)
            own(x).square().sum().backward()
        sharding.collect(kept)
        norms.append(sharding.clip(kept, 0.5))
        optimizer.step()
        sharding.spread(kept)
    sharding.end(own)
    return norms


@pytest.mark.parametrize("kind", [OptimizerSharding, FullSharding])
def test_a_process_alone_takes_the_plain_steps_and_gets_its_module_back(kind):
    plain, other = module(), module()
    parameters, classes = list(other.parameters()), [type(m) for m in other.modules()]
    expected = trained(plain, Sharding(World()))
    assert expected[0] > 0.5  # clipping acts
    found = trained(other, kind(Copying()))
    assert found == pytest.approx(expected, rel=1e-12)
    assert [type(m) for m in other.modules()] == classes
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    for (name, a), (same, b) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        assert name == same and torch.allclose(a, b, rtol=1e-12, atol=1e-14), name
    copy.deepcopy(other)  # nothing is left on it that cannot be copied


def test_what_backward_needs_is_gathered_again_and_not_kept():
    own, counting = module(), Copying()
    sharding = FullSharding(counting)
    sharding.start(own)
    x = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)

    def gathers_of_backward(inside: bool) -> int:
        if inside:
            with sharding.regathering():
                loss = own(x).sum()
        else:
            loss = own(x).sum()
        before = Copying.gathered
        loss.backward()
        return Copying.gathered - before

    assert gathers_of_backward(inside=False) == 0
    assert gathers_of_backward(inside=True) == 2  # both weights; a bias is not needed
    assert parameter_names(own) == parameter_names(module()) == [n for n, _ in module().named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("constant", [False, True])
def test_no_pass_keeps_v_or_u_in_any_dtype(dtype, constant):
    components = Components([Site("blocks.0.mlp.W_in", 8, 12)], {"blocks.0.mlp.W_in": 5})
    sharding = FullSharding(Copying())
    sharding.start(components)
    parts = CastWeights(components, torch.device("cpu"), dtype)
    sharding.serve(parts)
    x = torch.ones(2, 8, dtype=dtype, requires_grad=True)
    with sharding.regathering(), parts.constant() if constant else nullcontext():
        before = Copying.gathered
        served = parts.V["blocks.0.mlp.W_in"]
        acts = x @ served
    del served
    assert Copying.gathered - before == 1
    acts.sum().backward()
    assert Copying.gathered - before == 2
    assert components._V.parametrizations["blocks/0/mlp/W_in"].original.grad is None or not constant
    assert sharding._gathered == {}


def test_a_kind_that_does_not_exist_is_refused_and_one_process_shares_nothing():
    assert type(sharding_of("full", World())) is Sharding
    assert type(sharding_of("optimizer", World(0, 2))) is OptimizerSharding
    assert sharding_of("full", World(0, 2)).kind == "full"
    with pytest.raises(ValueError, match="sharding is 'most': give 'none', 'optimizer' or 'full'"):
        inspect.unwrap(sharding_of)("most", World())  # past the type checker of the tests


LOW = ("precision=bfloat16",)
HARD = ("micro_batch=1", "gamma=chunked_transformers", "dtype=bfloat16")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders of runs by name: alone, and by two processes with each sharding."""
    root = tmp_path_factory.mktemp("sharding")
    np.save(root / "tokens.npy", some_tokens(shape=ROWS).numpy().astype(np.uint16))
    finish(start(root / "alone", "--", root / "hard-alone", *HARD, "--", root / "low-alone", *LOW))
    two = [root / "optimizer", "sharding=optimizer", "data=mapped", "--", root / "full", "sharding=full"]
    two += ["--", root / "resumed", "sharding=full", "until=4", "--", root / "resumed", "sharding=full", "resume"]
    two += ["--", root / "moved", "sharding=full", "until=4", "--", root / "hard-full", "sharding=full", *HARD]
    two += ["--", root / "low-full", "sharding=full", *LOW]
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
                # Adam gives an entry whose gradient is rounding noise a full-length step.
                assert float((x[key] - y[key]).abs().gt(atol).float().mean()) < 0.05, key


@pytest.mark.parametrize("kind", ["optimizer", "full"])
def test_two_processes_with_shares_take_the_steps_of_one(runs, kind):
    assert_alike(runs / "alone", runs / kind)
    Decomposition.load(runs / kind / "decomposition")


def test_shares_work_with_micro_batches_other_gammas_and_targets_in_bfloat16(runs):
    # bfloat16 rounds logits to three digits, in whatever order rows are added.
    assert_alike(runs / "hard-alone", runs / "hard-full", rel=2e-2, atol=2e-3)


def test_shares_work_with_products_in_bfloat16(runs):
    assert_alike(runs / "low-alone", runs / "low-full", rel=2e-2, atol=2e-3)


@pytest.mark.parametrize(("kind", "halved"), [("optimizer", ["moments"]), ("full", ["moments", "parameters"])])
def test_each_of_two_processes_holds_half_the_bytes(runs, kind, halved):
    alone = json.loads((runs / "alone" / "bytes-0.json").read_text())
    for rank in (0, 1):
        own = json.loads((runs / kind / f"bytes-{rank}.json").read_text())
        for what in ("parameters", "moments"):
            if what in halved:
                assert alone[what] / 2 <= own[what] <= alone[what] / 2 + 8 * 64, what  # padding: an entry a tensor
            else:
                assert own[what] == alone[what]


def test_a_run_with_shares_goes_on_bit_for_bit(runs):
    for name in ("state/step-00000008.safetensors", "decomposition/decomposition.safetensors"):
        a, b = load_file(runs / "full" / name), load_file(runs / "resumed" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert history(runs / "full") == history(runs / "resumed")


def test_a_run_goes_on_with_another_number_of_processes_and_another_sharding(runs):
    assert_alike(runs / "alone", runs / "moved")
