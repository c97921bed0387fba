"""Calls of ``tl_vpd.baselines``' transcoders and comparison, of their formats and their page."""

from __future__ import annotations

from typing import Any

import torch

from tests.campaigns.calls.kinds import (
    SEED,
    boolean,
    choice,
    either,
    equal,
    file_to_write,
    folder_to_write,
    how_many,
    integer,
    number,
    only,
    optional,
    path_to_read,
    sequence,
    text,
    tokens,
)
from tests.campaigns.calls.world import Call, World
from tl_vpd import baselines, formats, viz

SIZES = {"W_enc": (8, 4), "b_enc": (4,), "W_dec": (1, 4, 8), "b_dec": (8,), "threshold": (4,), "W_skip": (8, 8)}


def calls(w: World) -> list[Call]:
    """The table."""
    tensors = {name: torch.full(shape, 0.5).double() for name, shape in SIZES.items()}
    one, plain = baselines.Transcoder(**tensors), {n: t for n, t in tensors.items() if n != "W_skip"}
    per_layer = baselines.Transcoders({layer: baselines.Transcoder(**plain) for layer in (0, 1)})
    folder = per_layer.save(w.folder / "transcoders")
    config = baselines.ComparisonConfig(budgets=(1,))
    training = baselines.TranscoderConfig(n_latents=4, k=1, steps=1, batch_size=2)
    artefacts, cost = {"a": per_layer, "b": w.vpd}, {"a": baselines.TrainingCost(flops=1.0)}
    made = baselines.compare(w.model, w.tokens, artefacts, config)
    model = {"model": (w.model, only(w.model))}
    k, by_layer = number(0, 3.99, above=0), {1: one}
    of = {"transcoders": (per_layer, only(per_layer))}
    return [
        Call(
            "baselines: train_transcoders",
            lambda **o: dict(baselines.train_transcoders(**o).named_parameters()),
            {
                **model,
                "tokens": (w.tokens, either(tokens(rows=2))),
                "config": (training, lambda v: True if v is training else (None if v is None else False)),
                "progress": (False, boolean),
            },
        ),
        Call(
            "baselines: calibrate",
            lambda **o: dict(baselines.calibrate(**o).named_parameters()),
            {
                **of,
                **model,
                "tokens": w.of_prompts["prompts"],
                "k": (1.5, k),
                "batch_size": (2, integer(1)),
            },
        ),
        Call(
            "baselines: transcoder_consistency",
            baselines.transcoder_consistency,
            {
                "one": (per_layer, only(per_layer)),
                "other": (per_layer, only(per_layer)),
                "alive": (None, equal(None)),
                "seed": (3, SEED),
            },
        ),
        Call(
            "baselines: Transcoder",
            lambda **o: dict(baselines.Transcoder(**o).named_parameters()),
            {name: (t, optional(only(t)) if name == "W_skip" else only(t)) for name, t in tensors.items()},
        ),
        Call(
            "baselines: Transcoders",
            lambda **o: baselines.Transcoders(**o).layers,
            {
                "by_layer": (by_layer, only(by_layer)),
                "cross_layer": (False, boolean),
                "reads": ("mlp_in", choice("mlp_in", "mlp_out")),
                "record": (None, _mapping),
            },
        ),
        Call("baselines: Transcoders.save", per_layer.save, {"folder": (w.folder / "new", folder_to_write)}),
        Call(
            "baselines: Transcoders.load",
            lambda **o: baselines.Transcoders.load(**o).layers,
            {"folder": (folder, path_to_read(folder))},
        ),
        Call(
            "baselines: ReplacedModel",
            lambda **o: list(baselines.ReplacedModel(**o).mlps),
            {**model, "layers": ([1], optional(either(sequence(integer(0, 1)))))},
        ),
        Call(
            "baselines: compare",
            lambda **o: baselines.compare(**o).to_pandas(),
            {
                **model,
                "tokens": w.of_prompts["prompts"],
                "artefacts": (artefacts, only(artefacts)),
                "config": (config, optional(only(config))),
                "costs": (cost, _by_name),
                "methods": ({"a": "plt"}, _by_name),
            },
        ),
        Call(
            "baselines: ComparisonConfig",
            lambda **o: baselines.ComparisonConfig(**o) and None,
            {
                "thresholds": ([0.5], either(sequence(number(0, 1)))),
                "budgets": ([1], lambda v: None if equal([], ())(v) else sequence(integer(1))(v)),
                "attack_rows": (1, optional(integer(1))),
                "batch_size": (2, integer(1)),
                "seed": (3, SEED),
            },
        ),
        Call(
            "baselines: TrainingCost",
            lambda **o: baselines.TrainingCost(**o) and None,
            {"flops": (1.0, number(0)), "seconds": (1.0, optional(number(0)))},
        ),
        Call("baselines: Comparison.save", made.save, {"path": (w.folder / "new.json", file_to_write)}),
        Call(
            "baselines: Comparison.load",
            lambda path: baselines.Comparison.load(path).target_ce,
            {"path": (p := made.save(w.folder / "comparison.json"), path_to_read(p))},
        ),
        Call(
            "baselines: Comparison.top",
            made.top,
            {"k": (1, how_many), "by": ("kl", choice(*made.to_pandas().select_dtypes("number").columns))},
        ),
        Call(
            "formats: save_saelens",
            formats.save_saelens,
            {**of, "folder": (w.folder / "saelens", folder_to_write)},
        ),
        Call(
            "formats: save_circuit_tracer_transcoders",
            formats.save_circuit_tracer_transcoders,
            {
                **of,
                "folder": (w.folder / "ct", folder_to_write),
                "model_name": ("m", text),
                "scan": (None, optional(text)),
            },
        ),
        Call(
            "viz: comparison_page",
            viz.comparison_page,
            {"comparison": (made, only(made)), "path": (w.folder / "page.html", file_to_write), "title": ("t", text)},
        ),
        Call("viz: comparison_panels", viz.comparison_panels, {"comparison": (made, only(made))}),
    ]


def _mapping(value: Any) -> bool | None:
    return True if value is None else (None if isinstance(value, dict) else False)


def _by_name(value: Any) -> bool | None:
    if value is None:
        return True
    return None if isinstance(value, dict) and (not value or "a" in value) else False
