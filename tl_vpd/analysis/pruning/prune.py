"""Pruning to a behaviour: the importances that one prompt's behaviour needs, found after training with V and U frozen.

Pre-sigmoid values z of the alive (site, position, subcomponent)s, those to which Γ gives g > 0, start from Γ's and are trained by

    ½ loss(stochastic masks) + ½ loss(adversarial masks) + λ · (1/T) Σ (g_upper + ε)^p

(VPD paper, section on pruning to a behaviour); the others' g stays 0. Without the two masked terms, ``loss(importances as
masks)`` is the *importances-only* variant, which is no faithful circuit: it finds small sets that do better than the model
and collapse once what they leave out is not exactly 0.

    >>> circuit = prune(vpd, model, "foo(bar", ")")             # doctest: +SKIP
    >>> circuit.probabilities                                   # doctest: +SKIP
    >>> prune_sweep(vpd, model, "foo(bar", ")").table()         # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_vpd.analysis.pruning.attack import Sources, attack, draw
from tl_vpd.analysis.pruning.behaviours import Behaviour, behaviour_of
from tl_vpd.analysis.pruning.circuit import PrunedCircuit, probabilities
from tl_vpd.analysis.pruning.config import PruneConfig
from tl_vpd.analysis.pruning.masked import PromptModel
from tl_vpd.analysis.pruning.recorded import Gradients, Recorded, running
from tl_vpd.decomposition import Decomposition
from tl_vpd.losses.minimality import Penalty
from tl_vpd.training.schedules import cosine, warm_up


@dataclass(frozen=True)
class PruneSweep:
    """Circuits of the same behaviour at several strengths λ of minimality, in the order given."""

    circuits: tuple[PrunedCircuit, ...]

    def table(self) -> pd.DataFrame:
        """A row a circuit: ``coefficient, nodes, alive`` and the probabilities."""
        rows = [
            {"coefficient": c.coefficient, "nodes": len(c), "alive": c.alive, **c.probabilities} for c in self.circuits
        ]
        return pd.DataFrame(rows)

    to_pandas = table


def prune(
    decomposition: Decomposition,
    model: nn.Module,
    prompt: Any,
    behaviour: Any,
    *,
    pos: int = -1,
    coefficient: float = 0.05,
    config: PruneConfig | None = None,
    recorded: bool | None = None,
    progress: bool = False,
) -> PrunedCircuit:
    """The circuit of one prompt's behaviour.

    Args:
        prompt: a string or tokens ``[pos]`` or ``[1, pos]``.
        behaviour: a token, a pair of tokens, or None for the whole distribution (``behaviours`` has the table), at ``pos``.
        coefficient: λ.
        recorded: whether passes are recorded once and then run without Python, several times faster (``recorded`` says how; None:
            from 100 steps on). progress: show a bar.

    Raises:
        ValueError: there are several prompts or padding, nothing is alive, or attention runs head by head.
        IndexError, TypeError: as in ``behaviour_of``.
    """
    found = prune_sweep(
        decomposition,
        model,
        prompt,
        behaviour,
        [coefficient],
        pos=pos,
        config=config,
        recorded=recorded,
        progress=progress,
    )
    return found.circuits[0]


def prune_sweep(
    decomposition: Decomposition,
    model: nn.Module,
    prompt: Any,
    behaviour: Any,
    coefficients: Sequence[float] = (0.02, 0.05, 0.1, 0.2),
    *,
    pos: int = -1,
    config: PruneConfig | None = None,
    recorded: bool | None = None,
    progress: bool = False,
) -> PruneSweep:
    """``prune`` at several λ, all in the same passes."""
    config = config or PruneConfig()
    if not coefficients:
        raise ValueError("A sweep needs at least one coefficient.")
    with torch.inference_mode(False), PromptModel(decomposition, model) as masked:
        if not masked.adapter.return_types:
            raise ValueError(f"A {type(model).__name__} puts out no logits of tokens: pruning is for language models.")
        tokens = masked.adapter.tokens(prompt)
        if tokens.ndim != 2 or len(tokens) != 1 or masked.adapter.padding(tokens, None) is not None:
            raise ValueError(
                f"Pruning takes one prompt without padding; tokens of shape {tuple(tokens.shape)} were given."
            )
        logits, inputs = masked.clean(tokens)
        z = masked.weights.pre_sigmoid(inputs, None)[0].detach().to(logits)
        if not bool((z > 0).any()):
            raise ValueError("No subcomponent is important at any token of this prompt: there is nothing to prune.")
        chosen = behaviour_of(masked.adapter, logits[0], behaviour, pos)
        strengths = torch.tensor([float(c) for c in coefficients], dtype=z.dtype, device=z.device)
        found = _Pruning(masked, tokens, z, chosen, strengths, config, _worth(config, recorded)).run(progress)
        target = float(chosen.probability(logits[:, chosen.pos]))
        circuits = []
        for g, coefficient in zip(found, coefficients, strict=True):
            scores = probabilities(masked, tokens, g, z > 0, chosen, config)
            circuits.append(
                PrunedCircuit(
                    tokens=tokens[0].cpu(),
                    words=tuple(masked.adapter.words(tokens[0])),
                    behaviour=chosen.text,
                    pos=chosen.pos,
                    importances=g,
                    site_axis=masked.weights.site_axis,
                    alive=int((z > 0).sum()),
                    coefficient=float(coefficient),
                    probabilities={"target": target, **scores},
                    settings=vars(config).copy(),
                )
            )
    return PruneSweep(tuple(circuits))


def _worth(config: PruneConfig, recorded: bool | None) -> bool:
    return config.steps >= 100 if recorded is None else recorded


class _Pruning:
    """Trains the importances of several circuits, one for each λ, in the rows of one batch."""

    def __init__(
        self,
        masked: PromptModel,
        tokens: Tensor,
        z: Float[Tensor, "pos C_total"],
        behaviour: Behaviour,
        strengths: Float[Tensor, " circuits"],
        config: PruneConfig,
        recorded: bool = False,
    ) -> None:
        self.config, self.sites = config, len(masked.names)
        made = Recorded if recorded else running
        self.gradients: Gradients = made(masked, tokens, behaviour)
        self.alive: Bool[Tensor, "pos C_total"] = z > 0
        self.z = z[self.alive].expand(len(strengths), -1).clone().requires_grad_()
        # λ / T a node: minimality is a mean over positions.
        self.strengths = strengths / len(z)
        self.penalty = Penalty("power", config.p)
        self.generator = torch.Generator(z.device).manual_seed(config.seed)

    def run(self, progress: bool) -> Float[Tensor, "circuits pos C_total"]:
        """The importances after all steps."""
        optimizer = torch.optim.AdamW([self.z], lr=self.config.lr, weight_decay=0.0)
        steps = self.config.steps
        for step in tqdm(range(steps), disable=not progress, desc="pruning"):
            optimizer.param_groups[0]["lr"] = (
                self.config.lr * cosine(step, steps, 0.0) * warm_up(step + 1, steps, self.config.warm_up)
            )
            self.z.grad = self.gradient()
            optimizer.step()
        return self.importances()

    @torch.no_grad()
    def importances(self) -> Float[Tensor, "circuits pos C_total"]:
        """g of every circuit; 0 where Γ's is."""
        g = self.z.new_zeros(len(self.z), *self.alive.shape)
        g[:, self.alive] = self.z.clamp(0, 1)
        return g

    @torch.no_grad()
    def gradient(self) -> Float[Tensor, "circuits alive"]:
        """The gradient of the whole loss in z."""
        g = self.importances()
        of_g = self._of_behaviour(g)[:, self.alive]
        rows = [
            self.penalty.pullback(z[None], strength.expand(len(z)), of_g=own[None].clone())
            for z, strength, own in zip(self.z.detach(), self.strengths, of_g, strict=True)
        ]
        return torch.cat(rows)

    def _of_behaviour(self, g: Float[Tensor, "circuits pos C_total"]) -> Float[Tensor, "circuits pos C_total"]:
        """The gradient of the behaviour's losses in g."""
        if self.config.variant == "importances_only":
            zero = g.new_zeros(*g.shape[:2], self.sites)
            return self.gradients(g, zero)[0]
        drawn = draw(g, self.sites, self.generator)
        attacked = self._adversary(g)
        both = torch.cat([g, g])
        r, delta = (torch.cat(pair) for pair in zip(drawn, attacked, strict=True))
        of_mask, _ = self.gradients(torch.lerp(r, torch.ones_like(r), both), delta)
        stochastic, adversarial = (of_mask * (1 - r)).chunk(2)
        return (stochastic + adversarial) / 2

    def _adversary(self, g: Float[Tensor, "circuits pos C_total"]) -> Sources:
        return attack(
            self.gradients,
            g,
            draw(g, self.sites, self.generator),
            steps=self.config.adversary_steps,
            step_size=self.config.adversary_step_size,
            reach=self.config.reach,
            alive=self.alive,
        )
