"""What edits change on other text: the divergence of the edited model's predictions from the model's."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_vpd.decomposition import Decomposition
from tl_vpd.editing.runs import edited
from tl_vpd.forward import MaskedModel, SiteEdit, SitePass
from tl_vpd.masking import Masks

Text = Mapping[str, Int[Tensor, "row pos"]]


@torch.no_grad()
def kl_elsewhere(
    decomposition: Decomposition,
    model: nn.Module,
    text: Text,
    edits: Mapping[str, Mapping[str, SiteEdit]],
    *,
    batch: int = 16,
) -> pd.DataFrame:
    """KL from the model's prediction in nats, mean and 99th percentile over tokens: a row for each edit and kind of text, and one
    for all kinds.

    Args:
        decomposition: of the model's weights, whose sites are edited.
        model: the target.
        text: rows of tokens by kind.
        edits: changes by site, by name.
        batch: rows that run at once.
    """
    values: dict[tuple[str, str], list[Tensor]] = {}
    with MaskedModel(decomposition, model, fused_attention=True) as masked_model:
        late = masked_model.can_start_late(next(iter(text.values()))[:1])
        for kind, rows in text.items():
            for tokens in rows.split(batch):
                run = SitePass(collect=late)
                log_p = masked_model.run(tokens, run).float().log_softmax(-1)
                for name, edit in edits.items():
                    with edited(masked_model, edit):
                        logits = masked_model.masked(tokens, Masks({}), start=run.residual if late else None)
                    kl = (log_p.exp() * (log_p - logits.float().log_softmax(-1))).sum(-1)
                    values.setdefault((name, kind), []).append(kl.flatten().clamp(min=0))
    table, by_edit = [], dict[str, list[Tensor]]()
    for (name, kind), parts in values.items():
        by_edit.setdefault(name, []).extend(parts)
        table.append({"edit": name, "text": kind, **_mean_and_p99(torch.cat(parts))})
    table += [{"edit": name, "text": "all", **_mean_and_p99(torch.cat(parts))} for name, parts in by_edit.items()]
    return pd.DataFrame(table)


def _mean_and_p99(kl: Tensor) -> dict[str, float]:
    return {"kl": float(kl.double().mean()), "p99": float(kl.double().quantile(0.99)), "tokens": len(kl)}
