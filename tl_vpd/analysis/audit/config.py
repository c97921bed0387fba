"""How a circuit is audited and repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tl_vpd.checks import check_fields, choice, number, sequence, text_of

Reference = str
"""What ablated nodes are replaced by: one of ``REFERENCES``."""
REFERENCES: tuple[Reference, ...] = ("zero", "mean", "resample", "corrupted")
ABLATIONS = (*REFERENCES, "stochastic", "adversarial")


@dataclass(frozen=True)
class AttackConfig:
    """The adversary of an audit or a repair.

    Attributes:
        lower_is_better: whether the circuit is to keep the metric low.
        reference: the value of a node at source 0: ``zero``, ``mean``, ``resample`` (a reference prompt that is drawn) or
            ``corrupted`` (the reference prompt of the same row).
        step_size: of the adversary's steps (None: ``2 / steps``).
        restarts: starts of every attack: plain ablation first, the others random. The worst setting on the way counts.
        per_position: whether sources differ between positions, which makes the adversary far stronger.
        among: patterns of names to audit; all others run as in the model (None: everything is audited).
        seed: of all random draws.

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of range or unknown.
    """

    lower_is_better: bool = False
    reference: Reference = "zero"
    step_size: float | None = None
    restarts: int = 2
    per_position: bool = False
    among: str | Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choice("reference", self.reference, REFERENCES)
        check_fields(self, restarts=1)
        if self.step_size is not None:
            number("step_size", self.step_size, above=0)
        if self.among is not None and not isinstance(self.among, str):
            patterns = [text_of(f"among[{i}]", p) for i, p in enumerate(sequence("among", self.among))]
            if not patterns:
                raise ValueError("among=(): give at least one pattern, or None for everything.")
            object.__setattr__(self, "among", tuple(patterns))

    @property
    def sign(self) -> float:
        """What makes a larger metric the better one."""
        return -1.0 if self.lower_is_better else 1.0

    @property
    def references(self) -> tuple[Reference, ...]:
        """The references that are needed, in the order in which their values are taken."""
        return (self.reference,)


@dataclass(frozen=True)
class AuditConfig(AttackConfig):
    """How a circuit is audited.

    Attributes:
        ablations: of ``zero mean resample corrupted stochastic adversarial`` (by default all but ``corrupted``).
        budgets: the adversary's numbers of steps.
        draws: random settings that the stochastic figure is the mean of.
        controls: random circuits of the same kinds (0: none).
    """

    ablations: Sequence[str] = tuple(name for name in ABLATIONS if name != "corrupted")
    budgets: Sequence[int] = (20,)
    draws: int = 8
    controls: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, budgets=1, draws=1, controls=0)
        for i, name in enumerate(self.ablations):
            choice(f"ablations[{i}]", name, ABLATIONS)
        for name in ("ablations", "budgets"):
            if not getattr(self, name):
                raise ValueError(f"{name}=(): give at least one.")

    @property
    def references(self) -> tuple[Reference, ...]:
        """The references that are needed, in the order in which their values are taken."""
        plain = [reference for reference in REFERENCES if reference in self.ablations]
        return tuple(dict.fromkeys([*plain, self.reference]))

    def reference_of(self, ablation: str) -> Reference:
        """What ablated nodes are replaced by: the ablation's name if it is a reference, else ``reference``."""
        return ablation if ablation in REFERENCES else self.reference


@dataclass(frozen=True)
class RepairConfig(AttackConfig):
    """How a circuit is repaired.

    Attributes:
        target: the ``recovered`` to reach under the adversary.
        steps: of the adversary.
        max_added: rounds at most.
        candidates: nodes measured in each round.
    """

    target: float = 0.9
    steps: int = 20
    max_added: int = 20
    candidates: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, target=(None, 1), steps=1, max_added=0, candidates=1)
