"""The toys by name, and each method's settings on each of them.

Targets and SPD's settings as in SPD (arXiv 2506.20790), with smaller batches, for CPUs. VPD's add the persistent adversary and,
on the toys of superposition, the frequency loss; APD's are for those toys only.
"""

from __future__ import annotations

from typing import Any

from tl_vpd.baselines import METHODS, APDConfig, spd_config
from tl_vpd.checks import integer, seed_of, shown
from tl_vpd.importance import GammaConfig
from tl_vpd.site import nearest
from tl_vpd.toys.compressed import Compressed
from tl_vpd.toys.grammar import Grammar
from tl_vpd.toys.induction import Induction
from tl_vpd.toys.tms import TMS
from tl_vpd.toys.toy import TargetTraining, Toy
from tl_vpd.training import AdversaryConfig, Coefficients, FaithfulnessConfig, OptimizerConfig, VPDConfig

LARGE = TargetTraining(steps=10_000, rows=128, lr=5e-3)
DEEP = TargetTraining(steps=10_000, rows=32, lr=3e-3, schedule="cosine")

TOYS: dict[str, Toy] = {
    "tms_5_2": TMS(5, 2),
    "tms_5_2_id": TMS(5, 2, identity=True),
    "tms_40_10": TMS(40, 10, training=LARGE),
    "tms_40_10_id": TMS(40, 10, identity=True, training=LARGE),
    "compressed": Compressed(),
    "compressed_2": Compressed(neurons=25, n_layers=2),
    "compressed_3": Compressed(n_features=102, neurons=17, n_layers=3, training=DEEP),
    "induction": Induction(),
    "grammar": Grammar(),
}

_TIED = (("embed", "unembed"),)
"""W and Wᵀ of the toys of superposition are one matrix, and SPD's authors give both the same subcomponents."""
_SPD: dict[str, dict[str, Any]] = {
    "tms_5_2": {"C": 20, "importance": 3e-3, "tied": _TIED},
    "tms_5_2_id": {"C": 20, "importance": 3e-3, "tied": _TIED},
    "tms_40_10": {"C": 200, "importance": 1e-4, "p": 2.0, "tied": _TIED},
    "tms_40_10_id": {"C": 200, "importance": 1e-4, "p": 2.0, "tied": _TIED},
    "compressed": {"C": 100, "importance": 1e-5, "p": 2.0, "steps": 30_000, "lr": 2e-3, "lr_final": 1.0},
    "compressed_2": {"C": 400, "importance": 1e-5, "p": 2.0, "steps": 50_000, "lr_final": 1.0},
    "compressed_3": {"C": 500, "importance": 5e-6, "p": 2.0, "steps": 200_000, "hidden": 128, "lr_final": 1.0},
}
"""By toy: SPD's C, importance coefficient and exponent, and where they differ, steps, learning rate and hidden units."""

_COMPRESSED: dict[str, Any] = {
    "lr": 2e-3,
    "steps": 12_000,
    "importance": 1e-5,
    "p_end": 0.5,
    "C": {"*.W_in": 200, "*.W_out": 100},
    "hidden": 16,
}
"""No frequency loss: pieces of W_out are on at many inputs."""
_VPD: dict[str, dict[str, Any]] = {
    "tms_5_2": {"steps": 15_000, "importance": 3e-3, "frequency": 2e-3, "p_end": 0.5, "rising": True, "tied": ()},
    "tms_5_2_id": {"steps": 15_000, "importance": 3e-3, "frequency": 2e-3, "p_end": 0.5, "rising": True},
    "tms_40_10": {"steps": 15_000, "importance": 1.25e-4, "frequency": 2.5e-4, "p": 1.0, "rising": True, "tied": ()},
    "tms_40_10_id": {"steps": 10_000, "importance": 4e-5, "frequency": 8e-5, "p": 1.0, "p_end": 0.5, "rising": True},
    "compressed": _COMPRESSED,
    "compressed_2": _COMPRESSED,
    "compressed_3": {**_COMPRESSED, "importance": 3e-5},
}
"""By toy: where VPD's settings differ from SPD's."""
_SPARSE_VPD: dict[str, Any] = {
    "batch_size": 8,
    "lr": 3e-3,
    "lr_final": 0.0,
    "init_scale": 0.3,
    "frequency_reference": 32.0,
}
"""VPD's settings on every toy of sparse features. With the reference count near the inverse frequency of a feature, a
subcomponent that serves two features costs half as much again as two that serve one each."""

