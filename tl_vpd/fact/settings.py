"""What is decomposed: two parallel facts that the model knows well, and where.

SmolLM2-135M completes "The capital of Germany is" with " Berlin" at 0.91, "The capital of Greece is" with " Athens" at 0.81, and
says the same in other words. One of its 30 blocks is decomposed: with what the weights do at the country's token taken out of one
block's attention, both answers fall below 0.05 at block 23, and at no other block above the second. So the answer passes from the
country to the end of the prompt there; the other blocks are left as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tl_vpd.training import TargetedConfig

SITES = ("blocks.23.*",)
"""The decomposed block."""
STEPS = 220
"""Of the run that ships."""


@dataclass(frozen=True)
class Facts:
    """Two facts of one form.

    Attributes:
        template: a prompt, with ``{}`` for the subject; the target has it for both subjects.
        subjects: of the facts.
        answers: one token each.
        paraphrases: other prompts, which are not trained on.
        others: tokens among which an answer is ranked.
    """

    template: str
    subjects: tuple[str, str]
    answers: tuple[str, str]
    paraphrases: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def prompts(self) -> list[str]:
        """The target."""
        return [self.template.format(subject) for subject in self.subjects]


FACTS = Facts(
    template="The capital of {} is",
    subjects=("Germany", "Greece"),
    answers=(" Berlin", " Athens"),
    paraphrases=(
        "The capital city of {} is",
        "What is the capital of {}? The capital of {} is",
        "The capital of {} is the city of",
        "In {}, the capital is",
        "The largest city in {} is",
        "Q: What is the capital of {}?\nA: The capital is",
    ),
    others=(
        *(
            " Berlin",
            " Athens",
            " Paris",
            " Rome",
            " Madrid",
            " London",
            " Tokyo",
            " Beijing",
            " Moscow",
            " Cairo",
            " Vienna",
        ),
        *(
            " Dublin",
            " Lisbon",
            " Warsaw",
            " Delhi",
            " Ottawa",
            " Stockholm",
            " Oslo",
            " Havana",
            " Tehran",
            " Baghdad",
        ),
        *(" Nairobi", " Lima", " Budapest", " Brussels", " Helsinki", " Copenhagen", " Seoul"),
    ),
)


def config(*, steps: int = STEPS, seed: int = 0, naive: bool = False) -> TargetedConfig:
    """The settings of a run.

    Args:
        steps: of the run.
        seed: of the run.
        naive: with the target stream alone, from random directions.
    """
    alone = {"nontarget": 0.0, "nontarget_importance": 0.0} if naive else {}
    # From random directions, a run of so few steps reconstructs nothing at the smaller rate.
    lr = 3e-3 if naive else 2e-4
    fields: dict[str, Any] = {
        "steps": steps,
        "seed": seed,
        "batch_size": 2,
        "nontarget_batch_size": 3,
        "sites": SITES,
        "C": 8,
        "init": "normal" if naive else "target",
        "gamma": {"kind": "global_mlp", "hidden": 32, "output_bias": 1.0},
        "coefficients": {"importance": 3e-3, **alone},
        "adversary": {"start": 0.0, "inner_steps": 1, "lr": 0.01},
        "optimizer": {"lr": lr, "gamma_lr": 1e-3, "clip": None},
        "decay": 0.0 if naive else 0.1,
    }
    return TargetedConfig(**fields)
