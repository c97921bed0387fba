"""Targets in the bundled model: closing a bracket after four prompts, and prose against code.

    python -m benchmarks.targeted_bundled                 # into benchmarks/results/targeted.json; some minutes of one core

``bracket``: the probability of ``)`` in the model, under rounded masks with Δ off, and with the target's subcomponents ablated
from the full model, beside what that ablation costs on other code; targeted, and naive (the target alone, from the same start).

``prose``: the target are windows of the standard library that are English (docstrings, comments, licences), the rest are windows
dense with code. On windows of other files: KL under rounded masks with Δ off (the subcomponents alone), and KL of the full
model without the subcomponents that are important on prose and rare in code, beside as many random others.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from tl_vpd import Decomposition, TargetedConfig, bundled, decompose_targeted
from tl_vpd.evaluation import nontarget
from tl_vpd.forward import MaskedModel
from tl_vpd.masking import Masks, constant_masks

PROMPTS = ["print(len(self.name", "return str(self.value", "if isinstance(x, int", "raise ValueError(name"]
NAIVE: dict[str, Any] = {"nontarget": 0.0, "nontarget_importance": 0.0}
SYMBOLS = re.compile(r"[()=_:\[\]\"'{}]")
PROSE, CODE = 0.03, 0.08
"""Windows with fewer such characters than the first are prose, with more than the second code."""
LENGTH = 64
RARE, COMMON = 0.01, 0.05
"""A subcomponent is rare in code below the first part of tokens, and common in prose above the second."""


def bracket_config(*, steps: int = 600, naive: bool = False) -> TargetedConfig:
    """Settings of the bracket."""
    return TargetedConfig(
        steps=steps,
        batch_size=8,
        nontarget_batch_size=4,
        C=24,
        gamma={"kind": "global_mlp", "hidden": 128, "output_bias": 1.0},
        coefficients={"importance": 3e-2, **(NAIVE if naive else {})},
        adversary={"start": 0.5, "inner_steps": 1},
        optimizer={"lr": 2e-3, "clip": None},
        decay=0.0 if naive else 0.1,
    )


def prose_config(*, steps: int = 500) -> TargetedConfig:
    """Settings of prose against code."""
    return TargetedConfig(
        steps=steps,
        batch_size=4,
        C=64,
        gamma={"kind": "global_mlp", "hidden": 128, "output_bias": 1.0},
        coefficients={"importance": 1.5e-2},
        adversary={"start": 0.2, "inner_steps": 1},
        minimality={"p": ((0.1, 2.0), (1.0, 0.5))},
        optimizer={"lr": 2e-3, "clip": None},
    )


@torch.no_grad()
def bracket(model: Any, *, naive: bool, steps: int | None) -> dict[str, Any]:
    """The figures of the bracket."""
    rows, other = bundled.tokens("training")[:, :32], {"code": bundled.tokens("validation")[:16]}
    config = bracket_config(naive=naive, **({} if steps is None else {"steps": steps}))
    with torch.enable_grad():
        vpd = decompose_targeted(model, PROMPTS, rows, config, progress=False).decomposition
    small, answer = vpd.compact(model, PROMPTS), model.to_single_token(")")
    p: dict[str, list[float]] = {}
    with small.attach(model) as attached:
        modes = {"model": None, "rounded": ("rounded", {}), "ablated": ("zero", {"delta": 1.0})}
        for name, mode in modes.items():
            for prompt in PROMPTS:
                if mode is None:
                    logits = model(prompt)
                else:
                    with attached.masked(mode[0], **mode[1]):
                        logits = model(prompt)
                p.setdefault(name, []).append(float(logits[0, -1].softmax(-1)[answer]))
    elsewhere = nontarget(small, model, other)
    l0 = [float(small.causal_importances(model, prompt).l0.float().mean()) for prompt in PROMPTS]
    return {
        "prompts": PROMPTS,
        "p": p,
        "l0": sum(l0) / len(l0),
        "subcomponents": small.site_axis.total,
        "elsewhere": elsewhere.reset_index().to_dict("records"),
    }


def windows(model: Any, part: Any) -> dict[str, Tensor]:
    """Windows of prose and of code."""
    rows = bundled.tokens(part)[:, :LENGTH]
    texts = [model.tokenizer.decode(row[1:].tolist()) for row in rows]
    symbols = torch.tensor([len(SYMBOLS.findall(text)) / max(len(text), 1) for text in texts])
    return {"prose": rows[symbols < PROSE], "code": rows[symbols > CODE]}


@torch.no_grad()
def prose(model: Any, *, steps: int | None) -> dict[str, Any]:
    """The figures of prose against code."""
    training, other = windows(model, "training"), windows(model, "validation")
    config = prose_config(**({} if steps is None else {"steps": steps}))
    with torch.enable_grad():
        run = decompose_targeted(model, training["prose"], training["code"], config, progress=False)
    vpd = run.decomposition
    density = {
        kind: vpd.causal_importances(model, rows).concatenated.gt(0).float().mean((0, 1))
        for kind, rows in training.items()
    }
    special = (density["prose"] > COMMON) & (density["code"] < RARE)
    alive = density["prose"] > 0
    others = (alive & ~special).nonzero()[:, 0]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))
    random = torch.zeros_like(special).index_fill(0, others[order[: int(special.sum())]], True)
    kl = {kind: _kl(vpd, model, rows, {"special": special, "random": random}) for kind, rows in other.items()}
    return {
        "windows": {
            "training": {k: len(rows) for k, rows in training.items()},
            "other": {k: len(v) for k, v in other.items()},
        },
        "alive": int(alive.sum()),
        "special": int(special.sum()),
        "l0": {kind: float(d.sum()) for kind, d in density.items()},
        "kl": kl,
    }


def _kl(vpd: Decomposition, model: Any, rows: Tensor, sets: dict[str, Tensor]) -> dict[str, float]:
    """Mean KL in nats per token: of important subcomponents alone, of none and Δ off, and of the full model without each set."""
    axis, sums = vpd.site_axis, dict[str, float]()
    with MaskedModel(vpd, model) as masked_model:
        for tokens in rows.split(16):
            output, inputs = masked_model.clean(tokens)
            log_p, g = output.log_softmax(-1), vpd.importances(inputs)
            masks: dict[str, Masks] = {
                "alone": constant_masks((g > 0).to(g.dtype), 0.0, axis),
                "nothing": constant_masks(torch.zeros_like(g), 0.0, axis),
                "all ablated": constant_masks(torch.zeros_like(g), 1.0, axis),
                **{f"without {name}": constant_masks(torch.ones_like(g) * ~s, 1.0, axis) for name, s in sets.items()},
            }
            for name, m in masks.items():
                kl = (log_p.exp() * (log_p - masked_model.masked(tokens, m).log_softmax(-1))).sum(-1)
                sums[name] = sums.get(name, 0.0) + float(kl.double().sum())
    return {name: value / rows.numel() for name, value in sums.items()}


def main() -> None:
    """The command."""
    parser = harness.parser("targeted", __doc__)
    parser.add_argument(
        "--cases", nargs="+", default=["bracket", "prose"], choices=["bracket", "prose"], help="which cases"
    )
    parser.add_argument("--steps", type=int, help="instead of the settings'")
    options, model = parser.parse_args(), bundled.model()
    torch.set_num_threads(1)
    record = harness.read(options.out)
    runs: dict[str, dict[str, Callable[..., dict[str, Any]]]] = {
        "bracket": {"targeted": partial(bracket, naive=False), "naive": partial(bracket, naive=True)},
        "prose": {"targeted": prose},
    }
    for case in options.cases:
        for kind, run in runs[case].items():
            start = time.process_time()
            figures = run(model, steps=options.steps)
            figures["cpu_seconds"] = round(time.process_time() - start, 1)
            record.setdefault(case, {})[kind] = figures
            record.pop("settings", None)
            harness.write(options.out, record, "targeted_bundled")


if __name__ == "__main__":
    main()
