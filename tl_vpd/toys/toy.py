"""What every toy is: a config that builds a model, makes its data, trains it, and states what is true of it.

    >>> toy = TOYS["tms_5_2"]                         # doctest: +SKIP
    >>> model = train(toy, seed=0)                    # doctest: +SKIP
    >>> toy.truth(model).sites["embed"].count         # doctest: +SKIP
    5

A toy is a frozen dataclass: its fields are the config. The model is a ``HookedRootModule`` or a ``HookedTransformer``.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from tqdm.auto import trange

from tl_vpd.checks import check_fields, choice, flag, instance, integer, number, seed_of
from tl_vpd.evaluation.truth import Truth
from tl_vpd.training.data import Batches
from tl_vpd.training.schedules import cosine

_LARGEST = 1 << 24
"""Of a toy's sizes and steps."""


@dataclass(frozen=True)
class TargetTraining:
    """How a toy's model is trained: AdamW with a learning rate that is constant, or falls to 0 on a cosine."""

    steps: int
    rows: int
    """Rows in a batch."""
    lr: float
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self, steps=(1, _LARGEST), rows=1, weight_decay=0)
        number("lr", self.lr, above=0)
        choice("schedule", self.schedule, ("constant", "cosine"))


class SeededBatches:
    """Batches of a step that follow from a seed alone. Subclasses are frozen dataclasses with a field ``seed``."""

    rows: ClassVar[str]
    """What they are rows of."""
    seed: int

    def generator(self, name: str, step: int) -> torch.Generator:
        """The random numbers of a step."""
        return torch.Generator().manual_seed(zlib.crc32(f"{name}/{self.seed}/{step}".encode()))

    def describe(self) -> dict[str, Any]:
        """What distinguishes these data from others."""
        return {"rows": self.rows, **asdict(self)}  # type: ignore[call-overload]

    def close(self) -> None:
        """Nothing runs in the background."""


class Toy(ABC):
    """A model with known truth. Subclasses are frozen dataclasses."""

    output: ClassVar[Literal["kl", "mse"]]
    """How its outputs are compared."""
    training: TargetTraining

    def check(self, **ranges: Any) -> None:
        """Checks a subclass's fields, as ``check_fields`` does, and that ``training`` is a ``TargetTraining``."""
        sizes = {name: (least, _LARGEST) for name, least in ranges.items() if isinstance(least, int)}
        check_fields(self, **{**ranges, **sizes})
        instance("training", self.training, TargetTraining)

    @abstractmethod
    def build(self, seed: int = 0) -> Any:
        """An untrained model."""

    @abstractmethod
    def batches(self, rows: int, seed: int = 0) -> Batches:
        """Its data, unlimited, in batches of ``rows``; ``seed`` is the data's."""

    @abstractmethod
    def loss(self, model: Any, batch: Shaped[Tensor, "batch pos ..."]) -> Float[Tensor, ""]:
        """The loss the model is trained on."""

    @abstractmethod
    def truth(self, model: Any) -> Truth:
        """What a decomposition of the trained model must recover."""

    @abstractmethod
    def quality(self, model: Any) -> dict[str, float]:
        """How well the model does what it was trained for."""

    def finish(self, model: Any) -> None:
        """Called when training is over."""
        model.eval()


@torch.inference_mode(False)
@torch.enable_grad()
def train(toy: Toy, seed: int = 0, *, steps: int | None = None, progress: bool = False) -> Any:
    """Builds and trains a toy's model; same seed, same weights.

    Args:
        toy: the toy.
        seed: of the model and its data.
        steps: of training (None: those of the toy's config).
        progress: show a bar.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the seed is too large, or the steps are negative or beyond 2²⁴.
    """
    seed, progress = seed_of(seed), flag("progress", progress)
    if not isinstance(toy, Toy):
        raise TypeError(f"The toy is a {type(toy).__name__}: give one of tl_vpd.toys, such as TMS(5, 2).")
    model, training = toy.build(seed), toy.training
    steps = training.steps if steps is None else integer("steps", steps, minimum=0, maximum=_LARGEST)
    batches = toy.batches(training.rows, seed=seed + 1_000_003)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.lr, weight_decay=training.weight_decay, fused=True)
    for step in trange(steps, disable=not progress, desc="training the target", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = training.lr * (cosine(step, steps, 0.0) if training.schedule == "cosine" else 1.0)
        optimizer.zero_grad(set_to_none=True)
        toy.loss(model, batches.at(step)).backward()
        optimizer.step()
    with torch.no_grad():
        toy.finish(model)
    return model
