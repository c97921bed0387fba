"""Pruning to a behaviour: the importances that one prompt's behaviour needs, trained with V and U frozen.

Pre-sigmoid values z of the alive (position, subcomponent) pairs, those with an importance above 0, start from Γ's and are trained
by

    ½ loss(stochastic masks) + ½ loss(adversarial masks) + λ · (1/T) Σ (g_upper + ε)^p

(VPD paper, section on pruning to a behaviour); all other importances stay 0. Without the two masked terms, ``loss(importances as
masks)`` is the *importances-only* variant, which does not give a faithful circuit: it selects small sets that do better than the
model and collapse once what they leave out is not exactly 0.

    >>> circuit = prune(vpd, model, "foo(bar", ")")             # doctest: +SKIP
    >>> circuit.probabilities                                   # doctest: +SKIP
    >>> prune_sweep(vpd, model, "foo(bar", ")").to_pandas()     # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tl_vpd.analysis.pruning.behaviours import Behaviour, behaviour_of
from tl_vpd.analysis.pruning.circuit import PrunedCircuit, probabilities
from tl_vpd.analysis.pruning.config import PruneConfig
from tl_vpd.analysis.pruning.gradients import PromptLoss
from tl_vpd.analysis.pruning.importance_training import ImportanceTraining
from tl_vpd.checks import config_of, number, sequence
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel


@dataclass(frozen=True)
class PruneSweep:
    """Circuits of the same behaviour at several strengths λ of minimality, in the order of the coefficients."""

    circuits: tuple[PrunedCircuit, ...]

    def to_pandas(self) -> pd.DataFrame:
        """One row per circuit: ``coefficient, nodes, alive`` and the probabilities."""
        rows = [
            {"coefficient": c.coefficient, "nodes": len(c), "alive": c.alive, **c.probabilities} for c in self.circuits
        ]
        return pd.DataFrame(rows)


def prune(
    decomposition: Decomposition,
    model: nn.Module,
    prompt: Any,
    behaviour: Any,
    *,
    pos: int = -1,
    coefficient: float = 0.05,
    config: PruneConfig | None = None,
) -> PrunedCircuit:
    """The circuit of one prompt's behaviour.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompt: a string, or tokens ``[pos]`` or ``[1, pos]``.
        behaviour: a token, a pair of tokens, or None for the whole distribution (``pruning.behaviours`` has the table).
        pos: the position of the behaviour's logits.
        coefficient: λ.
        config: how it is pruned and run (None: the defaults).

    Raises:
        ValueError: there are several prompts, padding, a model of other weights, or nothing is alive.
        IndexError: the position or a token does not exist.
        TypeError: the behaviour or the position is something else.
        FloatingPointError: logits or importances are NaN or infinite.
    """
    return prune_sweep(decomposition, model, prompt, behaviour, [coefficient], pos=pos, config=config).circuits[0]


def prune_sweep(
    decomposition: Decomposition,
    model: nn.Module,
    prompt: Any,
    behaviour: Any,
    coefficients: Sequence[float] = (0.02, 0.05, 0.1, 0.2),
    *,
    pos: int = -1,
    config: PruneConfig | None = None,
) -> PruneSweep:
    """``prune`` at several λ (``coefficients``), all in the same passes; other arguments, and errors, as in ``prune``."""
    config = config_of(PruneConfig, config)
    coefficients = [number("coefficient λ", value, minimum=0) for value in sequence("coefficients", coefficients)]
    if not coefficients:
        raise ValueError("coefficients=[]: a sweep needs at least one.")
    with torch.inference_mode(False), MaskedModel(decomposition, model, fused_attention=True) as masked_model:
        tokens = _one_prompt(masked_model, prompt)
        logits, inputs = masked_model.clean(tokens)
        z = decomposition.pre_sigmoid(inputs)[0].detach().to(logits)
        if not bool(z.isfinite().all()):
            raise FloatingPointError(
                "Importances on this prompt are NaN or infinite: look at the decomposition's weights."
            )
        if not bool((z > 0).any()):
            raise ValueError("No subcomponent is important at any token of this prompt: there is nothing to prune.")
        loss = PromptLoss(masked_model, tokens, behaviour_of(masked_model.adapter, logits[0], behaviour, pos))
        strengths = torch.tensor(coefficients, dtype=z.dtype, device=z.device)
        importances = ImportanceTraining(loss, z, strengths, config).run()
        circuits = [
            _circuit(loss, logits, g, z, coefficient, config)
            for g, coefficient in zip(importances, coefficients, strict=True)
        ]
    return PruneSweep(tuple(circuits))


def _one_prompt(masked_model: MaskedModel, prompt: Any) -> Tensor:
    if not masked_model.adapter.return_types:
        name = type(masked_model.model).__name__
        raise ValueError(f"A {name} returns no logits of tokens: pruning is for language models.")
    tokens = masked_model.adapter.tokens(prompt)
    if tokens.ndim != 2 or len(tokens) != 1 or masked_model.adapter.padding(tokens, None) is not None:
        raise ValueError(
            f"Pruning takes one prompt without padding, and tokens of shape {tuple(tokens.shape)} came: prune the prompts one "
            "at a time, each without its padding."
        )
    return tokens


def _circuit(
    loss: PromptLoss, logits: Tensor, g: Tensor, z: Tensor, coefficient: float, config: PruneConfig
) -> PrunedCircuit:
    """The result for one λ, from the trained importances ``g``."""
    behaviour: Behaviour = loss.behaviour
    target = float(behaviour.probability(logits[:, behaviour.pos]))
    return PrunedCircuit(
        tokens=loss.tokens[0].cpu(),
        words=tuple(loss.masked_model.adapter.words(loss.tokens[0])),
        behaviour=behaviour.text,
        pos=behaviour.pos,
        importances=g,
        site_axis=loss.masked_model.weights.site_axis,
        alive=int((z > 0).sum()),
        coefficient=coefficient,
        probabilities={"target": target, **probabilities(loss, g, z > 0, config)},
        settings=vars(config).copy(),
    )
