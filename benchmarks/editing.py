"""Edits of the bundled model beside LoRA and full fine-tuning of the same matrices.

    python -m benchmarks.editing                     # writes benchmarks/results/editing.json

Two tasks at the token ``self``, which ``.`` mostly follows in Python. *write*: the token `` the`` is wanted after it; one MLP
matrix may change (W_out of the first block). *suppress*: ``.`` is not wanted after it; all twelve matrices may change. Methods of
a task are trained on the same examples (``tokens`` of them, windows of 16 tokens), by Adam, without a term for other text, and
stop as soon as the mean probability on them reaches 0.8 (write) or is at most 0.1 (suppress). LoRA and full fine-tuning change
the model of transformers (``peft``).

=================  ==========================================================================================
analytic           one write direction becomes 3 û of the token
trained            one write direction is trained
one_strength       the strength of the subcomponent with the largest gradient
few_strengths      those of the eight with the largest gradients
strengths          all strengths; ``strengths_l0``: with a penalty on how many move
lora_1, lora_4     LoRA of rank 1 and 4;  ``full``: the matrices themselves
=================  ==========================================================================================

``wanted``: the mean probability of the token after ``self`` in windows of validation files (``model``: without any change);
``near_kl``, ``elsewhere_kl``, ``p99`` (of elsewhere): KL from the model's prediction in nats, on tokens at most 20 from a
``self``, and on all but ``self``; ``parameters``: how many are trained; ``reached``: whether the criterion was.

*difference*: all matrices are fine-tuned for the behaviour of *write*, with a KL term for other tokens; the change is explained
on the training windows, and the k subcomponents that contribute most to it are taken back, or k random ones of the table.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from tl_vpd import bundled
from tl_vpd.adapters import adapt
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
from tl_vpd.editing.measures import Run, kl_by_token, near_and_elsewhere, row_of_text, row_of_wanted

WINDOW, BUDGETS, SITE = 16, (8, 64, 512, 2048), "blocks.0.mlp.W_out"
GOAL, MOST = {"write": 0.8, "suppress": 0.1}, 150
LR = {"lora": 2e-3, "full": 2e-4, "strengths": 0.01, "few_strengths": 0.05, "direction": 0.1}
MODULES = {
    "write": r".*layers\.0\.mlp\.dense_4h_to_h",
    "suppress": r".*\.(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)",
}


class Task:
    """One of the two tasks on the bundled model, and its measures."""

    def __init__(self, name: str, seed: int, rows: int) -> None:
        self.name, self.seed = name, seed
        self.model, self.vpd = bundled.model(), bundled.decomposition()
        self.adapter = adapt(self.model)
        self.at, self.token = self.adapter.token("self"), self.adapter.token(" the" if name == "write" else ".")
        self.text = bundled.tokens("validation")[:rows]
        self.held_out = Wanted(self.token, self.windows(bundled.tokens("validation")[rows:])[:256])
        generator = torch.Generator().manual_seed(seed)
        every = self.windows(bundled.tokens("training"))
        self.examples = every[torch.randperm(len(every), generator=generator)]

    def windows(self, tokens: Tensor) -> Tensor:
        """Windows that end at ``self``, opened by BOS as the model reads text."""
        ends = (tokens[:, WINDOW - 1 :] == self.at).nonzero().tolist()
        return torch.stack([torch.cat([tokens[r, :1], tokens[r, p + 1 : p + WINDOW]]) for r, p in ends])

    def loss(self, logits: Tensor) -> Tensor:
        """What all methods of the task lower."""
        log_p = logits[:, -1].log_softmax(-1)[:, self.token]
        return -log_p.mean() if self.name == "write" else -torch.log1p(-log_p.exp().clamp(max=1 - 1e-6)).mean()

    def reached(self, probability: float) -> bool:
        """Whether a mean probability meets the criterion."""
        return probability >= GOAL["write"] if self.name == "write" else probability <= GOAL["suppress"]

    def row(self, run: Run, **more: Any) -> dict[str, Any]:
        """A method's entry."""
        before: Run = lambda tokens, mask: self.adapter.run(tokens, mask)  # noqa: E731
        fires = self.text == self.at
        near, elsewhere = near_and_elsewhere(fires, torch.ones_like(fires), 20)
        kl = row_of_text(kl_by_token(before, run, self.text, None, 16), {"near": near, "elsewhere": elsewhere})
        wanted = row_of_wanted(before, run, Examples.of(self.adapter, self.held_out))
        figures = {"wanted": wanted["wanted_after"], "near_kl": kl["near_kl"]}
        figures |= {"elsewhere_kl": kl["elsewhere_kl"], "p99": kl["elsewhere_p99"]}
        return {"seed": self.seed, **more, **{name: float(f"{value:.4g}") for name, value in figures.items()}}

    def of_edit(self, edit: Edit, **more: Any) -> dict[str, Any]:
        """An edit's entry."""
        with self.vpd.attach(self.model) as attached:

            def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
                with attached.edited(edit):
                    return self.adapter.run(tokens, mask)

            return self.row(run, **more)


