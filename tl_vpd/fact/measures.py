"""The facts in numbers: under masks and edits, and what edits change elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_vpd.decomposition import Decomposition
from tl_vpd.editing import Edit, remove
from tl_vpd.editing.controls import random_control
from tl_vpd.editing.runs import edited_run
from tl_vpd.fact.edits import ablations, answers_of, erasing, just_enough, swapping
from tl_vpd.fact.elsewhere import Text, kl_elsewhere
from tl_vpd.fact.settings import Facts
from tl_vpd.forward import MaskedModel

IN_PART = "exchanged in part"
"""The name of the smallest sufficient part of the exchange."""


@torch.no_grad()
def probabilities(
    decomposition: Decomposition, model: nn.Module, facts: Facts, edits: Mapping[str, Edit | None]
) -> pd.DataFrame:
    """The answers' probabilities after every prompt and paraphrase of both facts: a row for each prompt, subject and edit, with
    ``answer`` (its probability), ``other`` (that of the other fact's answer), the most likely token ``top``, and which answer is
    the ``first`` of the facts' ``others``.

    Args:
        decomposition: of the model's weights.
        model: the target.
        facts: the facts.
        edits: by name; None is the model itself.
    """
    table = []
    with MaskedModel(decomposition, model) as masked_model:
        adapter, answers = masked_model.adapter, answers_of(masked_model, facts)
        others = torch.tensor(list(dict.fromkeys([*answers, *(adapter.token(word) for word in facts.others)])))
        for name, edit in edits.items():
            run = edited_run(masked_model, {} if edit is None else edit.site_edits(decomposition))
            for template in (facts.template, *facts.paraphrases):
                for i, subject in enumerate(facts.subjects):
                    prompt = template.replace("{}", subject)
                    p = run(adapter.tokens([prompt]), None)[0, -1].float().softmax(-1)
                    words = adapter.words(torch.stack([p.argmax(), others[p[others].argmax()]]))
                    row = {"edit": name, "prompt": prompt, "subject": subject, "trained": template == facts.template}
                    row |= {"answer": float(p[answers[i]]), "other": float(p[answers[1 - i]])}
                    table.append({**row, "top": words[0], "first": words[1]})
    return pd.DataFrame(table)


@torch.no_grad()
def alone(decomposition: Decomposition, model: nn.Module, facts: Facts, *, steps: int = 20) -> pd.DataFrame:
    """The answer's probability under masks: a row for each subject, with that of the ``model``, with important subcomponents
    alone and Δ off (``rounded``), under the worst masks that an adversary finds (``attacked``), and with all subcomponents off
    and Δ on (``ablated``).

    Args:
        decomposition: of the model's weights.
        model: the target.
        facts: the facts.
        steps: of the adversary.
    """
    table = []
    with MaskedModel(decomposition, model) as masked_model:
        answers = answers_of(masked_model, facts)
    for i, prompt in enumerate(facts.prompts):
        with torch.enable_grad():
            worst = decomposition.adversarial_masks(model, prompt, steps=steps, seed=0)
        row: dict[str, Any] = {"subject": facts.subjects[i], "l0": 0.0}
        with decomposition.attach(model) as attached:
            row["l0"] = float(decomposition.causal_importances(model, prompt).l0.float().mean())
            modes: dict[str, Any] = {"rounded": attached.masked("rounded"), "attacked": attached.masked(worst)}
            modes["ablated"] = attached.masked("zero", delta=1.0)
            row["model"] = float(model(prompt)[0, -1].softmax(-1)[answers[i]])
            for name, masked in modes.items():
                with masked:
                    row[name] = float(model(prompt)[0, -1].softmax(-1)[answers[i]])
        table.append(row)
    return pd.DataFrame(table)


def measure(
    decomposition: Decomposition,
    model: nn.Module,
    text: Text,
    facts: Facts,
    rows: Int[Tensor, "other other_pos"],
    *,
    naive: Decomposition | None = None,
    shown: int = 12,
) -> dict[str, Any]:
    """All figures of the facts, as data: tables as lists of rows.

    Args:
        decomposition: of the model's weights.
        model: the target.
        text: other text by kind.
        facts: the facts.
        rows: of other text, on which edits are chosen (``swapping``).
        naive: of the target stream alone, of the same sites, for comparison.
        shown: subcomponents whose ablation is measured on other text too: those that belong to a fact most.
    """
    table = ablations(decomposition, model, facts)
    edits = {f"without {s}": erasing(decomposition, model, facts, table, i) for i, s in enumerate(facts.subjects)}
    edits["exchanged"] = swapping(decomposition, model, facts, table, rows)
    variants = {name: edit.site_edits(decomposition) for name, edit in edits.items()}
    alive = torch.zeros(decomposition.site_axis.total, dtype=torch.bool)
    for site, index in zip(table["site"], table["index"], strict=True):
        alive[decomposition.site_axis.slices[site].start + index] = True
    for name, edit in list(edits.items())[1:]:
        if (control := random_control(edit, decomposition, alive, torch.Generator().manual_seed(0))) is not None:
            variants[f"{name}, at random others"] = control.site_edits(decomposition)
    edits[IN_PART] = just_enough(decomposition, model, facts, edits["exchanged"])
    variants[IN_PART] = edits[IN_PART].site_edits(decomposition)
    if naive is not None and len(of_naive := ablations(naive, model, facts)):
        edit = erasing(naive, model, facts, of_naive, 0)
        edits[(name := f"without {facts.subjects[0]}, naive")] = edit
        variants[name] = edit.site_edits(naive)
    kl = kl_elsewhere(decomposition, model, text, variants)
    strongest = table.assign(most=table[[f"of {s}" for s in facts.subjects]].abs().max(axis=1)).nlargest(shown, "most")
    some = {kind: rows[: max(1, len(rows) // 20)] for kind, rows in text.items()}
    single = {c: remove(decomposition, c).site_edits(decomposition) for c in strongest["subcomponent"]}
    alone_kl = kl_elsewhere(decomposition, model, some, single) if single else pd.DataFrame()
    before_after = probabilities(decomposition, model, facts, {"model": None, **_of(edits, naive=False)})
    if naive is not None:
        before_after = pd.concat([before_after, probabilities(naive, model, facts, _of(edits, naive=True))])
    return {
        "facts": {"prompts": facts.prompts, "answers": list(facts.answers)},
        "tokens": int(sum(rows.numel() for rows in text.values())),
        "alive": {name: int((table["site"] == name).sum()) for name in decomposition.sites},
        "alone": _rows(alone(decomposition, model, facts)),
        "alone_naive": [] if naive is None else _rows(alone(naive, model, facts)),
        "ablations": _rows(strongest.drop(columns=["most", "site", "index"])),
        "ablations_elsewhere": _rows(alone_kl[alone_kl["text"] == "all"]) if single else [],
        "edits": {name: [str(c) for c in edit.subcomponents] for name, edit in edits.items()},
        "changes": {name: _rows(edit.to_pandas()[["subcomponent", "change"]]) for name, edit in edits.items()},
        "elsewhere": _rows(kl),
        "answers": _rows(before_after),
    }


def _of(edits: Mapping[str, Edit], *, naive: bool) -> dict[str, Edit]:
    return {name: edit for name, edit in edits.items() if name.endswith("naive") == naive}


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
