"""Which subcomponents hold a fact, and the edits that erase it and exchange it with the other.

Each subcomponent that is important on the prompts is ablated out of the full model, alone. One belongs to a fact as far as the
fact's answer loses more log-probability than the other fact's.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_vpd.decomposition import Decomposition
from tl_vpd.editing import Edit, remove, swap
from tl_vpd.editing.runs import edited_run
from tl_vpd.fact.elsewhere import kl_elsewhere
from tl_vpd.fact.settings import Facts
from tl_vpd.forward import MaskedModel, SitePass
from tl_vpd.masking import constant_masks

ERASED = 0.05
"""A fact is erased where its answer has at most this part of its probability."""
MOST = 12
"""Subcomponents that an edit removes at most."""
REWIRED = 0.5
"""Two facts are exchanged where each prompt gives the other's answer at least this probability."""
STRENGTHS = tuple(i / 20 for i in range(1, 20))
"""Parts of an exchange that are tried, the smallest first."""


def answers_of(masked_model: MaskedModel, facts: Facts) -> list[int]:
    """The answers as tokens.

    Args:
        masked_model: of the model.
        facts: whose answers they are.

    Raises:
        ValueError: an answer is not one token.
    """
    return [masked_model.adapter.token(answer) for answer in facts.answers]


@torch.no_grad()
def ablations(decomposition: Decomposition, model: nn.Module, facts: Facts, *, batch: int = 32) -> pd.DataFrame:
    """What each important subcomponent's ablation does: a row each, with ``site``, ``index``, its largest importance on both
    prompts, the ``answer``'s probability after it, and how much more log-probability each fact loses than the other (``of``).

    Args:
        decomposition: of the model's weights.
        model: the target.
        facts: that are decomposed.
        batch: ablations that run at once.
    """
    axis = decomposition.site_axis
    with MaskedModel(decomposition, model) as masked_model:
        tokens, run = masked_model.adapter.tokens(facts.prompts), SitePass(collect=decomposition.gamma_inputs)
        late = masked_model.can_start_late(tokens)
        clean = masked_model.run(tokens, run)
        answers = torch.tensor(answers_of(masked_model, facts))
        g = decomposition.importances(run.inputs)
        largest = g.amax(1)  # [fact, C]
        alive = (largest.amax(0) > 0).nonzero()[:, 0]
        after = []
        for columns in alive.split(batch):
            masks = torch.ones(len(columns), *g.shape)
            masks[torch.arange(len(columns)), :, :, columns] = 0
            rows = tokens.repeat(len(columns), 1)
            start = None if run.residual is None or not late else run.residual.repeat(len(columns), 1, 1)
            logits = masked_model.masked(rows, constant_masks(masks.flatten(0, 1), 1.0, axis), start=start)
            after.append(_log_p(logits.unflatten(0, (len(columns), 2)), answers))
    log_p = torch.cat(after) if after else torch.empty(0, 2)
    lost = _log_p(clean, answers) - log_p
    names = [axis.at(int(c)) for c in alive]
    table = pd.DataFrame(
        {"subcomponent": map(str, names), "site": [c.site for c in names], "index": [c.index for c in names]}
    )
    for i, subject in enumerate(facts.subjects):
        table[f"importance {subject}"] = largest[i, alive].tolist()
        table[f"p {facts.answers[i].strip()}"] = log_p[:, i].exp().tolist()
        table[f"of {subject}"] = (lost[:, i] - lost[:, 1 - i]).tolist()
    return table


