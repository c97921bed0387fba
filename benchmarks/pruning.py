"""Behaviours of the bundled model pruned to circuits, adversarially and by importances alone.

    python -m benchmarks.pruning                     # writes benchmarks/results/pruning.json

For each case the behaviour's probability in the model (``target_p``) and, for both variants, the circuit's nodes and the
probability under importances as masks, stochastic masks (mean of 64), the adversary that it was pruned against and a fresh one
(means of 8 starts; ``PrunedCircuit.probabilities`` says what each attacks). ``unpruned`` is every important node kept whole.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from tl_vpd import bundled
from tl_vpd.analysis.pruning import PruneConfig, PrunedCircuit, prune
from tl_vpd.analysis.pruning.behaviours import behaviour_of
from tl_vpd.analysis.pruning.circuit import probabilities
from tl_vpd.analysis.pruning.masked import MaskedModel

RESULT = Path(__file__).parent / "results" / "pruning.json"
ADVERSARIAL = PruneConfig(steps=2000, lr=0.04)
IMPORTANCES_ONLY = PruneConfig(variant="importances_only", steps=2000, lr=0.02)


@dataclass(frozen=True)
class Case:
    """A prompt, the token it makes likely, and λ of both variants."""

    prompt: str
    token: str
    adversarial: float
    importances_only: float


CASES = {
    "bracket": Case("foo(x)[0", "]", 0.003, 1.0),
    "repeated_name": Case("code):\n        self.code =", " code", 0.008, 1.0),
}


def figures(circuit: PrunedCircuit) -> dict[str, Any]:
    """One circuit's entry."""
    p = {f"p_{name}": round(own, 6) for name, own in circuit.probabilities.items() if name != "target"}
    return {"nodes": len(circuit), "coefficient": circuit.coefficient, **p}


def unpruned(model: Any, vpd: Any, case: Case) -> dict[str, Any]:
    """The same figures with every important node of the prompt kept whole."""
    with MaskedModel(vpd, model) as masked, torch.no_grad():
        tokens = masked.adapter.tokens(case.prompt)
        logits, inputs = masked.clean(tokens)
        alive = masked.weights.pre_sigmoid(inputs, None)[0] > 0
        behaviour = behaviour_of(masked.adapter, logits[0], case.token, -1)
        found = probabilities(masked, tokens, alive.to(logits), alive, behaviour, ADVERSARIAL)
    return {"nodes": int(alive.sum()), **{f"p_{name}": round(own, 6) for name, own in found.items()}}


def main() -> None:
    """Runs all cases, or those named."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), help="which cases (others keep their figures)")
    parser.add_argument("--output", type=Path, default=RESULT)
    chosen = parser.parse_args()
    model, vpd = bundled.model(), bundled.decomposition()
    found: dict[str, Any] = json.loads(chosen.output.read_text()) if chosen.output.is_file() else {}
    for name in chosen.cases:
        case, start = CASES[name], time.perf_counter()
        adversarial = prune(vpd, model, case.prompt, case.token, coefficient=case.adversarial, config=ADVERSARIAL)
        importances_only = prune(
            vpd, model, case.prompt, case.token, coefficient=case.importances_only, config=IMPORTANCES_ONLY
        )
        found[name] = {
            "prompt": case.prompt,
            "token": case.token,
            "tokens": len(adversarial.words),
            "important_nodes": adversarial.alive,
            "target_p": round(adversarial.probabilities["target"], 6),
            "adversarial": figures(adversarial),
            "importances_only": figures(importances_only),
            "unpruned": unpruned(model, vpd, case),
            "seconds": round(time.perf_counter() - start, 1),
        }
        found["settings"] = {
            "command": "python -m benchmarks.pruning",
            "adversarial": asdict(ADVERSARIAL),
            "importances_only": asdict(IMPORTANCES_ONLY),
            "transformer_lens": version("transformer_lens"),
            **machine(),
        }
        chosen.output.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(name, json.dumps(found[name], ensure_ascii=False))


if __name__ == "__main__":
    main()
