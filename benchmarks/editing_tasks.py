"""The tasks of the editing benchmark: what is trained and measured, on the bundled model and on SmolLM2."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.changed_models import Change, Tail, Text, factor_to
from tl_vpd import Decomposition, bundled
from tl_vpd.adapters import adapt
from tl_vpd.adapters.quiet import quiet_transformers
from tl_vpd.editing.measures import near_and_elsewhere
from tl_vpd.fact import data
from tl_vpd.fact.settings import FACTS

WINDOW, SITE = 16, "blocks.0.mlp.W_out"
GOAL = {"write": 0.8, "suppress": 0.1, "real": 0.05}
LR = {"lora": 2e-3, "full": 2e-4, "strengths": 0.01, "few_strengths": 0.1, "direction": 0.1}
CONSTRUCTS = {"self.": (("self", " self"), "."), "def": (("\n\n    ",), "def"), "else:": (("else",), ":")}
ASKED = (
    "The capital of {} is",
    "The capital city of {} is",
    "The capital of {} is the city of",
    "In {}, the capital is",
)
OTHERWISE_ASKED = (
    "The capital and largest city of {} is",
    "The name of the capital of {} is",
    "What is the capital of {}? The capital of {} is",
    "I know that the capital of {} is",
)
COUNTRIES = ("Greece", "France", "Italy", "Spain", "Poland", "Japan", "Egypt", "Ireland")


@dataclass(frozen=True)
class Task:
    """What is trained and measured, on one model.

    Attributes:
        kind: ``write``, ``suppress`` or ``real``.
        vpd: the decomposition.
        model: its target.
        tail: the same model of transformers.
        sites: whose weights may change.
        token: that is wanted, or not wanted.
        examples: windows to train on, in the order of a seed.
        held_out: windows to measure on.
        texts: on which KL is measured.
        seed: of the examples and of training.
        most: steps, at most.
        batch: examples of a step, at most.
    """

    kind: str
    vpd: Decomposition
    model: Any
    tail: Tail
    sites: list[str]
    token: int
    examples: Tensor
    held_out: Tensor
    texts: list[Text]
    seed: int
    most: int
    batch: int

    @cached_property
    def held_out_states(self) -> Tensor:
        """Of the windows to measure on."""
        return self.tail.states(self.held_out)

    @cached_property
    def example_states(self) -> Tensor:
        """Of the windows to train on."""
        return self.tail.states(self.examples)

    @property
    def goal(self) -> float:
        """The criterion."""
        return GOAL[self.kind]

    def loss(self, logits: Tensor) -> Tensor:
        """What all methods lower, from logits ``[batch, pos, vocab]`` or of the last position."""
        log_p = (logits[:, -1] if logits.ndim == 3 else logits).log_softmax(-1)[:, self.token]
        return -log_p.mean() if self.kind == "write" else -torch.log1p(-log_p.exp().clamp(max=1 - 1e-6)).mean()

    def reached(self, probability: float) -> bool:
        """Whether a mean probability meets the criterion."""
        return probability >= self.goal if self.kind == "write" else probability <= self.goal

    @torch.no_grad()
    def wanted(self, change: Change, factor: float = 1.0) -> float:
        """The mean probability of the token on the windows that were not trained on."""
        with self.tail.changed(change, factor):
            return float(self.tail.logits(self.held_out_states, last=True).softmax(-1)[:, self.token].mean())

    def side_effects(self, change: Change, factor: float = 1.0) -> dict[str, Any]:
        """KL on other text."""
        with self.tail.changed(change, factor):
            kl = {kind: value for text in self.texts for kind, value in text.kl(self.tail).items()}
        named = {"near_kl": kl.pop("near_kl"), "elsewhere_kl": kl.pop("elsewhere_kl"), "p99": kl.pop("elsewhere_p99")}
        kinds = {kind: value for kind, value in kl.items() if kind.endswith("_kl")}
        return named | ({"by_kind": kinds} if kinds else {})

    def measured(self, change: Change, **more: Any) -> dict[str, Any]:
        """A method's entry."""
        entry = {**more, "wanted": self.wanted(change), **self.side_effects(change)}
        factor = factor_to(lambda factor: self.reached(self.wanted(change, factor)))
        entry["equal"] = None if factor is None else {"factor": factor, **self.side_effects(change, factor)}
        return rounded(entry)


