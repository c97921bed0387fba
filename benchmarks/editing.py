"""Edits in the subcomponent basis beside LoRA and full fine-tuning of the same matrices.

    python -m benchmarks.editing                     # the bundled model: writes benchmarks/results/editing.json
    python -m benchmarks.editing --real              # SmolLM2 (extra ``real``): adds its part

``python -m scripts.site.figures`` writes the tables of docs/editing.md.

*write* (bundled model): the token `` the`` is wanted after ``self``; W_out of the first MLP may change. *suppress*: one construct
of Python is not wanted any more, the other text is to stay: ``.`` after ``self``, ``def`` after an empty line, ``:`` after
``else`` (of the frequent pairs of tokens those that the model predicts best); all matrices may change. *real*: SmolLM2 is not to
know the capital of Germany any more; the seven matrices of block 23 may change, whose decomposition for this fact ships.

Methods of a task are trained on the same examples (``tokens`` of them: windows of 16 tokens, of which the last counts), by Adam,
at most 64 (real: 8) in a step, without a term for other text, and stop as soon as the mean probability on them meets the
criterion: at least 0.8 (write), at most 0.1 (suppress), at most 0.05 (real).

=================  ==========================================================================================
analytic           one write direction becomes 3 û of the token
trained            one write direction is trained
one_strength       the strength of one subcomponent, of eight (``few_strengths``), or of all (``strengths``); the few
                   are those with the largest gradient times how much more important they are at the last token of the
                   examples than at the others
strengths_l0       all, with a penalty on how many move
lora_1, lora_4     LoRA of rank 1 and 4;  ``full``: the matrices themselves
=================  ==========================================================================================

``wanted``: the mean probability of the token on text that was not trained on; ``near_kl``: KL from the model's prediction, in
nats, on tokens at most 20 from one that counts (real: at the answers for other countries); ``elsewhere_kl``, ``p99``: mean and
99th percentile on other text; ``parameters``: how many are trained; ``reached``: whether the criterion was. ``equal``: the same
with the change scaled by the smallest factor at which ``wanted`` meets the criterion (None: by no factor up to 8).

*difference*: all matrices of the bundled model are fine-tuned for the behaviour of *write*, with a KL term for other tokens; the
change is explained on the training windows, and the k subcomponents that contribute most to it are undone, or k random ones of
the table.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.changed_models import train
from benchmarks.editing_tasks import CONSTRUCTS, GOAL, LR, SITE, WINDOW, Task, bundled_task, real_task, rounded
from scripts.site.tables import markdown
from tl_vpd import bundled
from tl_vpd.adapters import adapt
from tl_vpd.bundled.loading import DECOMPOSITION
from tl_vpd.editing import (
    DifferenceConfig,
    Edit,
    StrengthConfig,
    TrainingConfig,
    Wanted,
    explain_difference,
    gradient_by_subcomponent,
    train_write_direction,
    tune_strengths,
    write_token,
)
from tl_vpd.editing.examples import Examples

FEW, BASELINES = 8, ("lora_1", "lora_4", "full")
EFFECTS = ("near_kl", "elsewhere_kl", "p99")


def baseline(task: Task, method: str, budget: int) -> dict[str, Any]:
    """LoRA or full fine-tuning."""
    torch.manual_seed(task.seed)
    states, generator = task.example_states[:budget], torch.Generator().manual_seed(task.seed)

    def step(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
        logits = run(states[torch.randperm(len(states), generator=generator)[: task.batch]])
        return task.loss(logits), task.reached(float(logits.softmax(-1)[:, task.token].detach().mean()))

    rank = None if method == "full" else int(method.removeprefix("lora_"))
    lr = LR["full" if rank is None else "lora"]
    result = train(task.tail, task.sites, rank, step, steps=task.most, lr=lr)
    return task.measured(result.change, parameters=result.parameters, steps=result.steps, reached=result.reached)


def chosen(task: Task, examples: Tensor) -> list[str]:
    """Subcomponents that matter for the examples at their last token and not at the others, the first of them most."""
    examples = examples[: 2 * task.batch]
    g = task.vpd.causal_importances(task.model, examples)
    axis = task.vpd.site_axis
    more = torch.cat([g[site][:, -1].mean(0) - g[site][:, 1:-1].mean((0, 1)) for site in axis.slices]).clamp(min=0)
    if task.kind == "write":
        columns = axis.slices[SITE]
        return [f"{SITE}:{int(more[columns].argmax())}"]
    table = gradient_by_subcomponent(task.vpd, task.model, examples, task.loss)
    columns = [axis.slices[site].start + index for site, index in zip(table["site"], table["index"], strict=True)]
    order = (table["gradient"].abs() * more[columns].tolist()).sort_values(ascending=False).index[:FEW]
    return [str(table["subcomponent"][i]) for i in order]


def edits(task: Task, examples: Tensor, few: list[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    """The methods of this package, by name."""
    vpd, model = task.vpd, task.model
    c, trained = few[0], {"batch_size": task.batch, "seed": task.seed}

    def entry(edit: Edit, **more: Any) -> dict[str, Any]:
        return task.measured({site: edit.delta(site).float() for site in edit.sites}, **more)

    def direction() -> dict[str, Any]:
        config = TrainingConfig(steps=task.most, lr=LR["direction"], probability=task.goal, **trained)
        result = train_write_direction(vpd, model, Wanted(task.token, examples), c, config=config)
        more = {"steps": len(result.probabilities) - 1, "reached": result.reached}
        return entry(result.edit, subcomponent=c, parameters=vpd.sites[SITE].d_out, **more)

    def analytic() -> dict[str, Any]:
        edit = write_token(vpd, model, examples, c, task.token, alpha=3.0)
        return entry(edit, subcomponent=c, parameters=0, steps=0, reached=None)

    def strengths(subcomponents: list[str] | None, penalty: float = 0.0) -> dict[str, Any]:
        goal = -torch.log1p(torch.tensor(-task.goal)).item()
        lr = LR["few_strengths" if subcomponents or task.kind == "real" else "strengths"]
        config = StrengthConfig(steps=task.most, lr=lr, penalty=penalty, goal=goal, **trained)
        result = tune_strengths(vpd, model, examples, task.loss, subcomponents, config=config)
        more = {"moved": len(result.edit), "steps": len(result.losses) - 1, "reached": float(result.losses[-1]) <= goal}
        return entry(result.edit, parameters=len(result.subcomponents), **more)

    if task.kind == "write":
        return {"analytic": analytic, "trained": direction}
    methods = {
        "one_strength": lambda: {"subcomponent": c, **strengths([c])},
        "few_strengths": lambda: {"subcomponents": few, **strengths(few)},
        "strengths": lambda: strengths(None),
    }
    return methods if task.kind == "real" else methods | {"strengths_l0": lambda: strengths(None, 3e-3)}


def finetuned_for_write(task: Task, rows: Tensor, where: Tensor) -> nn.Module:
    """The bundled model, all its decomposed matrices trained for the behaviour of *write*, other predictions as before."""
    finetuned = copy.deepcopy(task.model).requires_grad_(False)
    adapter = adapt(finetuned)
    weights = [getattr(*adapter.holder(name)).requires_grad_(True) for name in task.vpd.sites]
    optimizer = torch.optim.Adam(weights, lr=2e-4)
    clean = task.model(rows).log_softmax(-1).detach()
    for _ in range(60):
        log_p = finetuned(rows).log_softmax(-1)
        if float(log_p[where][:, task.token].detach().exp().mean()) > 0.9:
            break
        other = (clean.exp() * (clean - log_p)).sum(-1)[~where].mean()
        optimizer.zero_grad()
        (other - log_p[where][:, task.token].mean()).backward()
        optimizer.step()
    return finetuned.requires_grad_(False)


def difference(seed: int) -> list[dict[str, Any]]:
    """A fine-tuning for the behaviour of *write*, and what is left of it when the changes of subcomponents are undone."""
    task, tokens = bundled_task("write", "self.", seed, 32), bundled.tokens("training")
    at = torch.tensor([adapt(task.model).token(text) for text in CONSTRUCTS["self."][0]])
    rows = tokens[torch.isin(tokens, at).sum(1) >= 3]
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:16]]
    where = torch.isin(rows, at)
    finetuned = finetuned_for_write(task, rows, where)

    def loss(logits: Tensor) -> Tensor:
        return -logits.log_softmax(-1)[where][:, task.token].mean()

    explained = explain_difference(
        task.vpd, task.model, finetuned, prompts=rows, loss=loss, config=DifferenceConfig(pieces=16)
    )
    n, generator = len(explained.table), torch.Generator().manual_seed(seed)
    names = [str(name) for name in explained.table["subcomponent"]]
    examples = Examples.of(adapt(task.model), Wanted(task.token, task.held_out))

    def probability(edit: Edit) -> float:
        with task.vpd.attach(finetuned, check_weights=False) as attached, torch.no_grad(), attached.edited(edit):
            return float(examples.log_probs(finetuned(examples.tokens)).exp().mean())

    with torch.no_grad():
        before, after = (float(examples.log_probs(m(examples.tokens)).exp().mean()) for m in (task.model, finetuned))
    record: list[dict[str, Any]] = [{"undone": 0, "of": n, "model": before, "named": after, "random": after}]
    for k in (4, 8, 16, 32, 64, n):
        random = [names[i] for i in torch.randperm(n, generator=generator)[:k].tolist()]
        left = {"named": probability(explained.undo(names[:k])), "random": probability(explained.undo(random))}
        record.append({"undone": k, "of": n, **left})
    return [rounded(row) for row in record]


class Methods:
    """The methods of a task, which is made when the first of them runs.

    Args:
        make: makes the task.
    """

    def __init__(self, make: Callable[[], Task]) -> None:
        self.make, self.few = make, dict[int, list[str]]()

    @cached_property
    def task(self) -> Task:
        """The task."""
        return self.make()

    def measure(self, method: str, budget: int) -> dict[str, Any]:
        """A method's entry; ``model``: without any change."""
        task, examples = self.task, self.task.examples[:budget]
        noted = {"tokens": len(examples), "seed": task.seed}
        if method == "model":
            return rounded({"seed": task.seed, "wanted": task.wanted({})})
        if method in BASELINES:
            return noted | baseline(task, method, budget)
        few = self.few[budget] = self.few.get(budget) or chosen(task, examples)
        return noted | edits(task, examples, few)[method]()


