"""A run from end to end: what it writes, what it leaves alone, how it is interrupted and resumed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch

from tests.tiny import tiny_model
from tl_vpd import Decomposition, ExecutionConfig, SavingConfig, VPDConfig, decompose
from tl_vpd.files import tensor_file
from tl_vpd.forward import MaskedModel
from tl_vpd.training import Trainer, new_decomposition
from tl_vpd.training.state import latest_state

from ..hooks.test_clean import assert_same, snapshot
from .test_state import as_before_checksums


def run(target, rows, config, folder=None, resume=False, **saving):
    how = SavingConfig(folder=folder, **{"log_every": 1, **saving})
    return decompose(target, rows, config, saving=how, resume=resume, progress=False)


def changed(config, **update):
    return VPDConfig(**{**config.model_dump(), **update})


def assert_equal(one: Decomposition, other: Decomposition):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stop_before(monkeypatch, step, error=None):
    """Sends Ctrl-C (or raises) while a step is running."""
    plain = Trainer.step

    def interrupted(self, *a, **k):
        if self.done == step:
            if error is not None:
                raise error
            signal.raise_signal(signal.SIGINT)
        return plain(self, *a, **k)

    monkeypatch.setattr(Trainer, "step", interrupted)


def test_the_target_is_left_as_it_was(target, rows, config):
    target(rows, return_type="loss").backward()
    target.blocks[0].attn.W_Q.requires_grad_(False)
    target.add_hook("blocks.0.hook_resid_post", lambda x, hook: x * 0.5)
    target.blocks[1].eval()
    before = snapshot(target)
    result = run(target, rows, config)
    assert_same(before, snapshot(target))
    assert result.finished and result.config is config and len(result.history) == 6


def test_training_moves_v_u_and_gamma_and_warm_up_brings_the_weights_nearer(target, rows, config):
    start = run(target, rows, changed(config, steps=1, faithfulness={"warm_up_steps": 0}))
    warm = run(target, rows, changed(config, steps=1, faithfulness={"warm_up_steps": 100, "warm_up_lr": 0.02}))
    assert warm.history["faithfulness"][0] < 0.2 * start.history["faithfulness"][0]
    done = run(target, rows, config)
    for key, value in done.decomposition.state_dict().items():
        assert not torch.equal(value, start.decomposition.state_dict()[key]), key
    assert done.history["p"].tolist() == pytest.approx([2 - 1.6 * i / 6 for i in range(6)])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(target, rows, config):
    one, same = run(target, rows, config), run(target, rows, config)
    assert_equal(one.decomposition, same.decomposition)
    pd.testing.assert_frame_equal(one.history, same.history)
    other = run(target, rows, config.model_copy(update={"seed": 1}))
    assert not torch.equal(one.decomposition.gamma.unembed.weight, other.decomposition.gamma.unembed.weight)


def test_hooks_left_on_the_target_do_not_change_the_result(target, rows, config):
    expected = run(target, rows, config)
    target.add_hook("blocks.0.hook_resid_post", lambda x, hook: x * 0)
    assert_equal(run(target, rows, config).decomposition, expected.decomposition)


def test_what_lies_in_the_folder(target, rows, config, tmp_path):
    result = run(target, rows, config, tmp_path / "run", save_every=2)
    assert_equal(Decomposition.load(tmp_path / "run" / "decomposition"), result.decomposition)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history.to_dict("records") and [row["step"] for row in lines] == list(range(6))
    states = sorted(p.name for p in (tmp_path / "run" / "state").iterdir())
    assert states == ["step-00000004.safetensors", "step-00000006.safetensors"]


def test_ctrl_c_finishes_the_step_saves_and_resuming_completes_bit_for_bit(target, rows, config, tmp_path, monkeypatch):
    expected = run(target, rows, config)
    before, handler = snapshot(target), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        stop_before(patched, 2)
        stopped = run(target, rows, config, tmp_path)
    assert not stopped.finished and stopped.history["step"].tolist() == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is handler
    assert latest_state(tmp_path / "state").name == "step-00000003.safetensors"
    assert not (tmp_path / "decomposition").exists()
    assert_same(before, snapshot(target))
    resumed = run(target, rows, config, tmp_path, resume=True)
    assert resumed.finished
    assert_equal(resumed.decomposition, expected.decomposition)
    pd.testing.assert_frame_equal(resumed.history, expected.history)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 6


def test_a_second_ctrl_c_interrupts_at_once_and_the_target_is_left_as_it_was(target, rows, config, monkeypatch):
    before = snapshot(target)

    def twice(self, *a, **k):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", twice)
    with pytest.raises(KeyboardInterrupt):
        run(target, rows, config)
    assert_same(before, snapshot(target))


def test_a_killed_run_resumes_from_its_last_state_bit_for_bit(target, rows, config, tmp_path, monkeypatch):
    expected = run(target, rows, config)
    with monkeypatch.context() as patched, pytest.raises(SystemError):
        stop_before(patched, 5, SystemError("killed"))
        run(target, rows, config, tmp_path, save_every=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tot')  # what a killed process leaves of a line
    resumed = run(target, rows, config, tmp_path, resume=True)
    assert_equal(resumed.decomposition, expected.decomposition)
    pd.testing.assert_frame_equal(resumed.history, expected.history)


def test_resuming_a_finished_run_trains_no_more(target, rows, config, tmp_path, monkeypatch):
    done = run(target, rows, config, tmp_path)
    stop_before(monkeypatch, 6, AssertionError("a step too many"))
    again = run(target, rows, config, tmp_path, resume=True)
    assert again.finished
    assert_equal(again.decomposition, done.decomposition)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(target, rows, config, tmp_path, monkeypatch):
    expected = run(target, rows, config)
    plain = Trainer.step

    def poisoned(self, *a, **k):
        if self.done == 4:
            with torch.no_grad():
                self.decomposition.V["blocks.0.attn.W_Q"].fill_(float("nan"))
        return plain(self, *a, **k)

    before = snapshot(target)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", poisoned)
        with pytest.raises(FloatingPointError, match="Step 4: not finite: faithfulness"):
            run(target, rows, config, tmp_path, save_every=2)
    assert_same(before, snapshot(target))
    assert latest_state(tmp_path / "state").name == "step-00000004.safetensors"
    resumed = run(target, rows, config, tmp_path, resume=True)
    assert_equal(resumed.decomposition, expected.decomposition)


def test_a_full_disk_is_found_before_the_first_step_and_leaves_no_half_files(
    target, rows, config, tmp_path, monkeypatch
):
    def full(path, *content):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file, "_write", full)
    stop_before(monkeypatch, 0, AssertionError("a step ran"))
    with pytest.raises(OSError, match="No space left"):
        run(target, rows, config, tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [".lock"]


def test_a_disk_that_fills_later_leaves_the_older_state(target, rows, config, tmp_path, monkeypatch):
    calls, whole_file = [], tensor_file._write

    def fills(path, *content):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole_file(path, *content)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(tensor_file, "_write", fills)
        run(target, rows, config, tmp_path, save_every=2)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [
        "step-00000000.safetensors",
        "step-00000002.safetensors",
    ]
    assert run(target, rows, config, tmp_path, resume=True).finished


def test_a_folder_that_cannot_be_written_is_an_os_error(target, rows, config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        run(target, rows, config, tmp_path / "file" / "run")


def test_a_folder_that_holds_a_run_needs_resume_and_resume_needs_a_run(target, rows, config, tmp_path):
    with pytest.raises(FileNotFoundError, match="no training state to resume from"):
        run(target, rows, config, tmp_path, resume=True)
    run(target, rows, config, tmp_path)
    with pytest.raises(FileExistsError, match="contains a run: pass resume=True"):
        run(target, rows, config, tmp_path)


def test_resuming_with_another_config_or_a_damaged_state_is_refused(target, rows, config, tmp_path):
    run(target, rows, config, tmp_path)
    with pytest.raises(ValueError, match=r"another config \(optimizer\.lr: 0\.0005 then, 0\.1 now\)"):
        run(target, rows, changed(config, optimizer={"lr": 0.1}), tmp_path, resume=True)
    path = latest_state(tmp_path / "state")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"not an intact training state.*resume from the state before with resume="):
        run(target, rows, config, tmp_path, resume=True)


def test_resuming_on_other_weights_is_refused_with_the_size_of_the_mismatch(target, rows, config, tmp_path):
    run(target, rows, config, tmp_path)
    other = tiny_model(dtype=torch.float32, seed=1)
    with pytest.raises(ValueError, match=r"of other weights.*12 sites differ.*by \d"):
        run(other, rows, config, tmp_path, resume=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_targets_of_another_precision_are_trained_on(rows, config, dtype):
    result = run(tiny_model(dtype=dtype), rows, config.model_copy(update={"steps": 2}))
    assert result.finished and {p.dtype for p in result.decomposition.parameters()} == {torch.float32}
    assert bool(torch.tensor(result.history.to_numpy(dtype=float)).isfinite().all())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((10, 6), 11), "outside the vocabulary 0..10"),
        (torch.full((10, 6), -1), "Tokens run from -1"),
        (torch.zeros(10, 11, dtype=torch.long), "longer than the model's context of 10"),
        (torch.zeros(0, 6, dtype=torch.long), "There are no tokens"),
        (torch.zeros(3, 6, dtype=torch.long), "3 rows of tokens and batch_size is 4"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_before_anything_is_written(target, config, tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        run(target, tokens, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sites_that_do_not_fit_are_refused(target, rows, config, tmp_path):
    for change, error, message in [
        ({"sites": ("blocks.0.attn.W_q",)}, KeyError, "did you mean 'blocks.0.attn.W_Q'"),
        ({"C": {"*.W_Q": 3, "blocks.0.attn.W_[QK]": 4, "*": 3}}, ValueError, "is ambiguous"),
        ({"C": {"*.W_Q": 3}}, KeyError, "There is no C for blocks.0.attn.W_K"),
    ]:
        with pytest.raises(error, match=message):
            run(target, rows, config.model_copy(update=change), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with torch.no_grad():
        target.blocks[0].mlp.W_out[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        run(target, rows, config, tmp_path / "run")


def test_some_sites_alone_are_decomposed(target, rows, config):
    result = run(target, rows, changed(config, sites="*.W_[QK]", steps=1))
    assert [s.rsplit(".", 1)[1] for s in result.decomposition.sites] == ["W_Q", "W_K"] * 2


def test_resuming_on_other_rows_is_refused(target, rows, config, tmp_path):
    run(target, rows, config.model_copy(update={"steps": 2}), tmp_path)
    with pytest.raises(ValueError, match="was trained on other tokens"):
        run(target, rows.flip(0), config.model_copy(update={"steps": 2}), tmp_path, resume=True)


def test_rows_may_be_mapped_from_a_file_when_a_run_goes_on(target, rows, config, tmp_path):
    np.save(tmp_path / "rows.npy", rows.numpy())
    np.save(tmp_path / "others.npy", rows.flip(0).numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for first, second in ((rows, mapped), (mapped, rows)):
        out = tmp_path / f"run from {type(first).__name__}"
        half = run(target, first, config.model_copy(update={"steps": 2}), out)
        again = run(target, second, config.model_copy(update={"steps": 2}), out, resume=True)
        assert_equal(half.decomposition, again.decomposition)
        with pytest.raises(ValueError, match="was trained on other tokens"):
            others = np.load(tmp_path / "others.npy", mmap_mode="r")
            run(target, others, config.model_copy(update={"steps": 2}), out, resume=True)


def test_resuming_needs_a_folder(target, rows, config):
    with pytest.raises(ValueError, match=r"resume=True needs the folder of the run: pass saving=SavingConfig\(folder="):
        decompose(target, rows, config, resume=True)


def test_a_finished_run_without_its_states_is_not_written_over(target, rows, config, tmp_path):
    run(target, rows, config, tmp_path)
    shutil.rmtree(tmp_path / "state")
    before = (tmp_path / "decomposition" / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match="contains a run"):
        run(target, rows, config.model_copy(update={"seed": 1}), tmp_path)
    assert (tmp_path / "decomposition" / "config.json").read_bytes() == before


def test_a_last_update_that_is_not_finite_is_no_result(target, rows, config, tmp_path):
    diverging = changed(config, optimizer={"lr": 1e38}, steps=1, faithfulness={"warm_up_steps": 0})
    with pytest.raises(
        FloatingPointError, match=r"After 1 steps .* was not written; step-00000000\.safetensors is intact"
    ):
        run(target, rows, diverging, tmp_path)
    assert not (tmp_path / "decomposition").exists()


def test_the_same_rows_in_another_width_are_the_same(target, rows, config, tmp_path):
    run(target, rows.numpy().astype("uint16"), config, tmp_path)
    assert run(target, rows, config, tmp_path, resume=True).finished


def test_one_run_a_folder(target, rows, config, tmp_path, monkeypatch):
    plain, refused = Trainer.step, []

    def step(self, *a, **k):
        if self.done == 1:
            with pytest.raises(BlockingIOError, match=rf"is in use by process {os.getpid()} on .*: wait until it ends"):
                run(target, rows, config, tmp_path / "run", resume=True)
            refused.append(True)
        return plain(self, *a, **k)

    monkeypatch.setattr(Trainer, "step", step)
    assert run(target, rows, config, tmp_path / "run").finished and refused
    assert run(target, rows, config, tmp_path / "run", resume=True).finished  # the lock was released


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("metrics.jsonl", None, "does not exist"),
        ("metrics.jsonl", b"\xff\xfe\n", "is not UTF-8 text"),
        ("metrics.jsonl", b'{"step": 0}\n', "Line 1 of .* is not a row of metrics"),
        ("metrics.jsonl", b"", "it differs from what the state has"),
        ("tokens.json", None, "does not exist"),
        ("tokens.json", b"{", "is not JSON"),
        ("tokens.json", b'{"rows": 3, "context": 6}', "it differs from what the state has"),
    ],
)
def test_damaged_files_beside_a_state_are_said_and_written_again(
    target, rows, config, tmp_path, monkeypatch, caplog, name, damage, said
):
    expected = run(target, rows, config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_before(patched, 2)
        run(target, rows, config, tmp_path / "run")
    path = tmp_path / "run" / name
    path.unlink() if damage is None else path.write_bytes(damage)
    resumed = run(target, rows, config, tmp_path / "run", resume=True)
    assert re.search(rf"{name} is written again from the state: .*{said}", caplog.text)
    assert_equal(resumed.decomposition, expected.decomposition)
    pd.testing.assert_frame_equal(resumed.history, expected.history)
    assert path.read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_tokens_are_noticed_without_tokens_json_too(target, rows, config, tmp_path):
    run(target, rows, config, tmp_path)
    (tmp_path / "tokens.json").unlink()
    with pytest.raises(ValueError, match=r"was trained on other tokens \(10 rows of 6\)"):
        run(target, rows.flip(0), config, tmp_path, resume=True)


def test_a_state_of_an_older_version_needs_the_files_beside_it(target, rows, config, tmp_path, monkeypatch, caplog):
    expected = run(target, rows, config)
    with monkeypatch.context() as patched:
        stop_before(patched, 2)
        run(target, rows, config, tmp_path)
    as_before_checksums(latest_state(tmp_path / "state"))
    (tmp_path / "tokens.json").rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match=r"tokens\.json is missing, and .* is of an older version"):
        run(target, rows, config, tmp_path, resume=True)
    (tmp_path / "aside").rename(tmp_path / "tokens.json")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tot')  # what a killed process leaves of a line
    resumed = run(target, rows, config, tmp_path, resume=True)
    assert "has no checksums" in caplog.text
    assert_equal(resumed.decomposition, expected.decomposition)
    pd.testing.assert_frame_equal(resumed.history, expected.history)


def test_gradients_that_are_off_are_on_inside_and_off_afterwards(target, rows, config):
    expected = run(target, rows, config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_equal(run(target, rows, config).decomposition, expected.decomposition)
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        result = run(target, rows, config)
        assert torch.is_inference_mode_enabled()
    assert_equal(result.decomposition, expected.decomposition)
    assert all(p.requires_grad and not p.is_inference() for p in result.decomposition.parameters())


def test_a_batch_of_padding_is_refused(target, rows, config):
    with MaskedModel(new_decomposition(target, config), target) as masked_model:
        trainer = Trainer(masked_model, config, (4, 6))
        with pytest.raises(ValueError, match="Step 0: every token of the batch is padding"):
            trainer.step(rows[:4], torch.zeros(4, 6, dtype=torch.bool))


def test_a_file_where_a_folder_is_needed_is_named(target, rows, config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match="file is a file and a folder is needed"):
            run(target, rows, config, folder)


def test_sharding_one_process_is_said(target, rows, config, caplog):
    decompose(target, rows, config, execution=ExecutionConfig(sharding="full"), progress=False)
    assert "sharding='full' does nothing in a run of one process" in caplog.text


def test_a_state_of_another_folder_is_not_resumed_from(target, rows, config, tmp_path):
    run(target, rows, config, tmp_path / "one")
    with pytest.raises(FileNotFoundError, match=r"is not a state of .*other: give a file of"):
        run(target, rows, config, tmp_path / "other", resume=latest_state(tmp_path / "one" / "state"))
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="needs the folder of the run"):
        run(target, rows, config, resume=str(latest_state(tmp_path / "one" / "state")))


def test_a_backend_that_does_not_exist_is_refused(target, rows, config):
    with pytest.raises(ValueError, match=r"compile='inducter' .did you mean 'inductor'.*: choose from 'recorded', "):
        decompose(target, rows, config, execution=ExecutionConfig(compile="inducter"), progress=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"progress": torch.tensor([1, 2])}, TypeError, r"progress=.* is a Tensor: give True or False\."),
        ({"progress": "no"}, TypeError, "progress='no' is a str: give True or False"),
        ({"resume": 1}, TypeError, "resume=1 is a int: give True or False"),
        ({"context": "8"}, TypeError, "context='8' is a str: give an integer of at least 2"),
    ],
)
def test_options_of_another_type_are_refused(target, rows, config, options, error, message):
    unchecked = getattr(decompose, "__wrapped__", decompose)  # the library's checks, without those of the test run
    with pytest.raises(error, match=message):
        unchecked(target, rows, config, **{"progress": False, **options})


def config_for(vpd, config, **update):
    """A config with which a run can go on from this decomposition."""
    return changed(config, sites=tuple(vpd.sites), C=vpd.counts, gamma=vpd.gamma_config.model_dump(), **update)


def test_a_run_goes_on_from_a_decomposition(target, rows, config, tmp_path):
    vpd = run(target, rows, config).decomposition
    before = {name: t.clone() for name, t in vpd.state_dict().items()}
    further = config_for(vpd, config, seed=config.seed + 1)
    longer = run(target, rows, further, resume=vpd)
    assert longer.history.step.tolist() == list(range(config.steps))  # a run of its own, from the first step
    assert_equal(run(target, rows, further, tmp_path / "again", resume=vpd).decomposition, longer.decomposition)
    assert longer.decomposition.record["start"] == vpd.record
    assert all(torch.equal(before[name], t) for name, t in vpd.state_dict().items())  # untouched


def test_its_first_step_has_the_numbers_of_the_decomposition(target, rows, config):
    vpd = run(target, rows, config).decomposition
    still = {"lr": 1e-12, "gamma_lr": 1e-12}
    further = config_for(vpd, config, steps=1, optimizer=still, faithfulness={"warm_up_steps": 50})
    after = run(target, rows, further, resume=vpd).decomposition
    for name, tensor in after.state_dict().items():
        assert torch.allclose(tensor, vpd.state_dict()[name], atol=1e-9)  # no warm-up, no other start


def test_such_a_run_is_interrupted_and_resumed_as_others(target, rows, config, tmp_path, monkeypatch):
    vpd = run(target, rows, config).decomposition
    further = config_for(vpd, config, seed=9)
    whole = run(target, rows, further, resume=vpd).decomposition
    with monkeypatch.context() as patch:
        stop_before(patch, 1)
        assert not run(target, rows, further, tmp_path / "it", resume=vpd).finished
    with pytest.raises(FileExistsError, match="contains a run"):
        run(target, rows, further, tmp_path / "it", resume=vpd)
    resumed = run(target, rows, further, tmp_path / "it", resume=True).decomposition
    assert_equal(resumed, whole)
    assert resumed.record["start"]["training"]["seed"] == config.seed


def test_a_decomposition_that_does_not_fit_is_refused(target, rows, config, tmp_path):
    vpd = run(target, rows, config).decomposition
    further = config_for(vpd, config)
    name = next(iter(vpd.sites))
    with pytest.raises(ValueError, match=f"{name} has .* to go on from, and 3 by the config"):
        run(target, rows, changed(further, C={**vpd.counts, name: 3}), tmp_path / "C", resume=vpd)
    with pytest.raises(ValueError, match="and 0 by the config"):
        run(target, rows, changed(further, sites=(name,), C=vpd.counts[name]), resume=vpd)
    with pytest.raises(ValueError, match="another Γ"):
        run(target, rows, changed(further, gamma={**further.gamma.model_dump(), "output_bias": 0.25}), resume=vpd)
    with torch.no_grad():
        target.blocks[0].attn.W_Q.mul_(2)
    with pytest.raises(ValueError, match="weights are not the decomposed ones"):
        run(target, rows, further, resume=vpd)
    assert not (tmp_path / "C" / "decomposition").exists()
