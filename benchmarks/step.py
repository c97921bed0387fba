"""Seconds and memory of a training step, beside a plain implementation of the same step in the same run.

    python -m benchmarks.step                        # writes benchmarks/results/step.json

For each size: ``ours_s`` and ``plain_s`` (medians of rounds in turn), ``ratio`` (plain over ours, median over rounds),
``executed_gflop`` (matrix products that ours executes), ``floor_s`` (the mathematics' matrix products at this machine's rate
of large products in the same run) and ``floor_share`` (floor over ours), ``peak_mb`` and ``plain_peak_mb`` (above what imports
take, in a process of their own).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import Gamma, PlainTrainer, Target
from benchmarks.timing import machine, ratio, seconds_in_turn

RESULT = Path(__file__).parent / "results" / "step.json"


@dataclass(frozen=True)
class Size:
    """One setting; C in the order Q, K, V, O, in, out. ``needed``: GFLOP of the mathematics' matrix products a step."""

    d_model: int
    d_mlp: int
    vocabulary: int
    batch: int
    context: int
    C: tuple[int, ...]
    d_gamma: int
    d_gamma_mlp: int
    needed: float
    layers: int = 2
    heads: int = 4


SIZES = {
    "S": Size(64, 256, 256, 16, 32, (64, 64, 128, 128, 256, 256), 128, 512, 7.8),
    "M": Size(256, 1024, 1024, 8, 128, (256, 256, 512, 512, 1024, 1024), 256, 1024, 207.0),
}
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "merged": {
        "merged": True,
        "minimality": "smooth_l0",
        "frequency_reference": 1024.0,
        "faithfulness": "relative",
        "adversary": {"pool": 4},
        "coefficients": {"delta": 1e3},
    },
}


def plain_step(size: Size) -> Callable[[], object]:
    """A step of the plain implementation."""
    target = Target(size.layers, size.d_model, size.d_mlp, size.heads, size.vocabulary)
    counts = dict(zip(target.W, size.C * size.layers, strict=True))
    width = sum(w.shape[0] for w in target.W.values())
    gamma = Gamma(width, sum(counts.values()), size.d_gamma, size.d_gamma_mlp, 2, 4)
    trainer = PlainTrainer(target, counts, gamma, (size.batch, size.context), 1000)
    tokens = some_tokens(size)
    return lambda: trainer.step(tokens)


def own_step(size: Size, recipe: str = "paper") -> Callable[[], object]:
    """A step of ``tl_vpd``'s trainer on a HookedTransformer of the same shape."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from tl_vpd import VPDConfig
    from tl_vpd.hooks import TappedModel
    from tl_vpd.training import Trainer, new_decomposition

    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=size.layers,
            d_model=size.d_model,
            n_heads=size.heads,
            d_head=size.d_model // size.heads,
            d_mlp=size.d_mlp,
            d_vocab=size.vocabulary,
            n_ctx=size.context,
            act_fn="gelu",
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=size.d_model // size.heads,
            seed=0,
        )
    )
    names = ("*W_Q", "*W_K", "*W_V", "*W_O", "*W_in", "*W_out")
    config = VPDConfig(
        steps=1000,
        batch_size=size.batch,
        C=dict(zip(names, size.C, strict=True)),
        gamma={"d_ci": size.d_gamma, "n_blocks": 2, "n_heads": 4},
        **RECIPES[recipe],
    )
    tapped = TappedModel(new_decomposition(model, config), model)
    tapped.__enter__()  # for as long as the benchmark runs
    trainer = Trainer(tapped, config, (size.batch, size.context))
    tokens = some_tokens(size)
    return lambda: trainer.step(tokens)


def some_tokens(size: Size) -> torch.Tensor:
    """A random batch."""
    return torch.randint(0, size.vocabulary, (size.batch, size.context), generator=torch.Generator().manual_seed(0))


def gemm_rate(rounds: int = 5) -> float:
    """This machine's FLOP a second on large float32 products."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 4096)
    seconds = seconds_in_turn({"product": lambda: [a @ b for _ in range(5)]}, rounds=rounds)["product"]
    return 5 * 2 * 1024 * 1024 * 4096 / statistics.median(seconds)


def measure(size: Size, rounds: int, recipe: str = "paper") -> dict[str, float]:
    """Seconds, ratio and share of the floor."""
    ours, plain = own_step(size, recipe), plain_step(size)
    rate = gemm_rate()
    seconds = seconds_in_turn({"ours": ours, "plain": plain}, rounds=rounds)
    with FlopCounterMode(display=False) as counter:
        ours()
    own = statistics.median(seconds["ours"])
    return {
        "ours_s": round(own, 4),
        "plain_s": round(statistics.median(seconds["plain"]), 4),
        "ratio": round(ratio(seconds, "plain", "ours"), 3),
        "executed_gflop": round(counter.get_total_flops() / 1e9, 1),
        "floor_s": round(size.needed * 1e9 / rate, 4),
        "floor_share": round(size.needed * 1e9 / rate / own, 3),
        "gemm_gflops": round(rate / 1e9, 1),
    }


def peak(size: str, which: str) -> float:
    """Peak memory in MB above what imports take, of three steps in a fresh process."""
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", "--peak", size, which], check=True, capture_output=True, text=True
    )
    return round(float(found.stdout.split()[-1]), 1)


def print_peak(size: str, which: str) -> None:
    """The measurement of ``peak``, in that process."""
    from tl_vpd.training import Trainer  # noqa: F401 (imports are not part of it)

    before = _high_water()
    step = plain_step(SIZES[size]) if which == "plain" else own_step(SIZES[size], which)
    for _ in range(3):
        step()
    print((_high_water() - before) / 1024)


def _high_water() -> int:
    """The largest resident memory of this process so far, in kB (``ru_maxrss`` would count the parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--sizes", default="S,M")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--peak", nargs=2, metavar=("SIZE", "WHICH"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.peak:
        print_peak(*arguments.peak)
        return
    record: dict[str, Any] = {}
    for name in arguments.sizes.split(","):
        rounds = arguments.rounds * (3 if name == "S" else 1)
        record[name] = measure(SIZES[name], rounds)
        record[name]["peak_mb"] = peak(name, "paper")
        record[name]["plain_peak_mb"] = peak(name, "plain")
        record[f"{name}_merged"] = measure(SIZES[name], rounds, "merged")
        record[f"{name}_merged"]["peak_mb"] = peak(name, "merged")
    record["settings"] = {
        "command": "python -m benchmarks.step",
        "rounds": arguments.rounds,
        "transformer_lens": version("transformer_lens"),
        **machine(),
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
