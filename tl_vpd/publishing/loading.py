"""The lines that load a decomposition and its target."""

from __future__ import annotations

from typing import Any

from tl_vpd.importance.decomposed import DecomposedWeights
from tl_vpd.publishing.text import block, plain

BRIDGE = "TransformerBridge"


def loading_section(weights: DecomposedWeights, base_model: str | None, repository: str | None) -> str:
    """How to load it from a repository (None: from a folder), with each of TransformerLens's classes."""
    site = next(iter(weights.sites.values()))
    where = "load('path/to/this/folder')" if repository is None else f"from_hub({repository!a})"
    use = [
        f"vpd = tl_vpd.Decomposition.{where}",
        "with vpd.attach(model):",
        "    logits, cache = model.run_with_cache(tokens)",
        *(f"    cache[{site.hook_name(what)!a}]  # [batch, pos, C]" for what in ("component_acts", "ci")),
    ]
    lines = ["## Load it", "", "`pip install tl_vpd`, then:"]
    for title, imports, load in _targets(weights.record, base_model):
        lines += [
            "",
            *([title, ""] if title else []),
            block("\n".join(["import tl_vpd", *imports, "", *load, *use]), "py"),
        ]
    return "\n".join([*lines, "", _what_is_checked(weights.record)])


def _targets(record: dict[str, Any], base_model: str | None) -> list[tuple[str, list[str], list[str]]]:
    """A heading, the imports and the lines that load the target, by class."""
    source, target = _dict(record, "source"), _dict(record, "target")
    if source.get("format") == "param_decomp":
        load = f"model, _ = tl_vpd.formats.load_param_decomp({str(source.get('run', 'RUN'))!a}"
        return [
            ("With `HookedTransformer` (TransformerLens 2 and 3):", [], [f"{load})"]),
            (f"With `{BRIDGE}` (TransformerLens 3 and 4):", [], [f"{load}, model_class={BRIDGE!r})"]),
        ]
    name = base_model or str(target.get("name") or "custom")
    if target.get("class") not in ("HookedTransformer", BRIDGE) or name == "custom":
        return [("", [], ["model = ...  # the target, with the weights that were decomposed"])]
    processing = _dict(target, "processing")
    folded, centred = bool(processing.get("fold_ln")), bool(processing.get("center_writing_weights"))
    if processing and not folded and not centred:
        hooked = f"model = HookedTransformer.from_pretrained_no_processing({name!a})"
    else:
        options = f", fold_ln={folded}, center_writing_weights={centred}" if processing else ""
        hooked = f"model = HookedTransformer.from_pretrained({name!a}{options})"
    bridge = [f"model = {BRIDGE}.boot_transformers({name!a})"]
    if folded:
        bridge.append("model.enable_compatibility_mode()")
    classes = [
        (
            "With `HookedTransformer` (TransformerLens 2 and 3):",
            ["from transformer_lens import HookedTransformer"],
            [hooked],
        ),
        (
            f"With `{BRIDGE}` (TransformerLens 3 and 4):",
            [f"from transformer_lens.model_bridge import {BRIDGE}"],
            bridge,
        ),
    ]
    return classes[::-1] if target["class"] == BRIDGE else classes


def _what_is_checked(record: dict[str, Any]) -> str:
    target = _dict(record, "target")
    made = f" It was made on a {plain(target['class'])}" if target.get("class") else ""
    flags = ", ".join(f"{plain(k)}={plain(v)}" for k, v in _dict(target, "processing").items())
    made += f" with {flags}." if made and flags else "." if made else ""
    return f"`attach` compares the model's weights with fingerprints, and refuses a model with other weights.{made}"


def _dict(record: Any, name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}
