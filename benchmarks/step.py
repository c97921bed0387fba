"""Seconds and memory of a training step, beside a plain implementation of the same step in the same run.

    python -m benchmarks.step                        # writes benchmarks/results/step.json (about half an hour on two cores)

Ours and the plain one take turns, each in a process of its own (ours keeps freed memory, as ``tl-vpd train`` does). For each
size: ``ours_s`` and ``plain_s`` (medians of rounds), ``ratio`` (plain over ours, median over rounds), ``executed_gflop`` (matrix
products that ours executes, as torch counts them, which leaves out ``addmm_``), ``floor_s`` (the mathematics' matrix products at
this machine's rate of large float32 products in the same run), ``floor_share`` (floor over ours), ``peak_mb`` and
``plain_peak_mb`` (above what imports take, in a process of their own; ``settled_mb`` without the first steps, in which compiled
passes are made). The same for the merged recipe, for bfloat16 products, for compiled passes and for these together, under their
names; ``checkpoint`` has the peak with activations computed again. ``--sizes V`` is M with the vocabulary of GPT-2, where logits
are made in blocks, beside ``whole_logits``. ``--variants compiled`` measures that and the paper's recipe
alone. Size L needs a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import Gamma, PlainTrainer, Target
from benchmarks.timing import machine, seconds_in_turn

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
    blocks: int = 2


SIZES = {
    "S": Size(64, 256, 256, 16, 32, (64, 64, 128, 128, 256, 256), 128, 512, 7.8),
    "M": Size(256, 1024, 1024, 8, 128, (256, 256, 512, 512, 1024, 1024), 256, 1024, 207.0),
    "V": Size(256, 1024, 50304, 8, 128, (256, 256, 512, 512, 1024, 1024), 256, 1024, float("nan")),
    "L": Size(768, 3072, 50304, 32, 512, (512, 512, 1024, 1024, 3072, 3584), 2048, 8192, float("nan"), 4, 12, 8),
}
MERGED: dict[str, Any] = {
    "merged": True,
    "minimality": {"kind": "smooth_l0", "frequency_reference": 1024.0},
    "faithfulness": {"kind": "relative"},
    "adversary": {"pool": 4},
    "coefficients": {"delta": 1e3},
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),
    "merged": (MERGED, {}),
    "bfloat16": ({}, {"precision": "bfloat16"}),
    "merged_bfloat16": (MERGED, {"precision": "bfloat16"}),
    "checkpoint": ({}, {"checkpoint": True}),
    "whole_logits": ({}, {"blocked_logits": False}),
    "compiled": ({}, {"compile": True}),
    "compiled_bfloat16": ({}, {"compile": True, "precision": "bfloat16"}),
    "compiled_merged": (MERGED, {"compile": True}),
    "compiled_merged_bfloat16": (MERGED, {"compile": True, "precision": "bfloat16"}),
}
"""Settings of ``VPDConfig`` and of ``ExecutionConfig``."""


def plain_step(size: Size) -> Callable[[], object]:
    """A step of the plain implementation."""
    target = Target(size.layers, size.d_model, size.d_mlp, size.heads, size.vocabulary)
    counts = dict(zip(target.W, size.C * size.layers, strict=True))
    width = sum(w.shape[0] for w in target.W.values())
    gamma = Gamma(width, sum(counts.values()), size.d_gamma, size.d_gamma_mlp, 2, 4)
    trainer = PlainTrainer(target, counts, gamma, (size.batch, size.context), 1000)
    tokens = some_tokens(size)
    return lambda: trainer.step(tokens)


SITES = ("*W_Q", "*W_K", "*W_V", "*W_O", "*W_in", "*W_out")


def own_step(size: Size, variant: str = "paper", sites: tuple[str, ...] = SITES) -> Callable[[], object]:
    """A step of ``tl_vpd``'s trainer on a HookedTransformer of the same shape."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from tl_vpd import ExecutionConfig, VPDConfig
    from tl_vpd.forward import MaskedModel
    from tl_vpd.training import Trainer, new_decomposition

    device = "cuda" if torch.cuda.is_available() else "cpu"
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
            device=device,
        )
    )
    recipe, how = VARIANTS[variant]
    config = VPDConfig(
        steps=1000,
        batch_size=size.batch,
        sites=sites,
        C={name: C for name, C in zip(SITES, size.C, strict=True) if name in sites},
        gamma={"d_ci": size.d_gamma, "d_mlp": size.d_gamma_mlp, "n_blocks": size.blocks, "n_heads": 4},
        **recipe,
    )
    masked_model = MaskedModel(new_decomposition(model, config), model, fused_attention=True)
    masked_model.__enter__()  # for as long as the benchmark runs
    trainer = Trainer(masked_model, config, (size.batch, size.context), execution=ExecutionConfig(**how))
    tokens = some_tokens(size).to(device)
    return lambda: trainer.step(tokens)


def some_tokens(size: Size) -> torch.Tensor:
    """A random batch."""
    return torch.randint(0, size.vocabulary, (size.batch, size.context), generator=torch.Generator().manual_seed(0))