def baseline(task: Task, method: str, examples: Tensor) -> dict[str, Any]:
    """LoRA or full fine-tuning of the model of transformers."""
    import re

    from peft import LoraConfig, get_peft_model
    from transformers import GPTNeoXForCausalLM

    torch.manual_seed(task.seed)
    plain: nn.Module = GPTNeoXForCausalLM.from_pretrained(bundled.MODEL, dtype=torch.float32)
    pattern = MODULES[task.name]
    if method == "full":
        model = plain.requires_grad_(False)
        for name, module in model.named_modules():
            if re.fullmatch(pattern, name):
                module.weight.requires_grad_(True)
    else:
        rank = int(method.removeprefix("lora_"))
        model = get_peft_model(plain, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=pattern))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LR["full" if method == "full" else "lora"])
    generator = torch.Generator().manual_seed(task.seed)
    probability, step = 0.0, 0
    for step in range(MOST + 1):
        batch = examples[torch.randperm(len(examples), generator=generator)[:128]]
        logits = model(input_ids=batch).logits
        probability = float(logits[:, -1].softmax(-1)[:, task.token].detach().mean())
        if task.reached(probability) or step == MOST:
            break
        optimizer.zero_grad()
        task.loss(logits).backward()
        optimizer.step()
    with torch.no_grad():
        return task.row(
            lambda tokens, mask: model(input_ids=tokens).logits.detach(),
            parameters=sum(p.numel() for p in trained),
            steps=step,
            reached=task.reached(probability),
        )


def chosen(task: Task, examples: Tensor) -> list[str]:
    """The subcomponent of ``SITE`` that is important at ``self`` and rarely elsewhere, or the eight of the largest gradients."""
    if task.name == "write":
        g = task.vpd.causal_importances(task.model, examples[:64])[SITE][:, -1].mean(0)
        rest = task.vpd.causal_importances(task.model, task.text[:16])[SITE].mean((0, 1))
        return [f"{SITE}:{int((g - rest).argmax())}"]
    table = gradient_by_subcomponent(task.vpd, task.model, examples[:64], task.loss)
    return [str(name) for name in table["subcomponent"][:8]]


def edits(task: Task, examples: Tensor) -> dict[str, Callable[[], dict[str, Any]]]:
    """The methods of this package, by name."""
    vpd, model, few = task.vpd, task.model, chosen(task, examples)
    c = few[0]
    if task.name == "write":
        width = vpd.sites[SITE].d_out

        def trained() -> dict[str, Any]:
            config = TrainingConfig(steps=MOST, lr=LR["direction"], probability=GOAL["write"])
            result = train_write_direction(vpd, model, Wanted(task.token, examples), c, config=config)
            more = {"parameters": width, "steps": len(result.probabilities) - 1, "reached": result.reached}
            return task.of_edit(result.edit, subcomponent=c, **more)

        def analytic() -> dict[str, Any]:
            edit = write_token(vpd, model, examples, c, task.token, alpha=3.0)
            return task.of_edit(edit, subcomponent=c, parameters=0, steps=0, reached=None)

        return {"analytic": analytic, "trained": trained}

    def strengths(subcomponents: list[str] | None, penalty: float = 0.0) -> dict[str, Any]:
        goal = -torch.log1p(torch.tensor(-GOAL["suppress"])).item()
        config = StrengthConfig(
            steps=MOST, lr=LR["few_strengths" if subcomponents else "strengths"], penalty=penalty, goal=goal
        )
        result = tune_strengths(vpd, model, examples, task.loss, subcomponents, config=config)
        more = {"moved": len(result.edit), "steps": len(result.losses) - 1, "reached": float(result.losses[-1]) <= goal}
        return task.of_edit(result.edit, parameters=len(result.subcomponents), **more)

    return {
        "one_strength": lambda: {"subcomponent": c, **strengths([c])},
        "few_strengths": lambda: strengths(few),
        "strengths": lambda: strengths(None),
        "strengths_l0": lambda: strengths(None, 3e-3),
    }


