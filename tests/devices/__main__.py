"""``python -m tests.devices [NAME ...]``: all that runs on the accelerator, or these recipes and uses, as JSON."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch

from tests.devices import steps, uses
from tests.devices.accelerator import NAME, Seen, watched
from tests.tiny import decomposition_of, some_tokens, tiny_model


def accelerator_itself() -> Mapping[str, Any]:
    """What is noted of operations that wait, one of each kind, and of two devices in one operation."""
    x, refused = torch.arange(3.0, device=NAME), ""
    with watched() as seen:
        float(x.sum())
        x.nonzero()
        x[x > 1]
        x[torch.tensor([0, 1])]
        x.cpu()
        torch.tensor(1.0, device=NAME)
        torch.ones(3).to(NAME)
        x[x > 1] = 0.0  # fills, and waits for nothing
        torch.ones(3).to(NAME, non_blocking=True)
        try:
            x + torch.ones(3)
        except RuntimeError as error:
            refused = str(error)
    return {"waits": dict(seen.waits), "on_cpu": dict(seen.on_cpu), "refused": refused}


def asked_for(name: str) -> bool:
    """Whether a recipe or use is run."""
    return len(sys.argv) == 1 or name in sys.argv


def of_steps() -> Mapping[str, Any]:
    """By recipe, with and without padding: the waits of a step, tensors on the CPU, and how far it is from a CPU's step."""
    results = {}
    for name in filter(asked_for, steps.RECIPES):
        for padded in (False, True):
            if padded and name in ("micro-batches", "Muon", "a layer's activations again"):
                continue  # nothing of these depends on padding
            metrics, left, seen = steps.steps(name, NAME, padded=padded, watch=watched)
            expected, true, _ = steps.steps(name, "cpu", padded=padded)
            errors = [abs(metrics[key] - value) / max(abs(value), 1.0) for key, value in expected.items()]
            errors += [float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(left, true, strict=True)]
            results[name + (", padded" if padded else "")] = {
                "waits": dict(seen.waits),
                "on_cpu": dict(seen.on_cpu),
                "error": max(errors),
            }
    return results


def of_uses() -> Mapping[str, Any]:
    """By use: what is not as on a CPU, how many numbers there are, and what a mode's forward pass waited for."""
    model, tokens = tiny_model(torch.float32), some_tokens()
    vpd = decomposition_of(model).float()
    there = copy.deepcopy(model).to(torch.device(NAME)), copy.deepcopy(vpd).to(NAME), tokens.to(NAME)
    results = {}
    for name, use in uses.USES.items():
        if not asked_for(name):
            continue
        both, noted = [], Seen()

        def watched_pass(model: Any, tokens: Any, noted: Seen = noted) -> Any:
            with watched() as seen:
                output = model(tokens)
            noted.waits, noted.on_cpu = seen.waits, seen.on_cpu
            return output

        for arguments in ((model, vpd, tokens), there):
            torch.manual_seed(0)
            with patch.object(uses, "again", watched_pass):
                both.append(dict(uses.numbers(use(*arguments))))
            for module in arguments[:2]:
                module.zero_grad()
        results[name] = {
            "numbers": len(both[0]),
            "wrong": [key for key, value in both[0].items() if not uses.close(both[1].get(key), value)],
            "waits": dict(noted.waits),
            "on_cpu": dict(noted.on_cpu),
        }
    return results


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    record = {"accelerator": accelerator_itself(), "steps": of_steps(), "uses": of_uses()}
    sys.stdout.write("\n" + json.dumps(record) + "\n")