def erasing(decomposition: Decomposition, model: nn.Module, facts: Facts, table: pd.DataFrame, which: int) -> Edit:
    """Removes as few of a fact's subcomponents as erase it, those that belong to it most.

    Args:
        decomposition: of the model's weights.
        model: the target.
        facts: the facts.
        table: from ``ablations``.
        which: 0 or 1.

    Raises:
        ValueError: no subcomponent is important on the prompts.
    """
    if not len(table):
        raise ValueError("No subcomponent is important on the prompts: there is nothing to remove.")
    order = table.sort_values(f"of {facts.subjects[which]}", ascending=False)["subcomponent"].tolist()
    with MaskedModel(decomposition, model) as masked_model:
        tokens = masked_model.adapter.tokens([facts.prompts[which]])
        answer = answers_of(masked_model, facts)[which]
        clean = float(masked_model.clean(tokens)[0][0, -1].log_softmax(-1)[answer])
        for n in range(1, min(MOST, len(order)) + 1):
            edit = remove(decomposition, order[:n])
            after = edited_run(masked_model, edit.site_edits(decomposition))(tokens, None)
            if float(after[0, -1].log_softmax(-1)[answer]) <= clean + torch.tensor(ERASED).log():
                break
    return edit


def swapping(
    decomposition: Decomposition,
    model: nn.Module,
    facts: Facts,
    table: pd.DataFrame,
    rows: Int[Tensor, "other other_pos"],
) -> Edit:
    """Exchanges the write directions of one subcomponent of each fact, at the site where that rewires both (the other answer is
    likelier than not) and changes other text least; at the best of them where none does.

    Args:
        decomposition: of the model's weights.
        model: the target.
        facts: the facts.
        table: from ``ablations``.
        rows: of other text, on which sites are compared.

    Raises:
        ValueError: no site has a subcomponent of each fact.
    """
    columns, edits, p = [f"of {subject}" for subject in facts.subjects], dict[str, Edit](), dict[str, float]()
    with MaskedModel(decomposition, model) as masked_model:
        tokens, answers = masked_model.adapter.tokens(facts.prompts), answers_of(masked_model, facts)
        for site, of_site in table.set_index("subcomponent").groupby("site"):
            c, d = (of_site[column].idxmax() for column in columns)
            if c != d:
                edits[site] = swap(decomposition, model, facts.prompts, c, d)
                logits = edited_run(masked_model, edits[site].site_edits(decomposition))(tokens, None)
                p[site] = float(_log_p(logits, torch.tensor(answers[::-1])).min().exp())
    if not edits:
        raise ValueError("No site has a subcomponent of each fact: nothing can be exchanged.")
    rewiring = {site: edit.site_edits(decomposition) for site, edit in edits.items() if p[site] > REWIRED}
    if not rewiring:
        return edits[max(p, key=p.__getitem__)]
    kl = kl_elsewhere(decomposition, model, {"rows": rows}, rewiring).query("text == 'all'").set_index("edit")["kl"]
    return edits[kl.idxmin()]


def just_enough(decomposition: Decomposition, model: nn.Module, facts: Facts, exchange: Edit) -> Edit:
    """The smallest part of an exchange that still makes the other answer likelier than not after both prompts: its changes
    multiplied by a number below 1, where one of ``STRENGTHS`` does. What an edit changes elsewhere grows with about its square.

    Args:
        decomposition: of the model's weights.
        model: the target.
        facts: the facts.
        exchange: from ``swapping``.
    """
    with MaskedModel(decomposition, model) as masked_model:
        tokens, answers = masked_model.adapter.tokens(facts.prompts), answers_of(masked_model, facts)
        for strength in STRENGTHS:
            part = replace(
                exchange,
                pieces=tuple(
                    replace(piece, change=strength * piece.change, about=f"{strength:.2g} of the way: {piece.about}")
                    for piece in exchange.pieces
                ),
            )
            logits = edited_run(masked_model, part.site_edits(decomposition))(tokens, None)
            if float(_log_p(logits, torch.tensor(answers[::-1])).min().exp()) > REWIRED:
                return part
    return exchange


def _log_p(logits: Tensor, answers: Tensor) -> Tensor:
    """The log-probability of each fact's answer after its prompt, ``[..., fact]``."""
    last = logits[..., -1, :].float().log_softmax(-1)
    return last.gather(-1, answers.expand(last.shape[:-1])[..., None])[..., 0]
