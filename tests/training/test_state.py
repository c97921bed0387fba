"""States: everything the next step depends on, kept through kills and full disks."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as real_save
from torch import Tensor, nn

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import VPDConfig, decompose
from tl_vpd.files import tensor_file
from tl_vpd.forward import MaskedModel
from tl_vpd.training import ExecutionConfig, SavingConfig, StepMetrics, Trainer, new_decomposition
from tl_vpd.training.state import StoredRun, latest_state, load_state, read_run, save_state

from .test_processes import ENVIRONMENT, ROOT

CONFIG = VPDConfig(
    steps=10,
    batch_size=4,
    C=5,
    gamma=GAMMA,
    faithfulness={"warm_up_steps": 2},
    minimality={"frequency_half_life": 3.0},
    coefficients={"schedule": {"importance": ((0, 0), (0.5, 1)), "frequency": ((0, 0), (0.5, 1))}},
    adversary={"pool": 3, "routing": "uniform_k"},
)
ROWS = some_tokens(shape=(12, 6))


@contextmanager
def trainer(seed_of_init: int = 0, config: VPDConfig = CONFIG, **how: Any) -> Iterator[Trainer]:
    model = tiny_model(dtype=torch.float32)
    decomposition = new_decomposition(model, config.model_copy(update={"seed": seed_of_init}))
    with MaskedModel(decomposition, model) as masked_model:
        yield Trainer(masked_model, config, (4, 6), execution=ExecutionConfig(**how))


def tokens(step: int) -> Tensor:
    return ROWS[torch.randperm(12, generator=torch.Generator().manual_seed(step))[:4]]


def steps(a_trainer: Trainer, n: int) -> list[StepMetrics]:
    return [a_trainer.step(tokens(a_trainer.done)) for _ in range(n)]


def contents(item: Any, where: str = "trainer", visited: set[int] | None = None) -> dict[str, Tensor | int | float]:
    """Every tensor and number that can be reached from an object of this package or of torch.optim."""
    visited = set() if visited is None else visited
    if isinstance(item, Tensor | int | float):
        return {where: item}
    if id(item) in visited or isinstance(item, nn.Module | torch.Generator | torch.device | str):
        return {} if not isinstance(item, nn.Module) else {f"{where}.{k}": p for k, p in item.named_parameters()}
    visited.add(id(item))
    if isinstance(item, dict):
        parts = {f"{where}[{i}]": value for i, value in enumerate(item.values())}
    elif isinstance(item, list | tuple):
        parts = {f"{where}[{i}]": value for i, value in enumerate(item)}
    elif type(item).__module__.split(".")[0] in ("tl_vpd", "torch") and hasattr(item, "__dict__"):
        parts = {f"{where}.{name}": value for name, value in vars(item).items()}
    else:
        return {}
    results: dict[str, Tensor | int | float] = {}
    for name, value in parts.items():
        results.update(contents(value, name, visited))
    return results


def test_a_state_restores_everything_that_changes_and_the_next_steps_are_the_same_to_the_bit(tmp_path):
    with trainer() as one, trainer(seed_of_init=1) as other:
        start = {k: v.clone() if isinstance(v, Tensor) else v for k, v in contents(one).items()}
        steps(one, 3)
        path = save_state(one, tmp_path)
        steps(other, 5)
        torch.manual_seed(99)  # torch's generator is not used
        load_state(other, path)
        a, b = contents(one), contents(other)
        assert a.keys() == b.keys()
        changed = {k for k, v in a.items() if k in start and not same(v, start[k])}
        for part in ("decomposition", "optimizer", "sources", "frequencies", "done"):
            assert any(part in name for name in changed), part
        # Overwritten before they are read: work space, and the learning rates, which follow from the step.
        scratch = {name for name in a if "_work" in name or "param_groups" in name}
        assert {k for k in a if not same(a[k], b[k])} <= scratch
        assert steps(one, 3) == steps(other, 3)
        assert all(same(v, contents(other)[k]) for k, v in contents(one).items() if k not in scratch)


def same(one: Tensor | float, other: Tensor | float) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def test_a_state_is_not_taken_on_in_another_precision(tmp_path):
    with trainer() as one, trainer(precision="bfloat16") as other:
        steps(one, 1)
        path = save_state(one, tmp_path)
        with pytest.raises(ValueError, match="in float32, this run's are in bfloat16: pass ExecutionConfig"):
            load_state(other, path)
        assert other.done == 0


def test_a_run_that_is_carried_out_in_another_way_says_that_it_goes_on_to_rounding(tmp_path, caplog):
    with trainer() as one, trainer() as same, trainer(micro_batch=2) as other:
        steps(one, 1)
        path = save_state(one, tmp_path)
        load_state(same, path)
        assert not caplog.records
        load_state(other, path)
        (record,) = caplog.records
        assert "the same to rounding, not bit for bit (micro_batch=None then, 2 now)" in record.getMessage()
        assert other.done == 1


def test_the_newest_states_stay(tmp_path):
    with trainer() as resumed:
        for keep in (3, 3, 3, 3, 1):
            steps(resumed, 1)
            save_state(resumed, tmp_path, keep=keep)
            names = sorted(p.name for p in tmp_path.iterdir())
            first = max(1, resumed.done - keep + 1)
            assert names == [f"step-{n:08d}.safetensors" for n in range(first, resumed.done + 1)]
        with pytest.raises(ValueError, match="keep_states=0: give an integer of at least 1"):
            save_state(resumed, tmp_path, keep=0)


KILLED = """
import os, signal, sys
from pathlib import Path
import tests.training.test_state as t

