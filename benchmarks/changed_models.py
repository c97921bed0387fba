"""Changes of matrices of a model of transformers: put on it for a while, trained (LoRA, all of a matrix), and measured.

A change is ``{site: ΔW [d_in, d_out]}``, whichever way it was made, so that all are measured alike. Blocks before the first
changed one run once for each text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tl_vpd.adapters.plain import PlainWeights
from tl_vpd.editing.measures import row_of_text

Change = Mapping[str, Tensor]
MOST = 8.0
"""The largest factor that a change is scaled by to reach an effect."""


class Tail:
    """A model of transformers from one block on.

    Args:
        model: of GPT-NeoX or Llama.
        sites: whose weights may change.
    """

    def __init__(self, model: Any, sites: Sequence[str]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.body = model.base_model
        self.layers, self.first = self.body.layers, min(int(site.split(".")[1]) for site in sites)
        self._use(self.layers[self.first :])
        self.weights = PlainWeights(model)
        self.names = {site: site.replace(*(f"blocks.{n}." for n in self._numbers(site)), 1) for site in sites}

    def _numbers(self, site: str) -> tuple[int, int]:
        block = int(site.split(".")[1])
        return block, block - self.first

    def _use(self, layers: nn.ModuleList) -> None:
        self.body.layers, self.model.config.num_hidden_layers = layers, len(layers)

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """The residual stream that enters the first block of the tail."""
        if not self.first:
            return self.model.get_input_embeddings()(tokens)
        self._use(self.layers)
        states = [self.body(rows, output_hidden_states=True).hidden_states[self.first] for rows in tokens.split(16)]
        self._use(self.layers[self.first :])
        return torch.cat(states)

    def logits(self, states: Tensor, *, last: bool = False) -> Tensor:
        """Of all positions, or the last."""
        logits = self.model(inputs_embeds=states, use_cache=False, logits_to_keep=1 if last else 0).logits
        return logits[:, -1] if last else logits

    @contextmanager
    def changed(self, change: Change, factor: float = 1.0) -> Iterator[None]:
        """Inside, the weights have a change, times a factor."""
        before = {site: self.weights.weight(self.names[site]).clone() for site in change}
        try:
            for site, delta in change.items():
                self.weights.set_weight(self.names[site], before[site] + factor * delta.to(before[site]))
            yield
        finally:
            for site, W in before.items():
                self.weights.set_weight(self.names[site], W)

    def change_of(self, deltas: Mapping[nn.Module, Tensor]) -> Change:
        """The change of every site, from changes ``[d_out, d_in]`` of the modules that hold them."""
        change = {}
        for site, name in self.names.items():
            place = self.weights.places[name]
            if place.module in deltas:
                delta = deltas[place.module].T.detach()
                change[site] = (delta if place.outputs is None else delta[:, place.outputs]).clone()
        return change


@dataclass(frozen=True)
class Trained:
    """A trained change, and what it took."""

    change: Change
    parameters: int
    steps: int
    reached: bool


def train(
    tail: Tail,
    sites: Sequence[str],
    rank: int | None,
    step: Callable[[Callable[[Tensor], Tensor]], tuple[Tensor, bool]],
    *,
    steps: int,
    lr: float,
) -> Trained:
    """Trains LoRA, or all of the matrices, until a criterion is met.

    Args:
        tail: the model.
        sites: whose matrices change.
        rank: of LoRA, by ``peft`` (None: the matrices themselves).
        step: gives a step's loss, and whether the criterion is met, from a function of states to the last logits.
        steps: at most.
        lr: of Adam.
    """
    modules = list({id(m): m for m in (tail.weights.places[tail.names[site]].module for site in sites)}.values())
    adapted: Any = None
    if rank is None:
        before = {module: module.weight.detach().clone() for module in modules}
        trained = [module.weight.requires_grad_(True) for module in modules]
    else:
        from peft import LoraConfig, get_peft_model

        names = [name for name, module in tail.model.named_modules() if any(module is m for m in modules)]
        adapted = get_peft_model(tail.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
        trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    for n in range(steps + 1):
        loss, reached = step(lambda states: tail.logits(states, last=True))
        if reached or n == steps:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parameters = sum(p.numel() for p in trained)
    if rank is None:
        deltas = {module: module.weight.detach() - W for module, W in before.items()}
        with torch.no_grad():
            for module, W in before.items():
                module.weight.copy_(W).requires_grad_(False)
    else:
        layers = [m for m in adapted.modules() if hasattr(m, "get_delta_weight")]
        deltas = {layer.get_base_layer(): layer.get_delta_weight("default").detach() for layer in layers}
        adapted.unload()
    return Trained(tail.change_of(deltas), parameters, n, reached)


@dataclass(frozen=True)
class Text:
    """Text that KL is measured on: states, log-probabilities of the model, and which tokens are of which kind."""

    states: Tensor
    log_p: Tensor
    kinds: Mapping[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, tail: Tail, tokens: Tensor, kinds: Mapping[str, Tensor]) -> Text:
        """Text of tokens."""
        states = tail.states(tokens)
        log_p = torch.cat([tail.logits(rows).log_softmax(-1) for rows in states.split(16)])
        return cls(states, log_p, kinds)

    @torch.no_grad()
    def kl(self, tail: Tail) -> dict[str, float]:
        """Mean and 99th percentile of KL by kind, from the model's prediction to that of the tail as it is now."""
        log_q = (tail.logits(rows).log_softmax(-1) for rows in self.states.split(16))
        kl = [(p.exp() * (p - q)).sum(-1).clamp(min=0) for p, q in zip(self.log_p.split(16), log_q, strict=True)]
        return row_of_text(torch.cat(kl), self.kinds)


def factor_to(effect: Callable[[float], bool], *, halvings: int = 7) -> float | None:
    """The smallest factor of a change that is enough, to 1%; None where ``MOST`` is not.

    Args:
        effect: whether a factor is enough.
        halvings: of the last interval.
    """
    high = 1.0
    while not effect(high):
        high *= 2
        if high > MOST:
            return None
    low = 0.0 if high == 1 else high / 2
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if effect(middle) else (middle, high)
    return high