def bundled_task(kind: str, construct: str, seed: int, rows: int) -> Task:
    """*write* or *suppress* on the bundled model."""
    model, vpd = bundled.model(), bundled.decomposition()
    adapter = adapt(model)
    with quiet_transformers():
        from transformers import GPTNeoXForCausalLM

        tail = Tail(GPTNeoXForCausalLM.from_pretrained(bundled.MODEL, dtype=torch.float32), list(vpd.sites))
    before, after = CONSTRUCTS[construct]
    at = torch.tensor([adapter.token(text) for text in before])
    validation, training = bundled.tokens("validation"), windows(bundled.tokens("training"), at)
    text = validation[:rows]
    fires = torch.isin(text, at)
    near, elsewhere = near_and_elsewhere(fires, torch.ones_like(fires), 20)
    return Task(
        kind,
        vpd,
        model,
        tail,
        [SITE] if kind == "write" else list(vpd.sites),
        adapter.token(" the" if kind == "write" else after),
        training[torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))],
        windows(validation[rows:], at)[:128],
        [Text.of(tail, text, {"near": near, "elsewhere": elsewhere})],
        seed,
        most=100,
        batch=64,
    )


def real_task(seed: int, rows: int) -> Task:
    """The fact of SmolLM2."""
    model, vpd = bundled.smollm2(), data.finished()
    adapter = adapt(model)
    with quiet_transformers():
        from transformers import LlamaForCausalLM

        plain = LlamaForCausalLM.from_pretrained(model.cfg.model_name, dtype=torch.float32)
    tail, filler = Tail(plain, list(vpd.sites)), data.training_rows()
    generator = torch.Generator().manual_seed(seed)

    def asked(templates: tuple[str, ...], countries: tuple[str, ...], n: int) -> Tensor:
        made = []
        for i in range(n):
            country = countries[i // len(templates) % len(countries)]
            text = "\n" + templates[i % len(templates)].replace("{}", country)
            prompt = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            row = filler[int(torch.randint(len(filler), (1,), generator=generator))]
            made.append(torch.cat([row[: WINDOW - len(prompt)], torch.tensor(prompt)]))
        return torch.stack(made)

    kinds = data.other_text(rows)
    tokens = torch.cat(list(kinds.values()))
    where = {"elsewhere": torch.ones_like(tokens, dtype=torch.bool)}
    for i, kind in enumerate(kinds):
        where[kind] = torch.zeros_like(where["elsewhere"])
        where[kind][i * rows : (i + 1) * rows] = True
    examples, held_out = asked(ASKED, ("Germany",), 64), asked(OTHERWISE_ASKED, ("Germany",), 24)
    others = asked(ASKED + OTHERWISE_ASKED, COUNTRIES, 32)
    last = torch.zeros_like(others, dtype=torch.bool)
    last[:, -1] = True
    texts = [Text.of(tail, others, {"near": last}), Text.of(tail, tokens, where)]
    token, sites = adapter.token(FACTS.answers[0]), list(vpd.sites)
    return Task("real", vpd, model, tail, sites, token, examples, held_out, texts, seed, most=30, batch=8)


def windows(tokens: Tensor, at: Tensor) -> Tensor:
    """Windows that end at one of these tokens, opened by BOS as the model reads text."""
    ends = torch.isin(tokens[:, WINDOW - 1 :], at).nonzero().tolist()
    return torch.stack([torch.cat([tokens[r, :1], tokens[r, p + 1 : p + WINDOW]]) for r, p in ends])


def rounded(entry: dict[str, Any]) -> dict[str, Any]:
    """Four digits of every number, in nested tables too."""
    return {
        name: rounded(value)
        if isinstance(value, dict)
        else float(f"{value:.4g}")
        if isinstance(value, float)
        else value
        for name, value in entry.items()
    }