def gemm_rate(rounds: int = 5) -> float:
    """This machine's FLOP a second on large float32 products."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 4096)
    seconds = seconds_in_turn({"product": lambda: [a @ b for _ in range(5)]}, rounds=rounds)["product"]
    return 5 * 2 * 1024 * 1024 * 4096 / statistics.median(seconds)


class Worker:
    """A process that carries out steps when told to."""

    def __init__(self, size: str, which: str) -> None:
        self.pipe, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=work, args=(size, which, other), daemon=True)
        self.process.start()

    def ask(self, what: str) -> float:
        """Seconds of a ``step``, or the matrix products (``flop``) of one."""
        self.pipe.send(what)
        return float(self.pipe.recv())

    def stop(self) -> None:
        """Ends the process."""
        self.pipe.send("stop")
        self.process.join()


def work(size: str, which: str, pipe: Connection) -> None:
    """What a worker's process runs."""
    warnings.simplefilter("ignore")
    step = step_of(size, which)
    while (what := pipe.recv()) != "stop":
        if what == "flop":
            with FlopCounterMode(display=False) as counter:
                step()
            pipe.send(counter.get_total_flops())
            continue
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start)


def step_of(size: str, which: str) -> Callable[[], object]:
    """The plain step, or a variant of ours."""
    if which == "plain":
        return plain_step(SIZES[size])
    from tl_vpd.training.memory import keep_freed_memory

    keep_freed_memory()
    return own_step(SIZES[size], which)


def measure(name: str, rounds: int, variants: list[str]) -> dict[str, dict[str, float]]:
    """Seconds, ratio and share of the floor of some variants of ours; each has a turn in every round."""
    plain = SIZES[name].needed == SIZES[name].needed  # the plain one runs on a CPU
    workers = {which: Worker(name, which) for which in (*variants, *(["plain"] if plain else []))}
    seconds: dict[str, list[float]] = {which: [] for which in workers}
    for worker in workers.values():  # all have started before anything is timed
        worker.ask("step")
    rates = [gemm_rate()]
    for i in range(rounds + 2):
        for which in workers if i % 2 else reversed(workers):
            taken = workers[which].ask("step")
            if i >= 2:
                seconds[which].append(taken)
    rates.append(gemm_rate())
    rate, found = max(rates), {}
    for which in variants:
        own = statistics.median(seconds[which])
        found[which] = {"ours_s": round(own, 4), "executed_gflop": round(workers[which].ask("flop") / 1e9, 1)}
        if plain:
            floor = SIZES[name].needed * 1e9 / rate
            ratios = [a / b for a, b in zip(seconds["plain"], seconds[which], strict=True)]
            found[which] |= {
                "plain_s": round(statistics.median(seconds["plain"]), 4),
                "ratio": round(statistics.median(ratios), 3),
                "floor_s": round(floor, 4),
                "floor_share": round(floor / own, 3),
                "gemm_gflops": round(rate / 1e9, 1),
            }
    for worker in workers.values():
        worker.stop()
    return found


def peak(size: str, which: str) -> tuple[float, float]:
    """Peak memory in MB above what imports take, in a fresh process: of three steps and all before them, and of a fourth."""
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", "--peak", size, which], check=True, capture_output=True, text=True
    )
    whole, settled = (round(float(number), 1) for number in found.stdout.split()[-2:])
    return whole, settled


def print_peak(size: str, which: str) -> None:
    """The measurement of ``peak``, in that process."""
    from tl_vpd.training import Trainer  # noqa: F401 (imports are not part of it)

    before = high_water()
    step = plain_step(SIZES[size]) if which == "plain" else own_step(SIZES[size], which)
    for _ in range(3):
        step()
    whole = high_water() - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark starts anew
    step()
    print(whole / 1024, (high_water() - before) / 1024)


def high_water() -> int:
    """The largest resident memory of this process so far, in kB (``ru_maxrss`` would count the parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--sizes", default="S,M")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--variants", help="only these, as paper,compiled; paper is among them (default: all)")
    parser.add_argument("--peak", nargs=2, metavar=("SIZE", "WHICH"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.peak:
        print_peak(*arguments.peak)
        return
    record: dict[str, Any] = {}
    for name in arguments.sizes.split(","):
        # V is for what a large vocabulary changes; elsewhere logits are few.
        variants = (
            ["paper", "whole_logits"] if name == "V" else [which for which in VARIANTS if which != "whole_logits"]
        )
        if arguments.variants:
            asked = {"paper", *arguments.variants.split(",")}
            if unknown := asked - set(variants):
                parser.error(f"size {name} has no {', '.join(sorted(unknown))}: choose from {', '.join(variants)}")
            variants = [which for which in variants if which in asked]
        timed = [which for which in variants if which != "checkpoint"]
        found = measure(name, arguments.rounds * (3 if name == "S" else 1), timed)
        if name != "L":
            for which in variants:
                own = found.setdefault(which, {})
                own["peak_mb"], own["settled_mb"] = peak(name, which)
        if name in ("S", "M"):
            found["paper"]["plain_peak_mb"], _ = peak(name, "plain")
        record[name] = found.pop("paper")
        for which, own in found.items():
            record.setdefault(which, {})[name] = own
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
