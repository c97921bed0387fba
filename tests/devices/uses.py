"""What users do with a decomposition, on any device: results by name, as tensors."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import tl_vpd
from tests.tiny import GAMMA
from tl_vpd import analysis, evaluation

Q, OUT = "blocks.0.attn.W_Q", "blocks.1.mlp.W_out"
CONFIG = tl_vpd.VPDConfig(steps=2, batch_size=4, C=6, gamma=GAMMA)
SMALL = evaluation.EvaluationConfig(
    measures=("adversaries", "union_test", "mask_transfer", "hidden", "sparsity_sweep"),
    budgets=(2,),
    adversary_budgets=(2,),
    controls=False,
)
Use = Callable[[Any, Any, Tensor], Any]


def attached(use: Callable[[Any, Any, Tensor, Any], Any]) -> Use:
    """A use of an attached model."""

    def inside(model: Any, vpd: Any, tokens: Tensor) -> Any:
        with vpd.attach(model) as on_model:
            return use(model, vpd, tokens, on_model)

    return inside


def mode(name: str, **options: Any) -> Use:
    """The second forward pass of a mode."""

    def forward(model: Any, vpd: Any, tokens: Tensor, on_model: Any) -> Any:
        with on_model.masked(name, **options):
            model(tokens)
            return again(model, tokens)

    return attached(forward)


def again(model: Any, tokens: Tensor) -> Any:
    """A forward pass after the first."""
    return model(tokens)


def generated(model: Any, vpd: Any, tokens: Tensor, on_model: Any) -> list[Tensor]:
    """Greedy tokens under masks, and their logits.

    As ``generate`` makes them, which asserts in TransformerLens that its residual stream is of no subclass of ``torch.Tensor``:
    the accelerator's tensors are of one, those of a GPU are not.
    """
    logits = []
    with on_model.masked("rounded"):
        for _ in range(3):
            logits.append(model(tokens)[:, -1])
            tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return [tokens, *logits]


def gradients(model: Any, vpd: Any, tokens: Tensor, on_model: Any) -> list[Tensor]:
    """Of a loss under masks in V, U and Γ."""
    with on_model.masked("ci"):
        model(tokens, return_type="loss").backward()
    return [p.grad for p in vpd.parameters() if p.grad is not None]


def inside(name: str) -> Use:
    """A forward pass inside ``ablated`` or ``keep_only``."""

    def forward(model: Any, vpd: Any, tokens: Tensor, on_model: Any) -> Tensor:
        with getattr(on_model, name)([f"{Q}:1", f"{OUT}:0"]):
            return model(tokens)

    return attached(forward)


def graph(model: Any, vpd: Any, tokens: Tensor) -> Tensor:
    """The edges of a graph as a matrix: there may be more or fewer whose weights are rounding."""
    edges = analysis.attribution_graph(vpd, model, tokens[:1], 3)
    n = len(edges.kind)
    matrix = torch.zeros(n, n, device=edges.weight.device)
    matrix[edges.target.long(), edges.source.long()] = edges.weight.float()
    return matrix


def saved(model: Any, vpd: Any, tokens: Tensor) -> list[Tensor]:
    """What a file gives back on the device."""
    with tempfile.TemporaryDirectory() as folder:
        vpd.save(folder)
        return list(tl_vpd.Decomposition.load(folder, device=str(tokens.device)).parameters())


def decomposed(model: Any, vpd: Any, tokens: Tensor) -> list[Tensor]:
    """A short run on tokens on the CPU."""
    rows = tokens.repeat(4, 1).cpu()
    return list(tl_vpd.decompose(model, rows, CONFIG, progress=False).decomposition.parameters())


MODES: dict[str, Use] = {
    "unmasked": mode("unmasked"),
    "rounded": mode("rounded", threshold=0.2),
    "ci": mode("ci"),
    "zero": mode("zero"),
    "stochastic": mode("stochastic", seed=0),
    "drawn Δ": mode("rounded", delta="drawn", seed=0),
    "adversarial": mode("adversarial", seed=0, steps=3),
}
USES: dict[str, Use] = {
    **MODES,
    "importances": lambda m, v, t: dict(v.causal_importances(m, t)),
    "component acts": lambda m, v, t: dict(v.component_acts(m, t)),
    "attached and idle": attached(lambda m, v, t, _: m(t)),
    "a cache": attached(lambda m, v, t, _: [m.run_with_cache(t)[1][f"blocks.1.hook_out_{w}"] for w in ("ci", "mask")]),
    "gradients": attached(gradients),
    "generation": attached(generated),
    "ablated": inside("ablated"),
    "keep_only": inside("keep_only"),
    "mask_hooks": attached(
        lambda m, v, t, _: m.run_with_hooks(
            t, fwd_hooks=v.mask_hooks(v.causal_importances(m, t).masks("stochastic", seed=0))
        )
    ),
    "a graph": graph,
    "a dataset's graph": lambda m, v, t: analysis.dataset_graph(v, m, t, [f"{Q}:1", f"{OUT}:2"]),
    "pruning": lambda m, v, t: analysis.prune(v, m, t[:1], 3, config=analysis.PruneConfig(steps=2)),
    "harvest": lambda m, v, t: analysis.harvest(v, m, t),
    "effects": lambda m, v, t: analysis.ablation_table(v, m, t, lambda logits: logits[0, -1, 3], [f"{Q}:1"]),
    "evaluation": lambda m, v, t: evaluation.evaluate(v, m, t, SMALL).record,
    "compact": lambda m, v, t: list(v.compact(m, t).parameters()),
    "a file": saved,
    "decompose": decomposed,
}


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor and number of a result."""
    if isinstance(value, Tensor):
        yield path, value.detach()
    elif isinstance(value, float):
        yield path, torch.tensor(value, dtype=torch.float64)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from numbers(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from numbers(item, f"{path}[{key}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from numbers(item, f"{path}[{i}]")
    elif hasattr(value, "to_dict"):  # a table
        yield from numbers(value.to_dict("list"), path)


def close(value: Tensor | None, expected: Tensor) -> bool:
    """Whether a value is the expected one to rounding."""
    if value is None or value.shape != expected.shape:
        return False
    return torch.allclose(value.cpu().double(), expected.double(), rtol=1e-3, atol=1e-4, equal_nan=True)
