"""``tl-vpd demo``: a tour in a few minutes, on the bundled model and decomposition.

Numbered steps: load, check exactness, evaluate, train a short decomposition, ablate a subcomponent, draw a page. In the
output folder afterwards: ``index.html`` (opens offline), ``metrics.json`` (records ``bundled`` and ``short``) and ``short/`` (the
decomposition that step 4 trains).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_vpd import bundled
from tl_vpd.adapters import adapt
from tl_vpd.analysis import Harvest, harvest, pick
from tl_vpd.bundled.recipe import CONFIG
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation import Evaluation, EvaluationConfig, evaluate
from tl_vpd.files.atomic import make_folder
from tl_vpd.files.json_files import write_json
from tl_vpd.masking import constant_masks
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent
from tl_vpd.training import Run, decompose

Say = Callable[[str], None]
INTRODUCTION = (
    "A two-layer transformer that was trained on the source text of Python's standard library, with its twelve attention and "
    "MLP matrices split into rank-one subcomponents. At each token only a few of them matter for what the model predicts; the "
    "others can be removed, in any combination.\n\n"
    "In the first table every mode keeps, removes or weakens subcomponents by their causal importance and runs the model on "
    "what is left. Importances are computed from the whole window, following tokens included, so the cross-entropy (ce) "
    "of a masked model can come out below the target's; the KL from the target has no such advantage."
)


def run_demo(folder: Path, *, steps: int, say: Say) -> None:
    """Runs the demo with so many steps of the short decomposition, and writes its folder; ``say`` prints a text."""
    make_folder(folder)
    write_json(folder / "metrics.json", {})
    say("1. The bundled model and its decomposition")
    model, vpd = bundled.model(), bundled.decomposition()
    held_out = bundled.tokens("validation")
    say(f"   {vpd}".replace("\n", "\n   "))

    say("\n2. Exact?")
    for line in exactness(vpd, model, held_out[:4]):
        say(f"   {line}")

    say("\n3. How good is it? (2,048 validation tokens; every site masked, Δ off, but random in the stochastic mode)")
    curve = bundled.training_record()["curve"]
    sample = held_out[: 2048 // held_out.shape[1]]
    report = evaluate(vpd, model, sample, EvaluationConfig(budgets=(), curve=curve, measures=()))
    _summarise(report, say)

    say(f"\n4. A short decomposition from scratch ({steps} steps; the bundled one took 7,000)")
    config = CONFIG.model_copy(update={"steps": steps})
    run = decompose(model, bundled.tokens("training"), config)
    run.decomposition.save(folder / "short")
    short_config = EvaluationConfig(budgets=(20,), controls=False, curve=curve, measures=())
    short = evaluate(run.decomposition, model, sample, short_config)
    _summarise(short, say)

    say("\n5. Ablating one subcomponent out of the model")
    examples = harvest(vpd, model, held_out, subcomponents=None)
    candidates = pick(examples, 12)
    effect = ablation_effect(vpd, model, held_out[:16], candidates)
    for line in effect.lines():
        say(f"   {line}")

    write_json(folder / "metrics.json", {"bundled": report.record, "short": short.record})
    path = _page(folder, examples, candidates, short, run, effect)
    say(f"\n6. Look at it: {path.resolve()}")


def exactness(vpd: Decomposition, model: Any, tokens: Int[Tensor, "batch pos"]) -> list[str]:
    """Two checks as sentences; raises RuntimeError where one fails."""
    generator = torch.Generator().manual_seed(0)
    adapter, site_axis = adapt(model), vpd.site_axis
    mask = torch.rand(site_axis.total, generator=generator)
    with torch.no_grad():
        clean = model(tokens)
        with vpd.attach(model) as attached:
            full = torch.ones(*tokens.shape, site_axis.total)
            with attached.masked(constant_masks(full, 1.0, site_axis)):
                ones = model(tokens)
            with attached.masked(constant_masks(mask.expand_as(full), 0.3, site_axis)):
                masked = model(tokens)
        edited = copy.deepcopy(model)
        for name, m in site_axis.split_sites(mask).items():
            delta = vpd.components.delta(name, adapter.weight(name))
            adapt(edited).set_weight(name, (vpd.V[name] * m) @ vpd.U[name] + 0.3 * delta)
        difference = float((edited(tokens) - masked).abs().max())
    if not torch.equal(ones, clean):
        raise RuntimeError("With every mask at 1 the logits differ from the model's.")
    if difference > 1e-3:
        raise RuntimeError(f"Masked logits differ by {difference} from those of a model with edited weights.")
    return [
        "every mask at 1: the model's logits, to the bit",
        f"random masks, Δ at 0.3: largest difference from a model with edited weights {difference:.1e}",
    ]


@dataclass(frozen=True)
class AblationEffect(Printed):
    """What removing a subcomponent does where it is important and where it is not."""

    subcomponent: Subcomponent
    kl_important: float
    kl_elsewhere: float
    density: float
    context: str
    before: pd.DataFrame
    after: pd.DataFrame

    def lines(self) -> list[str]:
        """The effect as sentences."""
        return [
            f"{self.subcomponent} removed everywhere: KL from the model {self.kl_important:.3f} nats per token where its "
            f"importance is above 0.5 ({self.density:.1%} of tokens), {self.kl_elsewhere:.5f} where it is 0",
            f"where it changes most, after {self.context!r}:",
            "   with it:    " + self._row(self.before),
            "   without it: " + self._row(self.after),
        ]

    def side_by_side(self) -> pd.DataFrame:
        """The likeliest next tokens with and without the subcomponent."""
        without = self.after.rename(columns={"token": "token without", "p": "p without"})
        return pd.concat([self.before, without], axis=1).round(3)

    @staticmethod
    def _row(table: pd.DataFrame) -> str:
        return "  ".join(f"{t!r} {p:.0%}" for t, p in zip(table["token"], table["p"], strict=True))


@torch.no_grad()
def ablation_effect(
    vpd: Decomposition, model: Any, tokens: Int[Tensor, "batch pos"], candidates: list[Subcomponent]
) -> AblationEffect:
    """Removes each candidate in turn and reports the one with the largest effect where it is important."""
    assert model.tokenizer is not None
    clean = model(tokens).log_softmax(-1)
    importances = vpd.causal_importances(model, tokens)
    best: tuple[float, Subcomponent, Tensor, Tensor] | None = None
    with vpd.attach(model) as attached:
        for c in candidates:
            g = importances[c.site][..., c.index]
            if int((g > 0.5).sum()) < 5:
                continue
            with attached.ablated([c]):
                without = model(tokens).log_softmax(-1)
            kl = (clean.exp() * (clean - without)).sum(-1)
            effect = float(kl[g > 0.5].mean())
            if best is None or effect > best[0]:
                best = effect, c, kl, without
    if best is None:
        raise RuntimeError("None of the candidates is important at five tokens of the sample.")
    effect, c, kl, without = best
    g = importances[c.site][..., c.index]
    row, pos = divmod(int((kl * (g > 0.5)).argmax()), tokens.shape[1])
    context = str(model.tokenizer.decode(tokens[row, max(1, pos - 12) : pos + 1]))
    return AblationEffect(
        subcomponent=c,
        kl_important=effect,
        kl_elsewhere=float(kl[g == 0].mean()),
        density=float((g > 0.5).float().mean()),
        context=context,
        before=_likely(model, clean[row, pos]),
        after=_likely(model, without[row, pos]),
    )


def _likely(model: Any, log_p: Float[Tensor, " vocab"], k: int = 4) -> pd.DataFrame:
    assert model.tokenizer is not None
    top = log_p.exp().topk(k)
    return pd.DataFrame(
        {"token": [model.tokenizer.decode([i]) for i in top.indices.tolist()], "p": top.values.tolist()}
    )


def _summarise(report: Evaluation, say: Say) -> None:
    record = report.record
    say(_indented(report.table().round(3)))
    say(
        f"   target CE {record['target_ce']:.3f}; L0 {record['l0']:.1f} per token, {record['alive']} alive in this sample, "
        f"{record['built']} built; " + "; ".join(f"PGD-{k} KL {v:.2f}" for k, v in record["pgd_kl"].items())
    )
    for name, control in record.get("controls", {}).items():
        say(
            f"   control, {name}: rounded CE {control['rounded_ce']:.3f}, stochastic CE {control['stochastic_ce']:.3f}, "
            f"PGD-20 KL {control['pgd_kl']['20']:.1f}"
        )


def _indented(table: pd.DataFrame) -> str:
    return "   " + table.to_string().replace("\n", "\n   ")


def _page(
    folder: Path,
    examples: Harvest,
    candidates: list[Subcomponent],
    short: Evaluation,
    run: Run,
    effect: AblationEffect,
) -> Path:
    from tl_vpd import viz

    stored = bundled.evaluation()
    panels = [
        viz.table(stored.table().round(4).reset_index(), "The bundled decomposition on 8,192 validation tokens"),
        viz.table(stored.pgd_table().round(3).reset_index(), "KL under a fresh adversary, by its number of steps"),
        viz.table(
            effect.side_by_side(), f"Next token after {effect.context!r}, with and without {effect.subcomponent}"
        ),
        *(viz.subcomponent(examples, c) for c in candidates),
        viz.losses(run.history, title="The short decomposition trained by this demo"),
        viz.table(short.table().round(4).reset_index(), "What the short decomposition reached, on 2,048 tokens"),
    ]
    return viz.page(panels, "A small language model, decomposed", folder / "index.html", introduction=INTRODUCTION)