whole_file = t.tensor_file._write

def half(path, *content):
    whole_file(path, *content)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

with t.trainer() as resumed:
    t.steps(resumed, 2)
    t.save_state(resumed, Path(sys.argv[1]))
    t.steps(resumed, 1)
    t.tensor_file._write = half
    t.save_state(resumed, Path(sys.argv[1]))
"""


def test_a_kill_in_the_middle_of_saving_leaves_the_state_before_and_its_remains_go_with_the_next(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) == 2 and sum(name.endswith(".tmp") for name in left) == 1
    state = latest_state(tmp_path)
    assert state is not None and state.name == "step-00000002.safetensors"
    with trainer() as resumed, trainer() as undisturbed:
        steps(undisturbed, 2)
        load_state(resumed, state)
        assert steps(resumed, 1) == steps(undisturbed, 1)
        save_state(resumed, tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002.safetensors", "step-00000003.safetensors"]


def space(path, *content):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def quota(path, *content):
    path.write_bytes(b"half")
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def library(path, *content):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("writer", [space, quota, library])
def test_a_full_disk_is_named_and_the_state_before_stays_valid(tmp_path, monkeypatch, writer):
    folder = tmp_path / "run" / "state"
    with trainer() as resumed:
        monkeypatch.setattr(tensor_file, "_write", writer)
        with pytest.raises(OSError, match="there is no older state; make room and try again") as none_yet:
            save_state(resumed, folder)
        assert str(folder) in str(none_yet.value) and list(folder.iterdir()) == []
        monkeypatch.undo()
        steps(resumed, 1)
        before = save_state(resumed, folder, keep=1)
        held = load_file(before)
        steps(resumed, 1)
        monkeypatch.setattr(tensor_file, "_write", writer)
        with pytest.raises(OSError, match=r"No space left on the disk of .* for step-00000002\.safetensors") as result:
            save_state(resumed, folder, keep=1)
        assert str(folder) in str(result.value) and "step-00000001.safetensors is intact" in str(result.value)
        assert list(folder.iterdir()) == [before]
        assert all(torch.equal(t, load_file(before)[k]) for k, t in held.items())


FILLED = """
import sys
from pathlib import Path
import tests.training.test_state as t

folder = Path(sys.argv[1])
with t.trainer() as resumed:
    t.steps(resumed, 1)
    t.save_state(resumed, folder, keep=1)
    t.steps(resumed, 1)
    try:
        t.save_state(resumed, folder, keep=1)
    except OSError as error:
        print(error)
    print([p.name for p in folder.iterdir()])
with t.trainer() as resumed:
    t.load_state(resumed, t.latest_state(folder))
    print(resumed.step(t.tokens(1)).total)