def entries(*, real: bool, seeds: list[int], rows: int | None) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """What is to be measured: the part of the record, the entry's name, and how; nothing runs before it is called."""
    if not real:
        for seed in seeds:
            yield "difference", f"seed {seed}", partial(difference, seed)
    strengths = ("one_strength", "few_strengths", "strengths")
    for seed in seeds:
        parts: dict[str, tuple[Callable[[], Task], tuple[str, ...]]] = {}
        if real:
            parts["real"] = partial(real_task, seed, rows or 8), strengths
        else:
            parts["write"] = partial(bundled_task, "write", "self.", seed, rows or 64), ("analytic", "trained")
            for name in CONSTRUCTS:
                make = partial(bundled_task, "suppress", name, seed, rows or 64)
                parts[f"suppress {name}"] = make, (*strengths, "strengths_l0")
        for part, (make, ours) in parts.items():
            methods = Methods(make)
            yield part, f"model, seed {seed}", partial(methods.measure, "model", 0)
            more = part in ("write", "suppress self.")
            for budget in (8, 64, *((512, 2048) if more else ())):
                for method in (*ours, *BASELINES):
                    yield part, f"{method}, {budget} tokens, seed {seed}", partial(methods.measure, method, budget)


def tables(record: dict[str, Any]) -> dict[str, str]:
    """The page's tables by name: means over seeds, each change scaled to the same effect."""
    return {
        "editing_write": markdown(at_equal_effect(record, {"write": ""}, (8, 64, 512, 2048))),
        "editing_self": markdown(at_equal_effect(record, {"suppress self.": ""}, (8, 64, 512, 2048))),
        "editing_others": markdown(
            at_equal_effect(record, {"suppress def": "`def`: ", "suppress else:": "`:` after `else`: "}, (64,))
        ),
        "editing_real": markdown(at_equal_effect(record, {"real": ""}, (8, 64))),
        "editing_undone": markdown(undone(record["difference"])),
    }


