"""Wrong calls of analysis, evaluation, pictures and toys: each error says what came and what to do.

A script, since the tests check every argument's type before the library sees it; ``test_wrong_calls`` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch

import tl_vpd
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tests.wrong_calls import Call, check
from tl_vpd import analysis, bundled, evaluation, formats, planning, toys, viz
from tl_vpd.analysis import attention
from tl_vpd.baselines import APDConfig, SPDConfig, apd, spd
from tl_vpd.losses import Penalty, Reconstruction, faithfulness
from tl_vpd.planning import Target, TransformerShape
from tl_vpd.toys.features import SparseFeatures
from tl_vpd.toys.grammar import Sentences
from tl_vpd.toys.induction import Repeated

Q, K, IN = "blocks.1.attn.W_Q", "blocks.1.attn.W_K", "blocks.1.mlp.W_in"
model = tiny_model()
vpd = decomposition_of(model).to(torch.float64)
tokens = some_tokens()
prompt = tokens[:1]
NAN, HUGE = float("nan"), 10**400
anything: Any = tl_vpd


def metric(logits: torch.Tensor) -> torch.Tensor:
    """A difference of logits."""
    return logits[:, -1, 3].mean() - logits[:, -1, 4].mean()


graph = analysis.attribution_graph(vpd, model, prompt, 3)
dataset = analysis.dataset_graph(vpd, model, tokens)
harvest = analysis.harvest(vpd, model, tokens)
circuit = analysis.prune(vpd, model, prompt, 3, config=analysis.PruneConfig(steps=1))
audit = analysis.audit_circuit(
    vpd, model, tokens, [f"{Q}:1"], metric, config=analysis.AuditConfig(budgets=[2], restarts=1, draws=1, controls=1)
)
repair = analysis.repair_circuit(
    vpd, model, tokens, [f"{Q}:1"], metric, config=analysis.RepairConfig(steps=1, max_added=1, candidates=1, restarts=1)
)
terms = attention.score_terms(vpd, model, prompt, 1, [(f"{Q}:1", f"{K}:2")])
mean = attention.mean_strengths(vpd, model, tokens, 1)
static = attention.static_strengths(vpd, model, tokens, 1)
norms = attention.head_norms(vpd, 1)
paid = attention.attention_by_offset(vpd, model, tokens, 1)
overlap = attention.ov_overlap(vpd, model, tokens, 1, config=attention.OVConfig(draws=2))
values = attention.value_given_key(vpd, model, tokens, 1)

INTEGERS = [NAN, 1.5, "3", None, [1], True, -(10**400), b"1", object]
"""What no count may be."""
COUNTS: dict[str, Callable[[Any], Any]] = {
    **{
        f"{type(result).__name__}.top(k)": lambda k, result=result: result.top(k)  # type: ignore[misc]
        for result in (harvest, circuit, audit, repair, terms, mean, static, norms, paid, overlap, values)
    },
    "input_tokens(k)": lambda k: harvest[f"{Q}:1"].input_tokens(k),
    "output_tokens(k)": lambda k: harvest[f"{Q}:1"].output_tokens(k, by="recall"),
    "graph.top_edges(k)": lambda k: graph.top_edges(k),
    "graph.paths(k)": lambda k: graph.paths(k=k),
    "dataset.top_edges(k)": lambda k: dataset.top_edges(k),
    "strongest_static(k)": lambda k: attention.strongest_static(vpd, model, tokens, 1, k),
    "cancelling_pairs(k)": lambda k: evaluation.cancelling_pairs(vpd, k=k),
    "viz.importances(k)": lambda k: viz.importances(vpd, model, prompt, k=k),
    "viz.subcomponent(tokens)": lambda tokens: viz.subcomponent(harvest, f"{Q}:1", tokens=tokens),
    "viz.head_norms(top)": lambda top: viz.head_norms(norms, top=top),
    "viz.static_strengths(top)": lambda top: viz.static_strengths(static, top=top),
    "viz.graph(nodes)": lambda nodes: viz.graph(graph, nodes=nodes),
    "viz.graph(edges)": lambda edges: viz.graph(graph, edges=edges),
    "pick(n)": lambda n: analysis.pick(harvest, n),
    "pick(min_firings)": lambda n: analysis.pick(harvest, min_firings=n),
    "mean.contrast(offset)": mean.contrast,
    "Node(index)": lambda index: analysis.Node(Q, -1 if index is None else index),
    "Node(pos)": lambda pos: analysis.Node(Q, 1, -1 if pos is None else pos),
    "position": lambda pos: analysis.prune(
        vpd, model, prompt, 3, pos={None: "last", -1: 7}[pos] if pos in (None, -1) else pos
    ),
    "layer of score_terms": lambda layer: attention.score_terms(vpd, model, prompt, layer),
    "layer of head_norms": lambda layer: attention.head_norms(vpd, layer),
    "layer of ov_overlap": lambda layer: attention.ov_overlap(vpd, model, tokens, layer),
    "layer of offsets": lambda layer: attention.attention_by_offset(vpd, model, prompt, layer),
    "layer of head_alignment": lambda layer: attention.head_alignment(vpd, model, layer),
    "layer of value_given_key": lambda layer: attention.value_given_key(vpd, model, prompt, layer),
    "max_offset": lambda n: attention.attention_by_offset(vpd, model, prompt, 1, max_offset=n),
    "max_offset of mean_strengths": lambda n: attention.mean_strengths(vpd, model, prompt, 1, max_offset=n),
    "steps of train": lambda steps: toys.train(toys.TMS(5, 2), steps=-1 if steps is None else steps),
    "seed of recipe": lambda seed: toys.recipe("tms_5_2", "vpd", seed=HUGE if seed == -1 else seed),
    "seed of consistency": lambda seed: evaluation.consistency(vpd, vpd, seed=HUGE if seed == -1 else seed),
    "seed of scrambled": lambda seed: evaluation.scrambled(model, tokens, seed=HUGE if seed == -1 else seed),
    "footprint(context)": lambda n: planning.footprint(Target.of(model), context=n),
    "footprint(processes)": lambda n: planning.footprint(Target.of(model), context=8, processes=n),
    "first_try(steps)": lambda n: planning.first_try(model, steps=n),
    "first_try(batch_size)": lambda n: planning.first_try(model, batch_size=n),
    "seconds_per_step(context)": lambda n: planning.seconds_per_step(model, planning.first_try(model), context=n),
}
"""Each takes a count of 0 or more, an index, or a seed."""

CONFIGS: dict[str, Callable[..., Any]] = {
    config.__name__: config
    for config in (
        analysis.HarvestConfig,
        analysis.AblationTableConfig,
        analysis.GraphConfig,
        analysis.DatasetGraphConfig,
        analysis.PruneConfig,
        analysis.AuditConfig,
        analysis.RepairConfig,
        attention.OVConfig,
        evaluation.EvaluationConfig,
        evaluation.Adversary,
        toys.Compressed,
    )
} | {
    "TMS": partial(toys.TMS, n_features=5, n_hidden=2),
    "TargetTraining": partial(toys.TargetTraining, steps=1, rows=1, lr=0.1),
    "SparseFeatures": partial(SparseFeatures, n_features=5, probability=0.5, batch_size=2, context=2),
    "Repeated": partial(Repeated, d_vocab=9, context=9, shortest=2, longest=3, batch_size=2),
    "Sentences": partial(Sentences, context=9, batch_size=2),
}
SENTENCE = (TypeError, ValueError, IndexError, KeyError)
BAD: dict[str, list[Any]] = {
    "int": [-(10**400), HUGE, 1.5, "3", b"", NAN, [1], {}, (1, 2), object(), torch.ones(2), np.ones(2)],
    "float": [NAN, float("inf"), HUGE, "0.1", [0.1], {}, object(), True, torch.ones(2), 1j],
    "bool": [1, 0, "no", "", [], object(), 1.0],
    "Sequence[int]": [20, "20", {20}, {20: 1}, (-1,), (1.5,), ("3",), (NAN,), object()],
    "Sequence[str]": ["ab", 3, {"a"}, ("nothing",), (3,), (None,), object()],
    "str": [3, "nothing", b"zero", ["zero"], object()],
}
"""By annotation, what no field of it may be."""

CALLS: list[Call] = [
    (
        lambda: tl_vpd.attribution_graph(vpd, model, prompt, config=anything),
        TypeError,
        "A module came where GraphConfig is",
    ),
    (lambda: tl_vpd.evaluate(vpd, model, tokens, anything), TypeError, r"give EvaluationConfig\(...\)"),
    (lambda: tl_vpd.decompose(model, tokens, saving=anything), TypeError, "A module came where SavingConfig is needed"),
    (lambda: tl_vpd.decompose(model, tokens, execution=anything), TypeError, "came where ExecutionConfig is needed"),
    (lambda: analysis.prune_sweep(vpd, model, prompt, 5, [-0.1]), ValueError, "give a finite number of at least 0"),
    (lambda: attention.score_terms(vpd, model, prompt, 1, "tl_vpd"), TypeError, "pairs='tl_vpd' is a string"),  # type: ignore[arg-type]
    (lambda: attention.ov_overlap(vpd, model, prompt, 1, key=f"{Q}:3"), ValueError, "is not of blocks.1.attn.W_K"),
    (
        lambda: attention.value_given_key(vpd, model, prompt, 1, threshold=2.0),
        ValueError,
        "threshold=2.0: importances are in",
    ),
    (lambda: bundled.tokens(anything), KeyError, "the bundled tokens are 'validation' and 'training'"),
    (lambda: evaluation.EvaluationConfig(measures="hidden"), TypeError, "is a string: give names in a list"),
    (lambda: harvest[tl_vpd.site.Subcomponent(Q, -1)], ValueError, "index=-1"),
    (lambda: harvest[f"{Q}:99"], IndexError, "has 6 subcomponents, 0 to 5"),
    (lambda: harvest["blocks.1.attn.hook_q:3"], KeyError, "did you mean 'blocks.1.attn.W_Q'"),
    (lambda: harvest[3], TypeError, "write 'site:index'"),  # type: ignore[index]
    (lambda: harvest[f"{Q}:1"].input_tokens(by="lift"), ValueError, "by='lift': choose from 'pmi', 'recall'"),
    (lambda: analysis.harvest(vpd, model, tokens, []), ValueError, "subcomponents is empty"),
    (lambda: analysis.harvest(vpd, model, tokens, {f"{Q}:1": 2}), TypeError, "subcomponents=.* is a dict"),  # type: ignore[arg-type]
    (
        lambda: formats.save_neuronpedia(vpd, model, tokens, "features", model_id=3),  # type: ignore[arg-type]
        TypeError,
        "model_id=3 is a int: give a string",
    ),
    (
        lambda: formats.NeuronpediaConfig(values="mask"),  # type: ignore[arg-type]
        ValueError,
        "values='mask': choose from 'importance', 'activation'",
    ),
    (lambda: analysis.HarvestConfig(threshold=1.0), ValueError, "no importance exceeds 1"),
    (lambda: analysis.ablation_table(vpd, model, prompt, metric, []), ValueError, "subcomponents is empty"),
    (
        lambda: analysis.ablation_table(vpd, model, prompt, lambda logits: None),
        TypeError,
        "The metric gave a NoneType; one number",
    ),
    (
        lambda: analysis.ablation_table(vpd, model, prompt, lambda logits: logits[0, -1]),
        ValueError,
        r"tensor of shape \(11,\); one number",
    ),
    (
        lambda: analysis.ablation_table(
            vpd,
            model,
            prompt,
            metric,
            [f"{Q}:1"],
            config=analysis.AblationTableConfig(values={Q: torch.full((6,), NAN)}),
        ),
        ValueError,
        "are NaN or infinite",
    ),
    (
        lambda: analysis.ablation_table(
            vpd, model, prompt, metric, [f"{Q}:1"], config=analysis.AblationTableConfig(values={Q: torch.ones(5)})
        ),
        ValueError,
        "their last axis needs 6 subcomponents",
    ),
    (lambda: analysis.AblationTableConfig(values=[1.0]), TypeError, "values is a list: give tensors by site"),  # type: ignore[arg-type]
    (lambda: analysis.AblationTableConfig(amount=NAN), ValueError, "amount=nan: give a finite number"),
    (lambda: analysis.attribution_graph(vpd, model, prompt, HUGE), IndexError, "outside the vocabulary"),
    (lambda: analysis.attribution_graph(vpd, model, prompt, NAN), ValueError, "nan is not a probability"),
    (lambda: analysis.attribution_graph(vpd, model, prompt, []), ValueError, "leaves nothing to explain"),
    (lambda: analysis.attribution_graph(vpd, model, prompt, {3}), TypeError, "is not a target"),
    (lambda: graph.pruned(nodes=-1), ValueError, "nodes=-1: give an integer of at least 0"),
    (lambda: graph.pruned(min_weight=NAN), ValueError, "min_weight=nan: give a finite number"),
    (lambda: graph.top_edges(source=-1), IndexError, "Node -1 does not exist"),
    (lambda: graph.top_edges(source=True), TypeError, "True is a bool: give a node's label"),
    (lambda: graph.top_edges(target="logits:3@5"), KeyError, "did you mean 'logits:3@6'"),
    (lambda: graph.subgraph([None]), TypeError, "None is a NoneType: give a node's label"),  # type: ignore[list-item]
    (lambda: dataset.top_edges(source="embed@3"), KeyError, "did you mean 'embed'"),
    (lambda: analysis.dataset_graph(vpd, model, tokens, []), ValueError, "subcomponents is empty"),
    (lambda: analysis.prune(vpd, model, prompt, 3, coefficient=-0.1), ValueError, "coefficient λ=-0.1: give a finite"),
    (lambda: analysis.prune_sweep(vpd, model, prompt, 3, 0.1), TypeError, "coefficients=0.1 is a float: give values"),  # type: ignore[arg-type]
    (lambda: analysis.prune(vpd, model, prompt, 99), IndexError, "Token 99 is outside the vocabulary 0..10"),
    (lambda: analysis.prune(vpd, model, tokens, 3), ValueError, "one prompt without padding"),
    (lambda: analysis.ablate_nodes(vpd, model, graph, {}, 3), TypeError, "give a PrunedCircuit"),  # type: ignore[arg-type]
    (lambda: analysis.ablate_nodes(vpd, model, circuit, [f"{Q}:1"], 3), TypeError, "groups is a list: give nodes by"),  # type: ignore[arg-type]
    (lambda: analysis.ablate_nodes(vpd, model, circuit, {"late": 3}, 3), TypeError, r"groups\['late'\]=3 is a int"),  # type: ignore[dict-item]
    (
        lambda: analysis.ablate_nodes(vpd, model, circuit, {"late": [f"{Q}:1@9"]}, 3),
        IndexError,
        "outside the 7 positions",
    ),
    (lambda: analysis.audit_circuit(vpd, model, tokens, [], metric), ValueError, "nodes is empty"),
    (lambda: analysis.audit_circuit(vpd, model, tokens, [3], metric), TypeError, "3 is a int: write a node as"),  # type: ignore[list-item]
    (
        lambda: analysis.audit_circuit(vpd, model, tokens, [f"{Q}:1"], lambda logits: logits.mean() * NAN),
        FloatingPointError,
        "The metric is nan on the model itself",
    ),
    (
        lambda: analysis.audit_circuit(
            vpd,
            model,
            tokens,
            [f"{Q}:1"],
            lambda logits: torch.zeros(()),
            config=analysis.AuditConfig(("adversarial",)),  # type: ignore[arg-type]
        ),
        TypeError,
        "lower_is_better",
    ),
    (
        lambda: analysis.repair_circuit(vpd, model, tokens, [f"{Q}:1"], lambda logits: logits.sum() * 0),
        ValueError,
        "there is nothing to repair",
    ),
    (lambda: audit.value("mean", steps=3), KeyError, "was not run"),
    (lambda: audit.value("worst"), ValueError, "ablation='worst'.*: choose from"),
    (lambda: audit.top(3, steps=7), KeyError, "steps=7 was not run: the budgets are 2"),
    (lambda: attention.score_terms(vpd, model, prompt, 2), KeyError, "blocks.2.attn.W_Q is not decomposed"),
    (lambda: attention.score_terms(vpd, model, prompt, 1, [(f"{K}:1", f"{Q}:1")]), ValueError, "is not of blocks.1"),
    (lambda: attention.score_terms(vpd, model, prompt, 1, [f"{Q}:1"]), ValueError, "is not a pair: give"),  # type: ignore[list-item]
    (lambda: attention.head_norms(vpd, 2), KeyError, "Nothing of block 2's attention is decomposed"),
    (lambda: norms.top(head=2), ValueError, "head=2: give an integer from 0 to 1"),
    (lambda: mean.top(head=-1), ValueError, "head=-1: give an integer from 0 to 1"),
    (lambda: mean.top(offset=9), IndexError, "Offset 9 does not occur"),
    (lambda: mean.heads(f"{Q}:9", f"{K}:1", offset=1), KeyError, "is not among"),
    (lambda: overlap.top(by="score"), ValueError, "by='score' .*: choose from 'raw', 'read', 'write'"),
    (lambda: attention.attention_by_offset(vpd, model, prompt, 2), ValueError, "layer=2: give an integer from 0 to 1"),
    (lambda: attention.attention_by_offset(vpd, model, prompt, 1, ablate=3), TypeError, "ablate=3 is a int"),  # type: ignore[arg-type]
    (lambda: attention.pair_ablation_hooks(vpd, model, []), ValueError, "name at least one pair"),
    (
        lambda: attention.pair_ablation_hooks(vpd, model, [(f"{Q}:1", f"{K}:1")], amount=NAN),
        ValueError,
        "amount=nan: give a finite number",
    ),
    (
        lambda: evaluation.EvaluationConfig(budgets=(20, 0)),
        ValueError,
        r"budgets\[1\]=0: give an integer of at least 1",
    ),
    (lambda: evaluation.EvaluationConfig(starts={20: 0}), ValueError, r"starts\[20\]=0: give an integer of at least 1"),
    (lambda: evaluation.EvaluationConfig(curve=[(0, 3.0), (0, 2.0)]), ValueError, "give steps that rise"),
    (lambda: evaluation.EvaluationConfig(curve=[3.0]), TypeError, r"curve\[0\]=3.0 is a float: give values"),  # type: ignore[list-item]
    (lambda: evaluation.EvaluationConfig(leak_rows=0), ValueError, "leak_rows=0: give an integer of at least 1"),
    (lambda: tl_vpd.evaluate(vpd, model, tokens, nulls=[vpd]), TypeError, "nulls is a list: give pairs"),  # type: ignore[arg-type]
    (lambda: evaluation.probe_null(vpd, model, tokens, [0, 1]), TypeError, "labels"),  # type: ignore[arg-type]
    (lambda: evaluation.probe_null(vpd, model, tokens, tokens.float()), TypeError, "labels are of torch.float32"),
    (lambda: evaluation.redundancy(vpd, model, tokens, rows=0), ValueError, "rows=0: give an integer of at least 1"),
    (lambda: evaluation.redundancy(model, model, tokens), TypeError, "decomposition"),  # type: ignore[arg-type]
    (lambda: evaluation.untrained(model), TypeError, "decomposition"),  # type: ignore[arg-type]
    (lambda: evaluation.decompose_shuffled(model, tokens, {"steps": 1}), TypeError, "config"),  # type: ignore[arg-type]
    (lambda: evaluation.Adversary(steps=0), ValueError, "steps=0: give an integer of at least 1"),
    (lambda: evaluation.Adversary(steps=-3), ValueError, "steps=-3: give an integer of at least 1"),
    (lambda: evaluation.Adversary(step_size=0.0), ValueError, "step_size=0.0: give a finite number above 0"),
    (lambda: evaluation.Adversary(momentum=1.0), ValueError, "momentum=1.0: give a number of at least 0 and below 1"),
    (lambda: tl_vpd.evaluate(vpd, model, tokens, others=[vpd]), TypeError, "others is a list: give decompositions by"),  # type: ignore[arg-type]
    (
        lambda: tl_vpd.evaluate(vpd, model, tokens, others={"x": model}),  # type: ignore[dict-item]
        TypeError,
        "came for a Decomposition",
    ),
    (lambda: evaluation.off_distribution(vpd, model, tokens), TypeError, "data is a Tensor: give rows of tokens by"),  # type: ignore[arg-type]
    (lambda: evaluation.feature_splitting({}, model, tokens), ValueError, "give at least one, by name"),
    (lambda: evaluation.compute_recovered(2.0, []), ValueError, "curve has the steps"),
    (lambda: evaluation.sampled(vpd, model, tokens, batch_size=0).__enter__(), ValueError, "batch_size=0: give an"),
    (lambda: evaluation.sampled(vpd.components, model, tokens).__enter__(), TypeError, "Components has no Γ: pass"),
    (
        lambda: faithfulness(vpd.components, {Q: torch.zeros(8, 8)}, relative=True),
        ValueError,
        f"{Q} is a matrix of zeros",
    ),
    (lambda: Penalty("l1", 1.0), ValueError, "kind='l1': choose from 'power', 'smooth_l0'"),  # type: ignore[arg-type]
    (lambda: Reconstruction(torch.zeros(1, 2, 3), "l2"), ValueError, "kind='l2' .*: choose from 'kl', 'mse'"),  # type: ignore[arg-type]
    (lambda: apd(model, anything, SPDConfig()), TypeError, "A SPDConfig came where APDConfig is needed"),  # type: ignore[arg-type]
    (lambda: spd(model, anything, APDConfig()), TypeError, "A APDConfig came where SPDConfig is needed"),  # type: ignore[arg-type]
    (lambda: toys.Grammar(d_model=1), ValueError, "n_heads=4 is above d_model=1: give fewer heads"),
    (lambda: toys.Induction(d_model=2, n_heads=3), ValueError, "n_heads=3 is above d_model=2: give fewer heads"),
    (lambda: toys.train(toys.TMS(5, 2), steps=1 << 62), ValueError, "steps=.*: give an integer from 0 to 16777216"),
    (lambda: evaluation.decompose_at_sizes(model, tokens, None), TypeError, "config=None is a NoneType"),
    (lambda: toys.recipe("tms", "vpd"), KeyError, "There is no toy 'tms'"),
    (lambda: toys.recipe("tms_5_2", "vdp"), KeyError, "did you mean 'vpd'"),
    (lambda: planning.footprint(model, context=8), TypeError, "give Target.of"),  # type: ignore[arg-type]
    (
        lambda: TransformerShape(layers=1, d_model=8, heads=3, d_mlp=8, vocabulary=8),
        ValueError,
        "heads must divide d_model=8",
    ),
    (lambda: viz.graph(harvest), TypeError, "is a Harvest: give an AttributionGraph"),  # type: ignore[arg-type]
    (lambda: viz.pair_attention(terms, row=1), IndexError, "There is no row 1"),
    (lambda: viz.pair_attention(terms, heads=[2]), IndexError, r"heads=\[2\]: the layer has heads 0 to 1"),
    (lambda: viz.pair_attention(static), TypeError, "is a StaticStrengths: give a ScoreTerms"),  # type: ignore[arg-type]
    (lambda: viz.static_strengths(static, []), ValueError, "name at least one pair"),
    (lambda: analysis.harvest(model, vpd, tokens), TypeError, "decomposition=.*give a Decomposition"),  # type: ignore[arg-type]
    (lambda: attention.head_norms(model, 1), TypeError, "decomposition=.*give a Decomposition"),  # type: ignore[arg-type]
    (lambda: analysis.ablation_table(vpd, model, prompt, 3), TypeError, "metric=3 is a int: give a function"),  # type: ignore[arg-type]
    (lambda: analysis.audit_circuit(vpd, model, prompt, [f"{Q}:1"], 3), TypeError, "metric=3 is a int: give a"),  # type: ignore[arg-type]
    (
        lambda: analysis.audit_circuit(vpd, model, prompt, [f"{Q}:1"], metric, reference_prompts=[]),
        ValueError,
        "^reference_prompts: ",
    ),
    (lambda: evaluation.union_test(3), TypeError, "sample=3 is a int: give a Sample"),  # type: ignore[arg-type]
    (lambda: evaluation.warnings_of(3), TypeError, "record is a int: give an Evaluation"),
    (lambda: tl_vpd.evaluate(vpd, model, tokens, off_distribution=[]), TypeError, "off_distribution is a list"),  # type: ignore[arg-type]
    (lambda: viz.table(harvest.to_pandas(), None), TypeError, "caption=None is a NoneType: give a string"),  # type: ignore[arg-type]
    (lambda: viz.losses([1.0]), TypeError, "is a list: give a DataFrame"),  # type: ignore[arg-type]
    (lambda: viz.evaluation_page({}, "page.html"), TypeError, "is a dict: give an Evaluation"),  # type: ignore[arg-type]
]


def of_results() -> Iterator[Call]:
    """Counts, indices and seeds that are none."""
    for count in COUNTS.values():
        for value in [*INTEGERS, -1]:
            yield partial(count, value), SENTENCE, ""


def of_configs() -> Iterator[Call]:
    """Fields of configs with values of other types, or out of range."""
    for config in CONFIGS.values():
        for field in fields(config.func if isinstance(config, partial) else config):  # type: ignore[arg-type]
            values = BAD.get(field.type.removesuffix(" | None"), [])
            for value in [*values, *([None] if field.type in BAD else [])]:
                message = "" if value is None else rf"^{field.name}\b|^'nothing'|starts"
                yield partial(config, **{field.name: value}), SENTENCE, message


if __name__ == "__main__":
    for calls in (CALLS, of_results(), of_configs()):
        check(list(calls), model)
