"""What an edit does, recomputed token by token from both models' logits; training and strengths against gradients."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.editing.conftest import OUT, WO, Q
from tests.editing.test_apply import edited_model
from tests.tiny import matrix_of, some_tokens, tiny_model
from tl_vpd import VPDConfig
from tl_vpd.editing import (
    EditEvaluationConfig,
    StrengthConfig,
    TrainingConfig,
    Wanted,
    add,
    evaluate_edit,
    explain_difference,
    gradient_by_subcomponent,
    remove,
    scale,
    swap,
    train_write_direction,
    tune_strengths,
    write_token,
)
from tl_vpd.editing.controls import random_control, singular_control
from tl_vpd.training import new_decomposition
from tl_vpd.viz import edit_page


def kl(p_logits, q_logits):
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def test_every_figure_is_that_of_both_models_logits(model, vpd, tmp_path):
    tokens, other, prompts = (
        some_tokens(shape=(4, 10)),
        some_tokens(seed=8, shape=(3, 6)),
        some_tokens(seed=9, shape=(5, 4)),
    )
    g = vpd.causal_importances(model, tokens)[OUT]
    rare = int(((g > 0.5).sum((0, 1)) - 6).abs().argmin())
    name = f"{OUT}:{rare}"
    edit = scale(vpd, name, -3.0)
    result = evaluate_edit(
        vpd,
        model,
        tokens,
        edit,
        wanted=Wanted(3, prompts, pos=-2),
        other_text={"noise": other},
        config=EditEvaluationConfig(radius=1, contexts=3, batch_size=3, threshold=0.5),
    )
    changed = edited_model(model, vpd, edit)
    row = result.to_pandas().set_index("variant").loc["edit"]
    by_token = kl(model(tokens), changed(tokens)).detach()
    fires = g[..., rare] > 0.5
    near = torch.zeros_like(fires)
    for r, p in fires.nonzero().tolist():
        for q in (p - 1, p + 1):
            if 0 <= q < 10 and not fires[r, q]:
                near[r, q] = True
    assert bool(fires.any() and near.any() and (~fires & ~near).any())
    for kind, where in (("firing", fires), ("near", near), ("elsewhere", ~fires)):
        assert row[f"{kind}_kl"] == pytest.approx(float(by_token[where].mean()), rel=1e-6)
        assert row[f"{kind}_p99"] == pytest.approx(float(by_token[where].quantile(0.99)), rel=1e-6)
    assert row["noise_kl"] == pytest.approx(float(kl(model(other), changed(other)).mean()), rel=1e-6)
    for when, m in (("before", model), ("after", changed)):
        logits = m(prompts)[:, -2]
        assert row[f"wanted_{when}"] == pytest.approx(float(logits.softmax(-1)[:, 3].mean()), rel=1e-6)
        assert row[f"logit_{when}"] == pytest.approx(float(logits[:, 3].mean()), rel=1e-6)
    assert list(result.to_pandas()["variant"]) == ["edit", "random", "singular"]
    top = result.top(3)
    assert_close(torch.tensor(top["kl"].tolist()).double(), by_token.flatten().topk(3).values)
    first = top.iloc[0]
    assert first["after"] == str(int(changed(tokens)[first["row"], first["pos"]].argmax()))
    assert result.frequencies()["frequency"][0] == pytest.approx(float(fires.float().mean()))
    page = edit_page(result, tmp_path / "edit.html").read_text(encoding="utf-8")
    assert "The most changed contexts" in page and name in page


@torch.no_grad()
def test_changed_contexts_leave_padding_out(padded):
    model, vpd, tokens = padded
    edit = scale(vpd, f"{OUT}:2", -3.0)
    contexts = evaluate_edit(
        vpd, model, tokens, edit, config=EditEvaluationConfig(contexts=99, controls=False)
    ).contexts
    changed = edited_model(model, vpd, edit)
    assert len(contexts) == 9 + 4 + 7 + 3 and "<pad>" not in "".join(contexts["context"] + contexts["token"])
    for row in contexts.to_dict("records"):
        alone = tokens[row["row"]][tokens[row["row"]] != model.tokenizer.pad_token_id][None]
        pos = row["pos"] - (9 - alone.shape[1])
        before, after = (m(alone)[0, pos].softmax(-1) for m in (model, changed))
        assert (row["p_before"], row["p_after"]) == pytest.approx((float(before.max()), float(after.max())), abs=1e-6)
        assert row["kl"] == pytest.approx(float(kl(before.log(), after.log())), abs=1e-9)


def test_the_model_is_left_alone(model, vpd, tokens):
    before = model(tokens)
    evaluate_edit(vpd, model, tokens, remove(vpd, f"{OUT}:2"))
    assert torch.equal(model(tokens), before)


def test_controls_make_the_same_change_elsewhere(model, vpd):
    edit = scale(vpd, f"{OUT}:2", 0.25) + remove(vpd, f"{Q}:0")
    alive = torch.ones(vpd.site_axis.total, dtype=torch.bool)
    random = random_control(edit, vpd, alive, torch.Generator().manual_seed(1))
    for piece, factor, index in zip(random.pieces, (-0.75, -1.0), (2, 0), strict=True):
        assert piece.index != index
        assert_close(piece.change, factor * vpd.U[piece.site][piece.index].detach())
        assert_close(piece.read, vpd.V[piece.site][:, piece.index].detach())
    dead = torch.zeros_like(alive)
    assert random_control(edit, vpd, dead, torch.Generator()) is None
    singular = singular_control(edit, {site: matrix_of(model, site) for site in edit.sites})
    for piece, original in zip(singular.pieces, edit.pieces, strict=True):
        assert piece.norm == pytest.approx(original.norm)
        W = matrix_of(model, piece.site)
        sigma = (W.T @ piece.read).norm()  # a left singular vector: W Wᵀ u = σ² u
        assert_close(W @ W.T @ piece.read, sigma.square() * piece.read)


def test_gradients_are_those_of_strengths_written_into_the_weights(model, vpd, tokens):
    def loss(logits):
        return logits[:, -1, 3].sum() - logits[:, 2, 4].sum()

    table = gradient_by_subcomponent(vpd, model, tokens, loss).set_index("subcomponent")["gradient"]
    assert len(table) == vpd.site_axis.total and table.abs().is_monotonic_decreasing
    for name in (f"{OUT}:3", f"{Q}:1", f"{WO}:5"):
        h = 1e-5
        up, down = (float(loss(edited_model(model, vpd, scale(vpd, name, 1 + s))(tokens)).detach()) for s in (h, -h))
        assert table[name] == pytest.approx((up - down) / (2 * h), rel=1e-5)


def test_strengths_reach_a_goal_that_only_they_can(model, vpd, tokens):
    """The objective is a model in which two strengths are others: training finds them, and with a penalty only them."""
    names = [f"{OUT}:3", f"{WO}:5"]
    target = edited_model(model, vpd, scale(vpd, names[0], 0.2) + scale(vpd, names[1], 1.7))(tokens).detach()

    def loss(logits):
        return (logits - target).square().mean()

    both = tune_strengths(vpd, model, tokens, loss, names, config=StrengthConfig(steps=70, lr=0.1))
    found = both.to_pandas().set_index("subcomponent")["strength"]
    assert found[names[0]] == pytest.approx(0.2, abs=0.1) and found[names[1]] == pytest.approx(1.7, abs=0.1)
    assert float(both.losses.min()) < 5e-2 * float(both.losses[0])
    assert_close(edited_model(model, vpd, both.edit)(tokens), target, atol=0.2, rtol=0.2)
    many = [f"{site}:{i}" for site in (OUT, WO) for i in range(6)]
    penalty = 2e-4 * float(both.losses[0])
    few = tune_strengths(
        vpd,
        model,
        tokens,
        loss,
        many,
        config=StrengthConfig(steps=40, lr=0.1, penalty=penalty, smallest=0.05),
    )
    assert set(names) <= {str(c) for c in few.edit.subcomponents}
    assert len(few.edit) < len(many)
    goal = float(both.losses[0]) / 2
    early = tune_strengths(vpd, model, tokens, loss, names, config=StrengthConfig(steps=100, goal=goal))
    assert len(early.losses) < 60 and float(early.losses[-1]) <= goal < float(early.losses[-2])


def test_training_starts_at_the_first_decomposed_block_and_takes_batches():
    """The same as from the first block on, step by step; prompts of a step follow from the seed."""
    model = tiny_model(n_layers=3)
    late = new_decomposition(
        model, VPDConfig(C=3, sites=["blocks.2.*"], gamma=dict(d_ci=8, n_blocks=1, n_heads=2))
    ).double()
    name, many = "blocks.2.mlp.W_out:1", some_tokens(seed=4, shape=(8, 5))
    runs = []

    def loss(logits):
        runs.append(logits)
        return logits[:, -1, 3].mean()

    config = StrengthConfig(steps=3, lr=0.1)
    tuned = tune_strengths(late, model, many, loss, name, config=config)
    for step in (0, 3):  # strengths after these steps, written into the weights
        strength = 1.0 if step == 0 else float(tuned.strengths[0])
        edited = model if step == 0 else edited_model(model, late, scale(late, name, strength))
        assert_close(runs[step].detach(), edited(many).detach(), rtol=1e-9, atol=1e-9)
    batches = StrengthConfig(steps=3, lr=0.1, batch_size=3, seed=5)
    runs.clear()
    first = tune_strengths(late, model, many, loss, name, config=batches)
    assert [len(run) for run in runs] == [3] * 4 and not torch.equal(runs[0], runs[1])
    assert torch.equal(first.strengths, tune_strengths(late, model, many, loss, name, config=batches).strengths)
    config = TrainingConfig(steps=2, lr=0.5, probability=0.99, batch_size=4, seed=1)
    results = [train_write_direction(late, model, Wanted(3, many), name, config=config) for _ in range(2)]
    assert torch.equal(results[0].probabilities, results[1].probabilities) and len(results[0].probabilities) == 3
    rows = torch.randperm(8, generator=torch.Generator().manual_seed(1))[:4]
    before = model(many[rows])[:, -1].softmax(-1)[:, 3].mean().detach()
    assert float(results[0].probabilities[0]) == pytest.approx(float(before), rel=1e-6)


def test_a_trained_direction_makes_the_token_likely(model, vpd):
    many = some_tokens(seed=4, shape=(60, 5))
    acts = vpd.component_acts(model, many)[OUT][:, -1, 2]
    prompts = many[acts.argsort(descending=True)[:6]]  # where it has one sign, so that it can write one token
    before = vpd.U[OUT].detach().clone()
    wanted = Wanted(7, prompts)
    config = TrainingConfig(steps=40, lr=1.0, probability=0.2)
    trained = train_write_direction(vpd, model, wanted, f"{OUT}:2", config=config)
    changed = edited_model(model, vpd, trained.edit)
    p = float(changed(prompts)[:, -1].softmax(-1)[:, 7].detach().mean())
    assert p == pytest.approx(float(trained.probabilities[-1]), abs=1e-6)
    assert trained.reached and p >= 0.2 > float(trained.probabilities[-2])
    assert torch.equal(vpd.U[OUT], before) and torch.equal(trained.edit.pieces[0].write, before[2])
    with pytest.raises(ValueError, match="There are 3 examples: give 4 or more"):
        train_write_direction(vpd, model, Wanted(7, prompts[:3]), f"{OUT}:2")
    easy = TrainingConfig(probability=1e-6)
    with pytest.raises(ValueError, match="there is nothing to train"):
        train_write_direction(vpd, model, wanted, f"{OUT}:2", config=easy)


def test_training_in_batches_ends_when_all_examples_are_likely(model, vpd):
    """Not when those of a step are, nor is it refused since these are likely already."""
    many = some_tokens(seed=4, shape=(30, 5))
    with torch.no_grad():
        p = model(many)[:, -1].softmax(-1)[:, 7]
    order = p.argsort(descending=True)
    prompts = many[torch.cat([order[:2], order[-2:]])]
    first = int(torch.randperm(4, generator=torch.Generator().manual_seed(0))[0])
    prompts = prompts[[(i - first) % 4 for i in range(4)]]  # the likeliest is the first step's
    limit = float(p.max()) * 0.9
    config = TrainingConfig(steps=3, lr=1e-3, probability=limit, batch_size=1)
    trained = train_write_direction(vpd, model, Wanted(7, prompts), f"{OUT}:2", config=config)
    with torch.no_grad():
        after = edited_model(model, vpd, trained.edit)(prompts)[:, -1].softmax(-1)[:, 7].mean()
    assert not trained.reached and float(trained.probabilities[-1]) == pytest.approx(float(after), rel=1e-5)


@pytest.mark.parametrize(
    ("wanted", "error", "match"),
    [
        (dict(token=99), IndexError, "token=99: the vocabulary has tokens 0 to 10"),
        (dict(token=3, pos=7), IndexError, "pos=7: the shortest prompt has positions -7 to 6"),
        (dict(token=[1, 2, 3]), ValueError, "has 3 tokens for 2 prompts"),
        (dict(token=-1), ValueError, "token=-1: give an integer of at least 0"),
    ],
)
def test_what_is_wanted_is_checked(model, vpd, tokens, wanted, error, match):
    with pytest.raises(error, match=match):
        evaluate_edit(vpd, model, tokens, remove(vpd, f"{OUT}:2"), wanted=Wanted(prompts=tokens, **wanted))


def test_losses_are_checked_and_dead_subcomponents_warned_of(model, vpd, tokens):
    with pytest.raises(ValueError, match="return one finite number that depends on the logits"):
        gradient_by_subcomponent(vpd, model, tokens, lambda logits: logits.detach().sum())
    with pytest.raises(ValueError, match="No strength moved"):
        tune_strengths(vpd, model, tokens, lambda x: x.sum(), f"{OUT}:1", config=StrengthConfig(steps=1, smallest=9.0))
    with torch.no_grad():
        vpd.gamma.unembed.bias -= 100.0
    with (
        pytest.warns(RuntimeWarning, match="is important at 0 of 14 tokens"),
        pytest.warns(RuntimeWarning, match="the random control is left out"),
    ):
        result = evaluate_edit(vpd, model, tokens, remove(vpd, f"{OUT}:2"))
    assert result.to_pandas()["near_kl"].isna().all()


def test_an_added_piece_has_controls_too(model, vpd, tokens):
    edit = add(vpd, OUT, torch.rand(12).double(), torch.rand(8).double())
    table = evaluate_edit(vpd, model, tokens, edit).to_pandas().set_index("variant")
    assert (table["elsewhere_kl"] > 0).all() and len(table) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda v, m, t: write_token(v, m, t, f"{OUT}:1", 3),
        lambda v, m, t: swap(v, m, t, f"{OUT}:1", f"{OUT}:2"),
        lambda v, m, t: evaluate_edit(v, m, t, remove(v, f"{OUT}:1")),
        lambda v, m, t: gradient_by_subcomponent(v, m, t, lambda x: x.sum()),
        lambda v, m, t: tune_strengths(v, m, t, lambda x: x.sum(), f"{OUT}:1"),
        lambda v, m, t: train_write_direction(v, m, Wanted(3, t), f"{OUT}:1"),
        lambda v, m, t: explain_difference(v, m, m),
    ],
)
def test_a_model_with_other_weights_is_refused(vpd, tokens, call):
    with pytest.raises(ValueError, match="This model's weights are not the decomposed ones"):
        call(vpd, tiny_model(seed=3), tokens)
