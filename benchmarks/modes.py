"""Masked modes and importances at GPT-2's size, beside what they consist of. Writes ``modes.json``.

    python -m benchmarks.modes          # one thread, about a minute

The model is a random HookedTransformer of GPT-2 small's shape, the prompt 1 × 128 tokens, and the decomposition has the default C
and Γ. Medians of the processor's seconds, which other work on the machine changes little:

``model``, ``gamma``, ``products``   the plain model, Γ, and ``(x @ V) @ U`` of every site
``rounded``                          ``masked("rounded")``: also the clean pass that Γ reads (``inputs``)
``masks``                            every site under masks that are there already
``importances``                      ``causal_importances``: clean pass and Γ
``attach_first``, ``attach``         attaching, when the model's weights are new and when they are known
``after_attach``                     the first forward pass then
``gamma_floor``                      Γ's products at this machine's rate
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.models import hooked_transformer
from tl_vpd import VPDConfig
from tl_vpd.forward import MaskedModel
from tl_vpd.training import new_decomposition

POS, VOCABULARY = 128, 50257


def cpu_seconds(function: Callable[[], object], rounds: int) -> float:
    """The processor's seconds of a call: the median of some."""
    return statistics.median(harness.seconds_of(function, time.process_time) for _ in range(rounds))


def product_rate() -> float:
    """This machine's FLOP per second in products of as many tokens."""
    x, W = torch.randn(POS, 1024), torch.randn(1024, 4096)
    return 2 * POS * W.numel() / cpu_seconds(lambda: x @ W, 9)


@torch.no_grad()
def measure(layers: int, rounds: int) -> dict[str, float]:
    """The seconds of each.

    Args:
        layers: of the model.
        rounds: that medians are of.
    """
    model: Any = hooked_transformer(
        layers=layers, d_model=768, heads=12, vocabulary=VOCABULARY, context=POS, act_fn="gelu_new"
    )
    tokens = torch.randint(0, VOCABULARY, (1, POS), generator=torch.Generator().manual_seed(0))
    vpd = new_decomposition(model, VPDConfig())
    for parameter in model.parameters():
        parameter.mul_(1.0)  # the weights are new, as far as anybody knows
    seconds = {"model": cpu_seconds(lambda: model(tokens), rounds)}
    seconds["attach_first"] = cpu_seconds(lambda: vpd.attach(model).detach(), 1)
    seconds["attach"] = cpu_seconds(lambda: vpd.attach(model).detach(), rounds)
    seconds["importances"] = cpu_seconds(lambda: vpd.causal_importances(model, tokens), rounds)
    masks = vpd.causal_importances(model, tokens).masks("rounded")
    with vpd.attach(model) as attached:
        seconds["after_attach"] = cpu_seconds(lambda: model(tokens), 1)
        for name, mode in (("rounded", "rounded"), ("masks", masks)):
            with attached.masked(mode):
                seconds[name] = cpu_seconds(lambda: model(tokens), rounds)
    with MaskedModel(vpd, model) as masked_model:
        inputs = masked_model.inputs(tokens)
        seconds["inputs"] = cpu_seconds(lambda: masked_model.inputs(tokens), rounds)
    seconds["gamma"] = cpu_seconds(lambda: vpd.pre_sigmoid(inputs), rounds)
    seconds["products"] = cpu_seconds(lambda: [(x @ vpd.V[n]) @ vpd.U[n] for n, x in inputs.items()], rounds)
    of_gamma = sum(p.numel() for p in vpd.gamma.parameters() if p.ndim == 2)
    seconds["gamma_floor"] = 2 * POS * of_gamma / product_rate()
    return {name: round(value, 4) for name, value in seconds.items()}


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """What is asked of the modes."""
    s = seconds
    return {
        "rounded_over_model_gamma_products": round(s["rounded"] / (s["model"] + s["gamma"] + s["products"]), 3),
        "masks_over_model_products": round(s["masks"] / (s["model"] + s["products"]), 3),
        "gamma_over_floor": round(s["gamma"] / s["gamma_floor"], 3),
        "rounded_over_model": round(s["rounded"] / s["model"], 2),
    }


def main() -> None:
    """Measures and writes the record."""
    parser: argparse.ArgumentParser = harness.parser("modes", __doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seconds = measure(arguments.layers, arguments.rounds)
    record = {"seconds": seconds, **ratios(seconds)}
    harness.write(arguments.out, record, "modes", layers=arguments.layers, rounds=arguments.rounds)
    print(record)


if __name__ == "__main__":
    main()
