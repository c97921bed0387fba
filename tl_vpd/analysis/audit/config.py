"""How a circuit is audited and repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tl_vpd.site import nearest

Reference = str
"""What ablated nodes are replaced by: one of ``REFERENCES``."""
REFERENCES: tuple[Reference, ...] = ("zero", "mean", "resample")
ABLATIONS = (*REFERENCES, "stochastic", "adversarial")


@dataclass(frozen=True)
class AttackConfig:
    """The adversary of an audit or a repair.

    Attributes:
        lower_is_better: whether the circuit is to keep the metric low.
        reference: the value of a node at source 0: ``zero``, ``mean`` or ``resample``.
        step_size: of the adversary's steps (None: ``2 / steps``).
        restarts: starts of every attack: plain ablation first, the others random. The worst setting on the way counts.
        per_position: whether sources differ between positions, which makes the adversary far stronger.
        among: patterns of names to audit; all others run as in the model (None: everything is audited).
        seed: of all random draws.

    Raises:
        ValueError: a value is out of range.
    """

    lower_is_better: bool = False
    reference: Reference = "zero"
    step_size: float | None = None
    restarts: int = 2
    per_position: bool = False
    among: str | Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            near = nearest(self.reference, REFERENCES)
            raise ValueError(f"reference={self.reference!r}{near}: choose zero, mean or resample.")
        if self.restarts < 1:
            raise ValueError(f"restarts={self.restarts}: give at least 1.")

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
        ablations: of ``zero mean resample stochastic adversarial``.
        budgets: the adversary's numbers of steps.
        draws: random settings that the stochastic figure is the mean of.
        controls: random circuits of the same kinds (0: none).
    """

    ablations: Sequence[str] = ABLATIONS
    budgets: Sequence[int] = (20,)
    draws: int = 8
    controls: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.ablations:
            if name not in ABLATIONS:
                raise ValueError(
                    f"{name!r} is not an ablation{nearest(name, ABLATIONS)}: choose from {', '.join(ABLATIONS)}."
                )
        if self.draws < 1 or self.controls < 0 or not self.budgets or any(steps < 1 for steps in self.budgets):
            raise ValueError(
                f"budgets={list(self.budgets)}, draws={self.draws}, controls={self.controls}: give at least one budget, each "
                "budget and draws at least 1, and controls at least 0."
            )

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
        if self.steps < 1 or self.candidates < 1 or self.max_added < 0 or self.target > 1:
            raise ValueError(
                f"steps={self.steps}, candidates={self.candidates}, max_added={self.max_added}, target={self.target}: counts "
                "must be at least 1 (max_added 0) and the target at most 1, the whole model."
            )
