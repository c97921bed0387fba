"""Behaviours of the bundled model pruned to circuits, adversarially and by importances alone.

    python -m benchmarks.pruning                     # writes benchmarks/results/pruning.json

For each case the behaviour's probability in the model (``target_p``) and, for both variants, the circuit's nodes and the
probability under importances as masks, stochastic masks (mean of 64), the adversary that it was pruned against and a fresh
one (means of 8 starts; ``PrunedCircuit.probabilities`` says what each attacks). ``unpruned`` is every important node with its
mask at 1.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks import harness
from tl_vpd import bundled
from tl_vpd.analysis.pruning import PruneConfig, PrunedCircuit, prune
from tl_vpd.analysis.pruning.behaviours import behaviour_of
from tl_vpd.analysis.pruning.circuit import probabilities
from tl_vpd.analysis.pruning.gradients import PromptLoss
from tl_vpd.forward import MaskedModel

ADVERSARIAL = PruneConfig(lr=0.04)
IMPORTANCES_ONLY = PruneConfig(variant="importances_only", lr=0.02)


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
    p = {f"p_{name}": round(value, 6) for name, value in circuit.probabilities.items() if name != "target"}
    return {"nodes": len(circuit), "coefficient": circuit.coefficient, **p}


def unpruned(model: Any, vpd: Any, case: Case) -> dict[str, Any]:
    """The same figures with the mask of every important node of the prompt at 1."""
    with MaskedModel(vpd, model, fused_attention=True) as masked_model, torch.no_grad():
        tokens = masked_model.adapter.tokens(case.prompt)
        logits, inputs = masked_model.clean(tokens)
        alive = vpd.pre_sigmoid(inputs)[0] > 0
        loss = PromptLoss(masked_model, tokens, behaviour_of(masked_model.adapter, logits[0], case.token, -1))
        p = probabilities(loss, alive.to(logits), alive, ADVERSARIAL)
    return {"nodes": int(alive.sum()), **{f"p_{name}": round(value, 6) for name, value in p.items()}}


def measure(model: Any, vpd: Any, case: Case, steps: int) -> dict[str, Any]:
    """Both circuits of a case."""
    start = time.perf_counter()
    adversarial, importances_only = (
        prune(vpd, model, case.prompt, case.token, coefficient=coefficient, config=replace(config, steps=steps))
        for coefficient, config in ((case.adversarial, ADVERSARIAL), (case.importances_only, IMPORTANCES_ONLY))
    )
    return {
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


def main() -> None:
    """Runs all cases, or those named, and writes the record after each."""
    warnings.simplefilter("ignore")
    parser = harness.parser("pruning", __doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), help="which cases (others keep their figures)")
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    model, vpd, record = bundled.model(), bundled.decomposition(), harness.read(arguments.out)
    settings = {
        name: asdict(replace(config, steps=arguments.steps))
        for name, config in (("adversarial", ADVERSARIAL), ("importances_only", IMPORTANCES_ONLY))
    }
    for name in arguments.cases:
        record[name] = measure(model, vpd, CASES[name], arguments.steps)
        harness.write(arguments.out, record, "pruning", **settings)
        print(name, json.dumps(record[name], ensure_ascii=False))


if __name__ == "__main__":
    main()