_APD: dict[str, dict[str, Any]] = {
    "tms_5_2": {"tied": _TIED},
    "tms_5_2_id": {"tied": _TIED},
    "tms_40_10": {"tied": _TIED, "C": 200, "top_k": 2.0, "steps": 3_000, "batch_size": 8, "lr": 0.01},
    "tms_40_10_id": {"tied": _TIED, "C": 200, "top_k": 2.0, "steps": 3_000, "batch_size": 8, "lr": 0.01},
}


def recipe(toy: str, method: str, *, seed: int = 0, steps: int | None = None) -> VPDConfig | APDConfig:
    """A method's settings on a toy.

    Args:
        toy: its name.
        method: its name.
        seed: of the decomposition.
        steps: instead of the recipe's; schedules are stretched (None: the recipe's).

    Raises:
        KeyError: there is no such toy or method.
        ValueError: the method has no recipe for the toy, or a number is out of its range.
        TypeError: a number is of another type.
    """
    if not isinstance(toy, str) or toy not in TOYS:
        raise KeyError(f"There is no toy {shown(toy)}{nearest(toy, TOYS)}: choose from {', '.join(TOYS)}.")
    if not isinstance(method, str) or method not in METHODS:
        raise KeyError(
            f"There is no method {shown(method)}{nearest(method, METHODS)}: choose from {', '.join(METHODS)}."
        )
    seed, steps = seed_of(seed), None if steps is None else integer("steps", steps, minimum=1)
    config: Any = {"vpd": _vpd, "spd": _spd, "apd": _apd}[method](toy)
    return config.model_copy(update={"seed": seed, **({} if steps is None else {"steps": steps})})


def _spd(toy: str) -> VPDConfig:
    return _sparse(_SPD[toy], adversarial=0.0) if toy in _SPD else _spd_of_language(_vpd(toy))


def _apd(toy: str) -> APDConfig:
    if toy not in _APD:
        raise ValueError(f"APD has no recipe for {toy}: choose from {', '.join(_APD)}, or another method.")
    return APDConfig(**_APD[toy])


def _vpd(toy: str) -> VPDConfig:
    if toy in _SPD:
        sparse = _sparse({**_SPD[toy], **_SPARSE_VPD, **_VPD.get(toy, {})}, adversarial=1.0)
        return VPDConfig(**sparse.model_dump(exclude={"forward_slope"}))
    return VPDConfig(
        steps=8_000,
        batch_size=32,
        C=64,
        gamma=GammaConfig(d_ci=64, n_blocks=2, n_heads=4, causal=False, output_bias=1.0),
        init="channels",
        coefficients=Coefficients(
            delta=1e5,
            importance=2e-3,
            frequency=1e-3,
            schedule={"importance": ((0, 0), (0.3, 1)), "frequency": ((0, 0), (0.3, 1))},
        ),
        optimizer=OptimizerConfig(lr=1e-3),
        faithfulness=FaithfulnessConfig(warm_up_steps=0),
    )


def _spd_of_language(vpd: VPDConfig) -> VPDConfig:
    """SPD's losses and Γ with VPD's other settings on a transformer: C, steps, learning rate, start, and minimality."""
    c = vpd.coefficients
    shared = vpd.model_dump(include={"steps", "batch_size", "C", "init", "minimality"})
    return spd_config(
        **shared,
        optimizer={"lr": vpd.optimizer.lr},
        output="kl",
        gamma=GammaConfig(kind="per_subcomponent_mlps", hidden=16, output_bias=vpd.gamma.output_bias),
        coefficients=Coefficients(
            delta=c.delta,
            stochastic=1.0,
            layerwise=1.0,
            adversarial=0.0,
            importance=c.importance,
            frequency=0.0,
            schedule=c.schedule,
        ),
        adversary=AdversaryConfig(inner_steps=0),
    )


def _sparse(settings: dict[str, Any], *, adversarial: float) -> VPDConfig:
    """A recipe for a toy of sparse features."""
    fields = {"batch_size": 16, **settings}
    hidden, rising = fields.pop("hidden", 16), fields.pop("rising", False)
    p, p_end = fields.pop("p", 1.0), fields.pop("p_end", None)
    importance, frequency = fields.pop("importance"), fields.pop("frequency", 0.0)
    reference = fields.pop("frequency_reference", None)
    optimizer = {name: fields.pop(name) for name in ("lr", "lr_final") if name in fields}
    return spd_config(
        **fields,
        gamma=GammaConfig(kind="per_subcomponent_mlps", hidden=hidden, rising=rising),
        minimality={"p": ((0, p), (1, p if p_end is None else p_end)), "frequency_reference": reference},
        optimizer=optimizer,
        coefficients=Coefficients(
            delta=1.0,
            stochastic=1.0,
            layerwise=1.0,
            adversarial=adversarial,
            importance=importance,
            frequency=frequency,
        ),
        adversary=AdversaryConfig(inner_steps=0),
    )