"""


def test_a_disk_that_is_really_full_leaves_the_state_before(tmp_path):
    """On a file system in memory that one state fits on, and two do not."""
    mount = f"mount -t tmpfs -o size=100k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("users may not mount here, so no disk can be filled; the tests above fill one by hand")
    program = f'{mount} && exec "{sys.executable}" -W ignore -c "$PROGRAM" {tmp_path}'
    environment = {**ENVIRONMENT, "PROGRAM": FILLED}
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    message, names, total = ended.stdout.splitlines()
    assert f"No space left on the disk of {tmp_path}" in message and "step-00000001.safetensors is intact" in message
    assert names == "['step-00000001.safetensors']"
    with trainer() as resumed:
        assert float(total) == steps(resumed, 2)[1].total


def test_another_failure_of_the_disk_is_an_os_error_too(tmp_path, monkeypatch):
    def broken(path, *content):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tensor_file, "_write", broken)
    with (
        trainer() as resumed,
        pytest.raises(OSError, match=r"safetensors cannot be written \(Input/output error\)"),
    ):
        save_state(resumed, tmp_path)


def test_a_run_keeps_as_many_states_as_it_is_told(tmp_path):
    model = tiny_model(dtype=torch.float32)
    decompose(model, ROWS, CONFIG, saving=SavingConfig(folder=tmp_path, save_every=2, keep_states=4), progress=False)
    names = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert names == [f"step-{n:08d}.safetensors" for n in (4, 6, 8, 10)]


def test_a_state_of_another_shape_is_refused_by_name(tmp_path):
    with trainer() as resumed:
        path = save_state(resumed, tmp_path)
        tensors, content = load_file(path), content_of(path)
        tensors["sources/first"] = tensors["sources/first"][:, :2].contiguous()
        tensor_file.write_tensors(path, tensors, content)
        with pytest.raises(ValueError, match=r"sources/first is \(4, 2, \d+\), this run's is \(4, 3, \d+\)"):
            load_state(resumed, path)
        tensors["sources/first"] = load_file(save_state(resumed, tmp_path / "b"))["sources/first"].double()
        tensor_file.write_tensors(path, tensors, content)
        with pytest.raises(ValueError, match=r"sources/first is torch\.float64, this run's is torch\.float32"):
            load_state(resumed, path)
        del tensors["sources/first"]
        tensor_file.write_tensors(path, tensors, content)
        with pytest.raises(ValueError, match="sources/first is missing"):
            load_state(resumed, path)


FLAT = {
    "lr": ("optimizer", "lr"),
    "gamma_lr": ("optimizer", "gamma_lr"),
    "lr_final": ("optimizer", "lr_final"),
    "clip": ("optimizer", "clip"),
    "minimality": ("minimality", "kind"),
    "frequency_half_life": ("minimality", "frequency_half_life"),
    "faithfulness": ("faithfulness", "kind"),
    "warm_up_steps": ("faithfulness", "warm_up_steps"),
    "warm_up_lr": ("faithfulness", "warm_up_lr"),
}
"""Where the fields of a flat config stand now."""


def test_a_state_of_an_older_version_goes_on_and_is_said_to_be_unproved(tmp_path, caplog):
    nested = CONFIG.model_dump(mode="json")
    flat = {name: value for name, value in nested.items() if name not in ("minimality", "optimizer", "faithfulness")}
    flat |= {name: nested[section][field] for name, (section, field) in FLAT.items()}
    del flat["coefficients"]["schedule"]
    flat |= {"forward_slope": 0.0, "p_start": 2.0, "p_end": 0.4, "minimality_warm_up": 0.5, "merged": False}
    with trainer() as one, trainer() as other:
        steps(one, 2)
        path = save_state(one, tmp_path)
        as_before_checksums(path, config=flat)
        assert read_run(path) == StoredRun() and "has no checksums" in caplog.text
        load_state(other, path)
        assert other.done == 2 and steps(other, 1) == steps(one, 1)
        as_before_checksums(path, config={**flat, "lr": 0.5})
        with pytest.raises(ValueError, match=r"another config \(optimizer\.lr: 0\.5 then, 0\.0005 now\)"):
            load_state(other, path)


def content_of(path: Path) -> dict[str, Any]:
    with tensor_file.open_tensors(path) as file:
        return file.content


def as_before_checksums(path: Path, **changes: Any) -> None:
    """Writes a state as older versions did: strings in the header, no history, no checksums."""
    tensors, content = load_file(path), changes
    if safe_open(path, framework="pt").metadata().keys() == {tensor_file.CONTENT, tensor_file.DIGEST}:
        content = {**content_of(path), **changes}
    metadata = {key: json.dumps(content.get(key, {})) for key in ("config", "fingerprints", "how")}
    real_save(
        {key: t for key, t in tensors.items() if key != "history"},
        path,
        metadata={**metadata, "precision": "float32"},
    )


@pytest.mark.parametrize("at", [8, 400, 0.3, 0.6, 0.9, -1])
def test_a_flipped_bit_is_noticed_before_anything_is_restored_and_the_state_before_is_offered(tmp_path, at):
    with trainer() as one, trainer(seed_of_init=1) as other:
        steps(one, 1)
        before = save_state(one, tmp_path)
        steps(one, 1)
        path = save_state(one, tmp_path)
        data = bytearray(path.read_bytes())
        data[int(at * len(data)) if isinstance(at, float) else at] ^= 4
        path.write_bytes(data)
        held = {k: v.clone() if isinstance(v, Tensor) else v for k, v in contents(other).items()}
        with pytest.raises(
            ValueError, match=r"is not an intact training state .*resume from the state before"
        ) as refused:
            load_state(other, path)
        assert "\n" not in str(refused.value) and repr(str(before)) in str(refused.value)
        assert all(same(v, held[k]) for k, v in contents(other).items() if k in held)


def test_a_state_has_the_history_and_the_datas_description(tmp_path):
    with trainer() as one:
        run = StoredRun({"rows": 12, "context": 6}, steps(one, 3))
        assert read_run(save_state(one, tmp_path, run=run)) == run


def test_what_is_not_finite_is_not_written(tmp_path):
    with trainer() as one:
        save_state(one, tmp_path)
        steps(one, 1)
        with torch.no_grad():
            one.decomposition.V["blocks.0.attn.W_Q"][0, 0] = float("nan")
        with pytest.raises(
            FloatingPointError, match=r"After 1 steps parts/V/.*; step-00000000\.safetensors is intact\."
        ):
            save_state(one, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000000.safetensors"]


def test_states_of_later_steps_are_removed_when_the_work_is_done_again(tmp_path):
    with trainer() as one:
        steps(one, 1)
        first = save_state(one, tmp_path, keep=3)
        steps(one, 2)
        save_state(one, tmp_path, keep=3)
        load_state(one, first)
        steps(one, 1)
        save_state(one, tmp_path, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001.safetensors", "step-00000002.safetensors"]