def at_equal_effect(record: dict[str, Any], parts: dict[str, str], budgets: tuple[int, ...]) -> list[dict[str, str]]:
    """KL near and elsewhere of each method, by number of examples.

    Args:
        record: of the file.
        parts: names of tasks, and what their columns begin with.
        budgets: numbers of examples.
    """
    rows: dict[str, dict[str, str]] = {}
    for part, title in parts.items():
        entries = [(name.split(",")[0], entry) for name, entry in record[part].items() if "tokens" in entry]
        for method in dict.fromkeys(name for name, _ in entries):
            of_method = [entry for name, entry in entries if name == method]
            row = rows.setdefault(method, {"": f"`{method}`", "parameters": f"{of_method[0]['parameters']:,}"})
            for budget in budgets:
                equal = [entry["equal"] for entry in of_method if entry["tokens"] == budget]
                reached = bool(equal) and all(equal)
                means = [sum(e[key] for e in equal) / len(equal) for key in EFFECTS[:2]] if reached else []
                row[f"{title}{budget:,} examples"] = ", ".join(f"{x:.2g}" for x in means) or "–"
    return list(rows.values())


def undone(of_seeds: dict[str, Any]) -> list[dict[str, str]]:
    """What is left of a fine-tuning where changes are undone: means over seeds."""
    seeds = [pd.DataFrame(rows).set_index("undone") for rows in of_seeds.values()]
    mean = sum(seeds[1:], start=seeds[0]) / len(seeds)
    return [
        {"undone": name, **{str(number): f"{x:.2g}" for number, x in mean[name].items()}}
        for name in ("named", "random")
    ]


def main() -> None:
    """Runs what is asked for and writes the record after each entry."""
    warnings.simplefilter("ignore")
    parser = harness.parser("editing", __doc__)
    parser.add_argument("--real", action="store_true", help="SmolLM2 in place of the bundled model")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of examples")
    parser.add_argument("--rows", type=int, default=None, help="rows of text (of each kind) that KL is measured on")
    parser.add_argument("--resume", action="store_true", help="measure only what the record does not have")
    arguments = parser.parse_args()
    record = harness.read(arguments.out)
    digest = hashlib.sha256((DECOMPOSITION / "decomposition.safetensors").read_bytes()).hexdigest()[:12]
    settings = {"lr": LR, "goal": GOAL, "window": WINDOW, "decomposition": digest}
    for part, name, measure in entries(real=arguments.real, seeds=arguments.seeds, rows=arguments.rows):
        if arguments.resume and name in record.get(part, {}):
            continue
        start = time.process_time()
        entry = measure()
        if isinstance(entry, dict):
            entry["cpu_seconds"] = round(time.process_time() - start, 1)
        record.setdefault(part, {})[name] = entry
        harness.write(arguments.out, record, "editing", **settings)
        print(part, name, json.dumps(entry), flush=True)
    return None


if __name__ == "__main__":
    main()
