"""A targeted run from end to end: its data, its files, its record, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import some_tokens, tiny_model
from tests.training.a_run import PROMPTS, TARGETED
from tests.training.test_processes import finish, history, start
from tl_vpd import Decomposition, ExecutionConfig, SavingConfig, decompose
from tl_vpd.adapters import adapt
from tl_vpd.training import TargetedConfig, TargetedTrainer, decompose_targeted
from tl_vpd.training.metrics import metrics_of
from tl_vpd.training.targeted.data import prompts_of
from tl_vpd.training.targeted.prompts import PromptBatches


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def rows():
    return some_tokens(shape=(12, 6))


@pytest.fixture(scope="module")
def undisturbed(model, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("targeted") / "run"
    saving = SavingConfig(folder=folder, save_every=1, log_every=1, keep_states=3)
    return folder, decompose_targeted(model, PROMPTS, rows, TARGETED, saving=saving, progress=False)


def assert_same_state(one, other, **tolerance):
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(b[key], a[key], **{"rtol": 0, "atol": 0, **tolerance})


def test_the_result_is_an_ordinary_decomposition_whose_record_says_targeted(undisturbed, model):
    folder, run = undisturbed
    vpd = Decomposition.load(folder / "decomposition")
    assert vpd.record["targeted"]["target"] == {
        "rows": 3, "context": 3, "lengths": {"2": 1, "3": 2}, "sha256": vpd.record["targeted"]["target"]["sha256"]
    }  # fmt: skip
    assert vpd.record["targeted"]["nontarget"]["rows"] == 12 and vpd.record["training"]["decay"] == 5.0
    with vpd.attach(model), torch.no_grad():
        assert torch.equal(vpd.causal_importances(model, [[1, 2, 3]]).concatenated,
                           run.decomposition.causal_importances(model, [[1, 2, 3]]).concatenated)  # fmt: skip
    last = run.history.iloc[-1]
    assert run.finished and len(run.history) == 8 and last["nontarget"] > 0 and last["faithfulness"] == 0
    stored = json.loads((folder / "tokens.json").read_text())
    assert stored["target"] == vpd.record["targeted"]["target"]


def test_it_goes_on_bit_for_bit(undisturbed, model, rows, tmp_path, monkeypatch):
    folder, _ = undisturbed
    saving = SavingConfig(folder=tmp_path / "run", save_every=1, log_every=1, keep_states=3)
    plain = TargetedTrainer.step

    def fails(self, *batch):
        if self.done == 5:
            raise KeyboardInterrupt
        return plain(self, *batch)

    monkeypatch.setattr(TargetedTrainer, "step", fails)
    with pytest.raises(KeyboardInterrupt):
        decompose_targeted(model, PROMPTS, rows, TARGETED, saving=saving, progress=False)
    monkeypatch.setattr(TargetedTrainer, "step", plain)
    with pytest.raises(ValueError, match="was trained on other tokens"):
        decompose_targeted(model, [[1, 2, 3], [3, 2, 1], [4, 6]], rows, TARGETED, saving=saving, resume=True)
    again = decompose_targeted(model, PROMPTS, rows, TARGETED, saving=saving, resume=True, progress=False)
    assert again.finished and len(again.history) == 8
    name = "state/step-00000008.safetensors"
    assert_same_state(folder / name, tmp_path / "run" / name)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_give_what_one_gives(undisturbed, tmp_path, sharding):
    folder, _ = undisturbed
    finish(start(tmp_path / "two", "targeted=1", f"sharding={sharding}", processes=2))
    for a, b in zip(history(folder), history(tmp_path / "two"), strict=True):
        for field in ("total", "stochastic", "adversarial", "unmasked", "nontarget", "nontarget_importance", "l0"):
            assert b[field] == pytest.approx(a[field], rel=2e-4, abs=1e-7), (a["step"], field)


def test_in_bfloat16_it_runs_and_stays_near(undisturbed, model, rows):
    low = decompose_targeted(
        model, PROMPTS, rows, TARGETED, execution=ExecutionConfig(precision="bfloat16"), progress=False
    )
    assert low.history["total"].iloc[-1] == pytest.approx(undisturbed[1].history["total"].iloc[-1], rel=0.2)


def test_batches_of_prompts_have_one_length_and_every_prompt_equally_often():
    prompts = [torch.tensor(p) for p in ([1, 2], [3, 4], [5, 6, 7])]
    batches = PromptBatches(prompts, 6, seed=3)
    drawn = [batches.at(step) for step in range(300)]
    assert torch.equal(drawn[7], PromptBatches(prompts, 6, seed=3).at(7))
    for batch in drawn:
        rows, counts = batch.unique(dim=0, return_counts=True)
        assert counts.tolist() == ([3, 3] if batch.shape == (6, 2) else [6]) and rows.tolist()
    short = sum(batch.shape[1] == 2 for batch in drawn) / 300
    assert short == pytest.approx(2 / 3, abs=0.1)
    with pytest.raises(ValueError, match="no prompts"):
        PromptBatches([], 4, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefficients": {"delta": 1.0}}, "no faithfulness loss"),
        ({"faithfulness": {"warm_up_steps": 5}}, "no faithfulness loss"),
        ({"tied": (("a", "b"),)}, "leave tied out"),
        ({"adversary": {"start": 0.5}, "merged": 0.5}, "cannot be combined"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TargetedConfig(**settings)


def test_data_that_does_not_fit_is_refused_by_the_name_of_its_stream(model, rows):
    with pytest.raises(ValueError, match=r"^nontarget: There are 12 rows"):
        decompose_targeted(model, PROMPTS, rows, TARGETED.model_copy(update={"nontarget_batch_size": 13}))
    for target, message in {
        ((1, 99),): r"^target: .*outside the vocabulary",
        ((1, 2), ()): r"^target: Prompt 1 has no tokens",
        (): r"^target: The target has no prompts",
        "abc": r"^target: This model has no tokenizer",
    }.items():
        with pytest.raises(ValueError, match=message):
            decompose_targeted(model, target, rows, TARGETED)
    with pytest.raises(TypeError, match=r"^nontarget: The data is a NoneType"):
        decompose_targeted(model, PROMPTS, None, TARGETED)
    with pytest.raises(TypeError, match=r"decompose_targeted\(\)?"):
        decompose(model, rows, TARGETED)


@pytest.mark.parametrize(
    "target", [[3, 1, 2], torch.tensor([3, 1, 2]), torch.tensor([[3, 1, 2]]), [[3, 1, 2]]], ids=str
)
def test_one_prompt_in_any_form(model, rows, target):
    prompts = prompts_of(adapt(model), target, batch_size=4)
    assert [prompt.tolist() for prompt in prompts] == [[3, 1, 2]]
    assert prompts_of(adapt(model), rows, batch_size=4) is None


def test_rows_of_metrics_are_read_as_what_they_are(undisturbed):
    row = undisturbed[1].history.iloc[0].to_dict()
    assert type(metrics_of(row)).__name__ == "TargetedMetrics"
    plain = {name: value for name, value in row.items() if "nontarget" not in name and name != "unmasked"}
    assert type(metrics_of(plain)).__name__ == "StepMetrics"
    with pytest.raises(ValueError, match="surprise are not metrics"):
        metrics_of(plain | {"surprise": 1.0})
