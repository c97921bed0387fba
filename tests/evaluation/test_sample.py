"""A sample's figures depend neither on the batch size nor on the memory it may keep, and it leaves everything as it was."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import EvaluationConfig, evaluate
from tl_vpd.adapters.hooked_transformer import HookedTransformerAdapter
from tl_vpd.evaluation import Adversary, attack, checks, sampled, union_test
from tl_vpd.evaluation.batch import BatchStore
from tl_vpd.evaluation.modes import masks_in_row
from tl_vpd.evaluation.sample import Sample

ROWS = 5
QUICK = dict(budgets=(2,), control_budgets=(1,), adversary_budgets=(1,), attack_rows=3)


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Any, Tensor]:
    model = tiny_model(torch.float32, n_layers=1)
    return model, decomposition_of(model), some_tokens(shape=(ROWS, 6))


def record_of(setting: tuple[Any, Any, Tensor], **settings: Any) -> dict[str, Any]:
    model, vpd, tokens = setting
    other = {"other": some_tokens(seed=5, shape=(3, 5))}
    config = EvaluationConfig(**{**QUICK, **settings})
    return evaluate(vpd, model, tokens, config, off_distribution=other).record


def same(one: Any, two: Any, tolerance: float, name: str = "") -> None:
    assert type(one) is type(two), name
    if isinstance(one, dict):
        assert one.keys() == two.keys(), name
        for key in one:
            same(one[key], two[key], tolerance, f"{name}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), name
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, tolerance, f"{name}/{i}")
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=tolerance, abs=tolerance), name
    else:
        assert one == two, name


@pytest.fixture(scope="module")
def whole(setting) -> dict[str, Any]:
    return record_of(setting, batch_size=ROWS)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_figure_is_the_same_with_any_batch_size(setting, whole, batch_size):
    other = record_of(setting, batch_size=batch_size)
    # Sources of an attack are moved by the sign of a gradient, which rounding decides where the gradient is nearly 0.
    attacks = {"pgd_kl", "pgd_kl_starts", "intervals"}
    same({k: v for k, v in whole.items() if k not in {*attacks, "tables", "controls"}},
         {k: v for k, v in other.items() if k not in {*attacks, "tables", "controls"}}, 1e-4)  # fmt: skip
    same(whole["intervals"]["kl"], other["intervals"]["kl"], 1e-4)
    same(whole["pgd_kl"], other["pgd_kl"], 1e-2)
    for name, control in whole["controls"].items():
        same(control["kl"], other["controls"][name]["kl"], 1e-4, name)
    for name, table in whole["tables"].items():
        attacked = name in ("adversaries",)
        rows = [[{k: v for k, v in row.items() if k != "pgd_kl"} for row in t] for t in (table, other["tables"][name])]
        same(*rows, 2e-2 if attacked else 1e-3, name)


def test_a_tiny_budget_of_memory_changes_no_digit_and_is_kept_to(setting, monkeypatch):
    kept: list[tuple[int, int]] = []
    get = BatchStore.get

    def counted(store: BatchStore, *arguments: Any) -> Any:
        batch = get(store, *arguments)
        kept.append((store.n_bytes, sum(b.n_bytes for b in store._batches.values())))
        return batch

    passes: list[int] = []
    batch = Sample.batch
    monkeypatch.setattr(Sample, "batch", lambda *a, **k: passes.append(1) or batch(*a, **k))
    monkeypatch.setattr(BatchStore, "get", counted)
    settings = dict(batch_size=2, controls=False)
    plenty = record_of(setting, **settings)
    most, few_passes = max(total for total, _ in kept), len(passes)
    kept.clear()
    passes.clear()
    budget = most // 3
    tiny = record_of(setting, **settings, keep_bytes=budget)
    assert 0 < max(total for total, _ in kept) <= budget < most and all(a == b for a, b in kept)
    assert len(passes) > few_passes  # what is not kept is computed again
    kept.clear()
    nothing = record_of(setting, **settings, keep_bytes=0)
    assert max(total for total, _ in kept) == 0
    assert plenty == tiny == nothing


def test_the_store_is_freed_on_leaving(setting):
    model, vpd, tokens = setting
    with sampled(vpd, model, tokens) as sample:
        union_test(sample)
        assert sample.store.n_bytes > 0
    assert sample.store.n_bytes == 0


def test_draws_belong_to_rows(setting):
    model, vpd, tokens = setting
    with sampled(vpd, model, tokens, batch_size=3) as sample, sampled(vpd, model, tokens[2:4]) as part:
        whole = [masks_in_row(sample, "stochastic")(batch) for batch in sample.batches()]
        first = sample.first(2)
        again = [masks_in_row(first, "stochastic")(batch) for batch in first.batches()]
        other = [masks_in_row(part, "stochastic")(batch) for batch in part.batches()]
    for name in vpd.sites:
        assert torch.equal(again[0][name].mask, whole[0][name].mask[:2])
        assert not torch.equal(other[0][name].mask[0], whole[0][name].mask[2])  # its number is another one


@pytest.mark.parametrize("enabled", [True, False])
def test_the_users_gradients_are_as_they_were_inside_and_after(setting, enabled):
    model, vpd, tokens = setting
    weight = torch.ones(3, requires_grad=True)
    with torch.set_grad_enabled(enabled), sampled(vpd, model, tokens, batch_size=3) as sample:
        assert torch.is_grad_enabled() == enabled
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        distances = sample.distances(masks_in_row(sample, "rounded"))
        attack(sample, Adversary(steps=1))
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
        assert torch.is_grad_enabled() == enabled
        assert (weight.sum() * distances.mean).requires_grad == enabled
        assert model(tokens).requires_grad == (enabled and any(before.values()))


def test_users_hooks_are_heard_between_measures(setting):
    model, vpd, tokens = setting
    heard: list[int] = []
    model.add_hook("blocks.0.hook_resid_post", lambda value, hook: heard.append(1))
    with sampled(vpd, model, tokens) as sample:
        union_test(sample)
        assert heard == []
        model(tokens)
        assert heard == [1]
    model.reset_hooks()


def test_no_generator_is_touched(setting, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the user's CUDA generator was seeded"))
    model, vpd, tokens = setting
    others = {"o": decomposition_of(model, seed=1)}
    before = torch.get_rng_state(), np.random.get_state()
    evaluate(vpd, model, tokens, EvaluationConfig(**QUICK), others=others)
    after = torch.get_rng_state(), np.random.get_state()
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))


@pytest.fixture
def padded(monkeypatch):
    """Token 0 counts as padding at a row's end, so that a row of zeros is padding only."""

    def padding(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        real = (tokens != 0).flip(1).cumsum(1).flip(1) > 0
        return None if bool(real.all()) else real

    monkeypatch.setattr(HookedTransformerAdapter, "padding", padding)


def test_rows_of_padding_are_left_out(setting, padded):
    model, vpd, tokens = setting
    tokens = tokens.clamp_min(1)
    with_padding = torch.cat([tokens[:2], torch.zeros(3, tokens.shape[1], dtype=torch.long), tokens[2:]])
    config = EvaluationConfig(**QUICK, batch_size=2, measures=("union_test", "hidden", "future_leakage"))
    expected, result = (evaluate(vpd, model, t, config) for t in (tokens, with_padding))
    assert result.record["left_out"]["rows"] == "3 of them are padding only"
    assert (result.record["tokens"], result.record["rows"]) == (tokens.numel(), len(tokens))
    for mode in ("unmasked", "rounded", "ci", "zero"):
        assert result.record["kl"][mode] == pytest.approx(expected.record["kl"][mode], rel=1e-4)
    json.dumps(result.record, allow_nan=False)
    assert not any("nan" in check.sentence for check in checks(result))
    with pytest.raises(ValueError, match="All 2 rows are padding"):
        evaluate(vpd, model, torch.zeros(2, 6, dtype=torch.long), config)


def test_what_is_not_defined_is_none_with_a_reason_and_is_not_judged(setting):
    model, vpd, _ = setting
    curve = [(0, 5.0), (10, 1.0)]
    report = evaluate(
        vpd, model, some_tokens(shape=(9, 1)), EvaluationConfig(budgets=(), controls=False, measures=(), curve=curve)
    )
    record = report.record
    assert record["target_ce"] is None and record["compute_recovered"]["rounded"] is None
    assert record["left_out"]["target_ce"] == "no row has two real tokens, one after the other"
    json.dumps(record, allow_nan=False)
    table = report.table()
    assert math.isnan(table.loc["rounded", "ce"]) and table.loc["rounded", "kl"] == record["kl"]["rounded"]


def test_a_model_that_gives_nan_is_not_judged(setting):
    model, _, tokens = setting
    with torch.no_grad():
        broken = decomposition_of(model)
        for name in broken.sites:
            broken.V[name].fill_(float("inf"))
    report = evaluate(broken, model, tokens, EvaluationConfig(budgets=(2,), controls=False, measures=("union_test",)))
    json.dumps(report.record, allow_nan=False)
    assert report.record["kl"]["unmasked"] is None
    assert report.record["left_out"]["kl.unmasked"] == "it is not a finite number"
    by_name = {check.check: check for check in checks(report)}
    assert by_name["delta"].sentence == "Not measured: kl.unmasked (it is not a finite number)."
    assert by_name["delta"].value is None and not by_name["delta"].fault
    assert not any("nan" in check.sentence for check in by_name.values())


def test_masked_passes_start_at_the_first_decomposed_block(monkeypatch):
    model, tokens = tiny_model(torch.float32), some_tokens(shape=(ROWS, 6))
    vpd, runs = decomposition_of(model, sites=("blocks.1.*",)), []
    model.blocks[0].ln1.register_forward_hook(lambda *_: runs.append(1))
    late = record_of((model, vpd, tokens))
    n, runs[:] = len(runs), []
    monkeypatch.setattr(Sample, "starts_late", False)
    whole = record_of((model, vpd, tokens))
    assert 2 * n < len(runs)  # clean passes run every block
    same(late, whole, 0.0)


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.bound = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.bound += storage.nbytes()
        if self.bound > self.peak:
            self.peak = max(self.peak, self.counted())
        return result

    def counted(self) -> int:
        """The bytes of all that is there."""
        self.live = {key: (ref, n) for key, (ref, n) in self.live.items() if not ref.expired()}
        self.bound = sum(n for _, n in self.live.values())
        return self.bound


def test_memory_does_not_grow_with_the_rows(setting):
    model, vpd, _ = setting

    def peak(rows: int) -> int:
        measures = ("adversaries", "union_test", "hidden")
        config = EvaluationConfig(
            measures, budgets=(1,), adversary_budgets=(1,), controls=False, batch_size=2, keep_bytes=0
        )
        with Held() as held:
            evaluate(vpd, model, some_tokens(shape=(rows, 6)), config)
        return held.peak

    few, many = peak(8), peak(14)
    assert few > 10_000 and many < 1.05 * few
