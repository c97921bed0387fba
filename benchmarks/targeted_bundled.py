"""Targets in the bundled model: closing a bracket after four prompts, and a topic, tables of characters.

    python -m benchmarks.targeted_bundled                 # benchmarks/results/targeted.json; 12 minutes of one core
    python -m benchmarks.targeted_bundled --cases tables --work build/tables    # an interrupted run goes on

``bracket``: the probability of ``)`` in the model, under rounded masks with Δ off, and with the target's subcomponents ablated
from the full model, beside what that ablation costs on other code; targeted, and naive (the target alone, from the same start).

``tables``: the target are windows of the standard library's tables of characters (``0x1A -> CONTROL CHARACTER``), the rest are
windows with no such number. Held out are table windows that share no run of ``RUN`` tokens with the target's, and windows
of other files. On these: KL under rounded masks with Δ off (the subcomponents alone), and KL of the full model without the
subcomponents that are rare elsewhere, beside as many random others of the run, where it has so many. Rare is what is important at
least 10, 20 or 40 times as often per token on the target as on one half of the other files; KL is measured on the other half.
Importances per token are counted for each set too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from tl_vpd import Decomposition, SavingConfig, TargetedConfig, bundled, decompose_targeted
from tl_vpd.evaluation import nontarget
from tl_vpd.forward import MaskedModel
from tl_vpd.masking import Masks, constant_masks

PROMPTS = ["print(len(self.name", "return str(self.value", "if isinstance(x, int", "raise ValueError(name"]
NAIVE: dict[str, Any] = {"nontarget": 0.0, "nontarget_importance": 0.0}
NUMBER = re.compile(r"\\x|0x|\\u")
TABLE = 4
"""Windows with so many such numbers are tables; those with none are other text."""
LENGTH = 64
HELD_OUT, RUN = 105, 16
TIMES, COMMON = (10, 20, 40), 0.01
"""A subcomponent is rare elsewhere where it is important at more than ``COMMON`` of the topic's tokens, and so many times as
often there as in other text."""


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


def tables_config(*, steps: int = 1_500) -> TargetedConfig:
    """Settings of the tables."""
    return TargetedConfig(
        steps=steps,
        batch_size=4,
        C=48,
        init="target",
        gamma={"d_ci": 96, "n_blocks": 1, "output_bias": 1.0},
        coefficients={"importance": 4e-3},
        adversary={"start": 0.2, "inner_steps": 1},
        minimality={"p": ((0.1, 2.0), (1.0, 0.5))},
        optimizer={"lr": 5e-4, "gamma_lr": 1e-3, "clip": None},
    )


@torch.no_grad()
def bracket(model: Any, *, naive: bool, steps: int | None, work: Path | None) -> dict[str, Any]:
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


def windows(model: Any) -> dict[str, Tensor]:
    """Windows by kind: the ``target``, the ``nontarget`` data, held-out ``tables``, and two halves of ``other`` text."""

    def of(part: Any) -> tuple[Tensor, Tensor]:
        rows = bundled.tokens(part)
        rows = torch.cat([rows[:, :LENGTH], torch.cat([rows[:, :1], rows[:, LENGTH : 2 * LENGTH - 1]], 1)])
        numbers = torch.tensor([len(NUMBER.findall(model.tokenizer.decode(row[1:].tolist()))) for row in rows])
        return rows[numbers >= TABLE], rows[numbers == 0]

    (tables, nontarget), (_, other) = of("training"), of("validation")
    order, half = torch.randperm(len(tables), generator=torch.Generator().manual_seed(0)), len(other) // 2
    target, held_out = tables[order[HELD_OUT:]], tables[order[:HELD_OUT]]
    known = {run for row in target for run in _runs(row)}
    new = torch.tensor([known.isdisjoint(_runs(row)) for row in held_out])
    return {
        "target": target,
        "nontarget": nontarget,
        "tables": held_out[new],
        "other, to select": other[::2][:half],
        "other": other[1::2][:half],
    }


def _runs(row: Tensor) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + RUN].tolist()) for i in range(1, LENGTH - RUN + 1)}


@torch.no_grad()
def tables(model: Any, *, steps: int | None, work: Path | None) -> dict[str, Any]:
    """The figures of the tables."""
    rows, config = windows(model), tables_config(**({} if steps is None else {"steps": steps}))
    saving = None if work is None else SavingConfig(folder=work, save_every=100)
    resume = work is not None and (work / "state").is_dir()
    with torch.enable_grad():
        run = decompose_targeted(
            model, rows["target"], rows["nontarget"], config, saving=saving, resume=resume, progress=False
        )
    vpd = run.decomposition
    density = {
        kind: vpd.causal_importances(model, rows[kind]).concatenated.gt(0).float().mean((0, 1))
        for kind in ("target", "tables", "other, to select", "other")
    }
    often, elsewhere = density["target"], density["other, to select"]
    sets = dict[str, Tensor]()
    for times in TIMES:
        rare = (often > COMMON) & (often > times * elsewhere)
        others = ((often > 0) & ~rare).nonzero()[:, 0]
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))
        random = torch.zeros_like(rare).index_fill(0, others[order[: int(rare.sum())]], True)
        sets |= {f"rare elsewhere ({times})": rare, f"random others ({times})": random}
    return {
        "windows": {kind: len(of_kind) for kind, of_kind in rows.items()},
        "steps": config.steps,
        "alive": int((often > 0).sum()),
        "sets": {
            name: {"subcomponents": int(of.sum())} | {kind: float(d[of].sum()) for kind, d in density.items()}
            for name, of in sets.items()
        },
        "l0": {kind: float(d.sum()) for kind, d in density.items()},
        "kl": {kind: _kl(vpd, model, rows[kind], sets) for kind in ("tables", "other")},
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
        "--cases", nargs="+", default=["bracket", "tables"], choices=["bracket", "tables"], help="which cases"
    )
    parser.add_argument("--steps", type=int, help="instead of the settings'")
    parser.add_argument("--work", type=Path, help="a folder for the states of the tables' run")
    options, model = parser.parse_args(), bundled.model()
    torch.set_num_threads(1)
    record = harness.read(options.out)
    runs: dict[str, dict[str, Callable[..., dict[str, Any]]]] = {
        "bracket": {"targeted": partial(bracket, naive=False), "naive": partial(bracket, naive=True)},
        "tables": {"targeted": tables},
    }
    for case in options.cases:
        for kind, run in runs[case].items():
            start = time.process_time()
            figures = run(model, steps=options.steps, work=options.work)
            figures["cpu_seconds"] = round(time.process_time() - start, 1)
            record.setdefault(case, {})[kind] = figures
            record.pop("settings", None)
            harness.write(options.out, record, "targeted_bundled")


if __name__ == "__main__":
    main()
