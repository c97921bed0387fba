"""The tiny model, its decomposition and results of it, which the table's calls get."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import tl_vpd
from tests.campaigns.calls import kinds
from tests.campaigns.calls.kinds import Kind
from tests.campaigns.calls.values import make_paths
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import analysis, evaluation
from tl_vpd.analysis import attention

Q, K, OUT, IN = (f"blocks.0.{s}" for s in ("attn.W_Q", "attn.W_K", "attn.W_O", "mlp.W_in"))


@dataclass(frozen=True)
class Call:
    """A public call with right arguments.

    Attributes:
        name: as in the report: the room and the name.
        run: makes the call.
        arguments: by name, each a right value and its kind.
    """

    name: str
    run: Callable[..., Any]
    arguments: dict[str, tuple[Any, Kind]]


def call(run: Callable[..., Any], label: str = "", /, **arguments: tuple[Any, Kind]) -> Call:
    """A public call by its arguments.

    Args:
        run: makes the call.
        label: its name in the report (empty: the room and name of the function or method).
        **arguments: each a right value and its kind.
    """
    room = run.__module__.removeprefix("tl_vpd.").replace("analysis.attention", "attention")
    return Call(label or f"{room.split('.')[0]}: {run.__qualname__}", run, arguments)


class World:
    """Everything that calls need, made once; ``World`` is made anew when a call has left something behind."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="wrong_calls_", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name).resolve()
        os.chdir(self.folder)
        self.paths = make_paths(self.folder)
        self.model = tiny_model()
        self.vpd = decomposition_of(self.model).to(torch.float64)
        self.tokens = some_tokens()
        self.prompt = some_tokens(shape=(1, 5))
        self.counts = dict(self.vpd.counts)
        self.generator = torch.Generator().manual_seed(0).get_state()

    def close(self) -> None:
        """Removes its folder."""
        os.chdir("/")
        self._folder.cleanup()

    @cached_property
    def saved(self) -> Path:
        """A saved decomposition."""
        return self.vpd.save(self.folder / "saved")

    @cached_property
    def importances(self) -> tl_vpd.CausalImportances:
        """Of the two prompts."""
        return self.vpd.causal_importances(self.model, self.tokens)

    @cached_property
    def graph(self) -> analysis.AttributionGraph:
        """Of one prompt."""
        return tl_vpd.attribution_graph(self.vpd, self.model, self.prompt, 3)

    @cached_property
    def saved_graph(self) -> Path:
        """A saved graph."""
        return self.graph.save(self.folder / "saved_graph")

    @cached_property
    def harvest(self) -> analysis.Harvest:
        """Of the two prompts."""
        return tl_vpd.harvest(self.vpd, self.model, self.tokens, config=analysis.HarvestConfig(windows=2, radius=2))

    @cached_property
    def audit(self) -> analysis.CircuitAudit:
        """Of a circuit of one subcomponent."""
        config = analysis.AuditConfig(ablations=("zero", "adversarial"), budgets=(2,), restarts=1, controls=0)
        return analysis.audit_circuit(self.vpd, self.model, self.prompt, [f"{Q}:1"], metric, config=config)

    @cached_property
    def circuit(self) -> analysis.PrunedCircuit:
        """Pruned in two steps."""
        config = analysis.PruneConfig(steps=2, adversary_steps=1)
        return tl_vpd.prune(self.vpd, self.model, self.prompt, 3, config=config)

    @cached_property
    def evaluation(self) -> tl_vpd.Evaluation:
        """As cheap as there is one."""
        return tl_vpd.evaluate(self.vpd, self.model, self.tokens, self.cheap)

    @cached_property
    def cheap(self) -> tl_vpd.EvaluationConfig:
        """An evaluation of milliseconds."""
        return tl_vpd.EvaluationConfig(measures=(), budgets=(1,), controls=False, control_budgets=())

    @cached_property
    def saved_evaluation(self) -> Path:
        """A saved report."""
        self.evaluation.save(self.folder / "metrics.json")
        return self.folder / "metrics.json"

    @cached_property
    def terms(self) -> attention.ScoreTerms:
        """Of a layer with a pair."""
        return attention.score_terms(self.vpd, self.model, self.tokens, 0, [(f"{Q}:1", f"{K}:2")])

    @contextlib.contextmanager
    def sample(self) -> Any:
        """Of the two rows."""
        with evaluation.sampled(self.vpd, self.model, self.tokens) as sample:
            yield sample

    def attached(self, call: Callable[[Any], Any]) -> Any:
        """A call while the decomposition is attached."""
        with self.vpd.attach(self.model) as attached, torch.no_grad():
            return call(attached)

    def hooked(self, hooks: Callable[[], Any]) -> Any:
        """The logits under hooks that are made while the decomposition is attached."""
        return self.attached(lambda _: self.model.run_with_hooks(self.tokens, fwd_hooks=hooks()))

    # -- arguments that many calls have --------------------------------------------------------------------------------

    @property
    def target(self) -> dict[str, tuple[Any, Kind]]:
        """The decomposition and its model."""
        return {"decomposition": (self.vpd, kinds.only(self.vpd)), "model": (self.model, kinds.only(self.model))}

    @property
    def of_prompts(self) -> dict[str, tuple[Any, Kind]]:
        """The decomposition, its model, prompts and their attention mask."""
        return {
            **self.target,
            "prompts": (self.tokens, kinds.tokens()),
            "attention_mask": (None, kinds.attention_mask(*self.tokens.shape)),
        }

    @property
    def of_prompt(self) -> dict[str, tuple[Any, Kind]]:
        """The decomposition, its model and one prompt."""
        return {**self.target, "prompt": (self.prompt, kinds.tokens(one_row=True))}

    @property
    def several(self) -> Kind:
        """Several addresses, or None."""
        return kinds.subcomponents(self.counts, none=True)

    @property
    def sites(self) -> Kind:
        """Site patterns."""
        return kinds.patterns(list(self.counts))


def metric(logits: torch.Tensor) -> torch.Tensor:
    """A difference of two logits at the end."""
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()
