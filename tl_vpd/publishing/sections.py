"""The sections of a card that come from the record: what it is, Γ, claims, licences, how to remake it, versions."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from tl_vpd.importance.config import TRANSFORMERS, GammaConfig
from tl_vpd.importance.decomposed import DecomposedWeights
from tl_vpd.publishing.config import CardConfig, Report
from tl_vpd.publishing.text import block, figure, plain, table

NOT_STATED = "not stated"


def title_section(weights: DecomposedWeights, base_model: str | None, report: Report | None) -> str:
    """What it is of, where it comes from, and its sites; with a report, how many subcomponents are alive."""
    target = weights.record.get("target")
    known = target.get("name") if isinstance(target, dict) else None
    name = plain(base_model or (str(known).rsplit("/", 1)[-1] if known and known != "custom" else "a model"))
    alive = report.record.get("alive_by_site", {}) if report is not None else {}
    headers = ["site", "d_in", "d_out", "C", *(["alive"] if alive else [])]
    rows = [
        [site.name, site.d_in, site.d_out, weights.counts[site.name], *([alive.get(site.name)] if alive else [])]
        for site in weights.sites.values()
    ]
    certificate = weights.record.get("certificate")
    counted = report.record if report is not None else certificate if isinstance(certificate, dict) else {}
    how_many = f", {figure(counted['alive'])} of them alive on the text that was measured" if "alive" in counted else ""
    return "\n".join(
        [
            f"# Parameter decomposition of {name}",
            "",
            f"{len(weights.sites)} weight matrices of {name} as {weights.site_axis.total:,} rank-one subcomponents"
            f"{how_many}: per matrix, W = V U + Δ, with a causal importance in [0, 1] for every subcomponent at every token. "
            "The method is adVersarial Parameter Decomposition (VPD); the library is `tl_vpd`, for TransformerLens.",
            "",
            _origin(weights.record),
            "",
            table(headers, rows),
        ]
    )


def _origin(record: dict[str, Any]) -> str:
    kind = origin(record)
    text = "Its record does not say how it was made."
    if kind == "imported":
        source = record["source"]
        names = ("format", "run", "checkpoint", "step", "target")
        said = ", ".join(f"{name} {figure(source[name])}" for name in names if source.get(name) is not None)
        text = f"It was imported, not trained with this library: {said}."
    elif kind == "targeted":
        rows = {name: data.get("rows") for name, data in record["targeted"].items() if isinstance(data, dict)}
        text = (
            f"It was trained with this library for chosen prompts only ({figure(rows.get('target'))} target rows, "
            f"{figure(rows.get('nontarget'))} others): what they do not use is in Δ."
        )
    elif kind == "trained":
        text = "It was trained with this library."
    return " ".join([text, *_dropped(record)])


def _dropped(record: dict[str, Any]) -> list[str]:
    """A sentence for each time that subcomponents were dropped."""
    entries = record.get("compact")
    return [
        f"{sum(entry['before'].values()) - sum(entry['after'].values()):,} subcomponents were dropped afterwards, whose "
        f"importance was nowhere above {figure(entry['threshold'])} on {figure(entry['tokens'])} tokens."
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and {"before", "after", "threshold", "tokens"} <= entry.keys()
    ]


def origin(record: dict[str, Any]) -> str:
    """``imported``, ``targeted``, ``trained``, or empty where the record does not say."""
    if isinstance(record.get("source"), dict):
        return "imported"
    if isinstance(record.get("targeted"), dict):
        return "targeted"
    return "trained" if record.get("training") else ""


def gamma_section(gamma: GammaConfig) -> str:
    """What Γ reads, and what follows."""
    if gamma.reads_the_future:
        text = (
            "Γ is **bidirectional**: it reads the whole window, so importances at a token may depend on the tokens that follow, "
            "the one to be predicted included. Masked cross-entropies can come out too low, even below the target's; judge by "
            "the KL. Modes that need importances refuse a KV cache (`use_past_kv_cache=False` generates without)."
        )
    elif gamma.kind in TRANSFORMERS:
        text = (
            "Γ is **causal**: importances at a token depend on it and the tokens before it. Masks carry nothing of later tokens "
            "into the forward pass, and the masked model generates with a KV cache."
        )
    else:
        text = (
            "Γ reads **each token alone**: importances depend on earlier tokens only as far as the target's activations there "
            "do. The masked model generates with a KV cache."
        )
    return f"## The importance function\n\n{text} Its kind is {plain(gamma.kind)}."


def claims_section(record: dict[str, Any], report: Report | None) -> str:
    """What may be claimed, and what may not."""
    if report is None:
        may = "Nothing was measured for this card, so nothing may be claimed from it; evaluate first (`tl-vpd eval`)."
    else:
        budgets = [int(steps) for steps in report.record["pgd_kl"]]
        attack = f"attacks of up to {max(budgets)} steps" if budgets else "random masks (it was not attacked)"
        where = "the chosen prompts" if origin(record) == "targeted" else "text like that of the evaluation"
        may = (
            f"A subcomponent was important, or was not, for the model's output on {where}, under masks as strong as {attack}. "
            "Stronger attacks and other text may say otherwise."
        )
    return "\n".join(
        [
            "## What may be claimed",
            "",
            f"* **May:** {may}",
            "* **May not:** that a subcomponent *is* the mechanism of a behaviour.",
            "* **May not:** that the model has as many mechanisms as there are alive subcomponents: the number depends on C, on "
            "the threshold and on the coefficients of the training.",
            "* **May not:** that the important subcomponents by themselves are a faithful circuit; that is another measurement.",
            "* **May not:** that an attribution graph of it is the algorithm that the model runs.",
        ]
    )


def licence_section(config: CardConfig) -> str:
    """Of the decomposition, the target and the text."""
    rows = [
        ["this decomposition", "", config.licence or NOT_STATED],
        ["the target", config.base_model or "", config.target_licence or NOT_STATED],
        ["the text it was trained on", ", ".join(config.datasets), config.text_licence or NOT_STATED],
    ]
    hint = (
        "V and U add up to the target's weights: see the target's licence before you use or pass on this decomposition."
    )
    return f"## Licences\n\n{table(['of', 'name', 'licence'], rows)}\n\n{hint}"


def remake_section(record: dict[str, Any]) -> str:
    """How to make it again."""
    kind = origin(record)
    if kind == "imported":
        run = shlex.quote(" ".join(str(record["source"].get("run", "RUN")).split()))
        text = f"From the files of the run:\n\n{block(f'tl-vpd import {run} --out DIR', 'sh')}"
        if settings := record["source"].get("settings"):
            text += f"\n\nThe run's settings, in the names of its code:\n\n{_yaml(settings)}"
    elif record.get("training"):
        section = "targeted" if kind == "targeted" else "vpd"
        beside = (
            "`model:`, `data:` and, in this part, the target's `prompts:`"
            if kind == "targeted"
            else "`model:` and `data:`"
        )
        text = (
            f"`tl-vpd train` reads these settings as a part of a recipe, beside {beside}, which are not stored. They are as the "
            f"version that made it stored them.\n\n{_yaml({section: record['training']})}"
        )
    else:
        text = "Its record has no settings."
    return f"## How to remake it\n\n{text}"


def versions_section(record: dict[str, Any]) -> str:
    """Of the libraries that made it."""
    versions = record.get("versions")
    if not isinstance(versions, dict) or not versions:
        return ""
    return f"## Versions\n\n{table(['library', 'version'], [[name, str(v)] for name, v in versions.items()])}"


def _yaml(data: Any) -> str:
    return block(yaml.safe_dump(data, sort_keys=False, width=100), "yaml")