def difference(seed: int) -> list[dict[str, Any]]:
    """A fine-tuning for the behaviour of *write*, and what is left of it when parts are taken back."""
    task = Task("write", seed, 64)
    tokens = bundled.tokens("training")
    rows = tokens[(tokens == task.at).sum(1) >= 3]
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:16]]
    where, finetuned = rows == task.at, copy.deepcopy(task.model)
    adapter = adapt(finetuned)
    finetuned.requires_grad_(False)
    weights = [getattr(*adapter.holder(name)).requires_grad_(True) for name in task.vpd.sites]
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    clean = task.model(rows).log_softmax(-1).detach()
    for _ in range(40):
        log_p = finetuned(rows).log_softmax(-1)
        if float(log_p[where][:, task.token].detach().exp().mean()) > 0.9:
            break
        other = (clean.exp() * (clean - log_p)).sum(-1)[~where].mean()
        optimizer.zero_grad()
        (other - log_p[where][:, task.token].mean()).backward()
        optimizer.step()

    def loss(logits: Tensor) -> Tensor:
        return -logits.log_softmax(-1)[where][:, task.token].mean()

    config = DifferenceConfig(pieces=16)
    found = explain_difference(task.vpd, task.model, finetuned, prompts=rows, loss=loss, config=config)
    n, generator = len(found.table), torch.Generator().manual_seed(seed)
    names = [str(name) for name in found.table["subcomponent"]]
    examples = Examples.of(task.adapter, task.held_out)

    def probability(edit: Edit | None) -> float:
        with task.vpd.attach(finetuned, check_weights=False) as attached, torch.no_grad():
            if edit is None:
                return float(examples.log_probs(finetuned(examples.tokens)).exp().mean())
            with attached.edited(edit):
                return float(examples.log_probs(finetuned(examples.tokens)).exp().mean())

    record = []
    for k in (0, 8, 16, 32, 64, n):
        chance = [names[i] for i in torch.randperm(n, generator=generator)[:k].tolist()]
        named, random = (probability(found.undo(c) if c else None) for c in (names[:k], chance))
        record.append({"seed": seed, "undone": k, "of": n, "named": round(named, 4), "random": round(random, 4)})
    return record


def main() -> None:
    """Runs what is asked for and writes the record after each entry."""
    warnings.simplefilter("ignore")
    parser = harness.parser("editing", __doc__)
    parser.add_argument("--budgets", type=int, nargs="*", default=list(BUDGETS), help="examples that are trained on")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=64, help="windows of text that KL is measured on")
    parser.add_argument("tasks", nargs="*", default=["write", "suppress", "difference"])
    arguments = parser.parse_args()
    record = harness.read(arguments.out)
    settings = {"lr": LR, "goal": GOAL, "most_steps": MOST, "window": WINDOW, "rows": arguments.rows}

    def note(task: str, key: str, entries: list[dict[str, Any]]) -> None:
        record.setdefault(task, {})[key] = entries
        harness.write(arguments.out, record, "editing", **settings)
        print(task, key, json.dumps(entries), flush=True)

    for seed in arguments.seeds:
        if "difference" in arguments.tasks:
            note("difference", f"seed {seed}", difference(seed))
        for name in (n for n in arguments.tasks if n != "difference"):
            task = Task(name, seed, arguments.rows)
            note(name, "model", [task.row(task.adapter.run)])
            for budget in arguments.budgets:
                examples = task.examples[:budget]
                methods = edits(task, examples)
                methods |= {m: partial(baseline, task, m, examples) for m in ("lora_1", "lora_4", "full")}
                for method, measure in methods.items():
                    start = time.perf_counter()
                    entry = {"tokens": len(examples), **measure()}
                    entry["seconds"] = round(time.perf_counter() - start, 1)
                    note(name, f"{method}, {budget} tokens, seed {seed}", [entry])


if __name__ == "__main__":
    main()
