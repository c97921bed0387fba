"""The attribution graph of a prompt.

A node is a subcomponent at a position with importance g above a threshold, the embedding at a position, or a logit. Edge

    c' → c  =  (∂a_c / ∂a_c')* · a_c' · g_c'

where * means that gradients are stopped at every other subcomponent's inner activation (VPD paper, section on attribution
graphs; ``direct`` says how). An embedding's edge sums gradient × embedding over dimensions. Δ and biases are not nodes.

    >>> graph = attribution_graph(vpd, model, "def f(x", targets=[")"])        # doctest: +SKIP
    >>> graph.top_edges(10)                                                    # doctest: +SKIP

With ``GraphConfig(fixed=("norms", "deltas"), importances=False)`` every edge into a logit, or into Q, K, V, gate or in, is a term
of a sum: edges, Δs' outputs and biases add up to the target's value (with ``"patterns"`` also into O).
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_vpd.analysis.graph.candidates import Candidates
from tl_vpd.analysis.graph.config import GraphConfig
from tl_vpd.analysis.graph.direct import DirectModel
from tl_vpd.analysis.graph.edges import Edges
from tl_vpd.analysis.graph.result import AttributionGraph
from tl_vpd.analysis.graph.rows import groups
from tl_vpd.analysis.graph.targets import logit_targets
from tl_vpd.analysis.harvest.rows import check_are_tokens
from tl_vpd.checks import config_of
from tl_vpd.decomposition import Decomposition


def attribution_graph(
    decomposition: Decomposition,
    model: nn.Module,
    prompt: Any,
    targets: Any = None,
    *,
    pos: int = -1,
    config: GraphConfig | None = None,
) -> AttributionGraph:
    """The graph of one prompt, on the model's device and in its dtype.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompt: a string, or tokens ``[pos]`` or ``[1, pos]``.
        targets: which logits to explain (``graph.targets`` has the table): ``[">"]``, ``(">", ")")``, ``0.05``; None: every token
            of probability 0.05 or more.
        pos: the position of the logits.
        config: nodes, edges, what is fixed, and memory (None: the defaults).

    Raises:
        ValueError: there are several prompts, padding, or nothing to explain; attention runs head by head; or the model has
            other weights.
        KeyError: a token's text is unknown.
        IndexError: the position or a token does not exist.
        TypeError: the position or a target is something else.
        Unsupported: what is to be fixed cannot be on this model.
    """
    config = config_of(GraphConfig, config)
    with DirectModel(decomposition, model, fixed=config.fixed) as direct:
        tokens = _one_prompt(direct, prompt)
        logits, inputs = direct.clean(tokens)
        g = decomposition.importances(inputs)[0].detach()
        logit_nodes = logit_targets(direct.adapter, logits[0], targets, pos)
        threshold = config.threshold if config.importances else None
        nodes = Candidates(direct, tokens, inputs, g.to(logits), logit_nodes, logits[0], threshold)
        edges = Edges(direct, nodes, tokens, config)
        batches = groups(
            nodes.blocks(inputs), direct.names, tokens.shape[1], config.tokens_at_once, causal=direct.adapter.causal
        )
        rows = sum(len(block.seeds) for group in batches for block in group.blocks)
        with tqdm(total=rows, disable=not config.progress, desc="gradients") as bar:
            for group in batches:
                edges.add_group(group, bar)
        edges.add_logits(max(1, config.tokens_at_once // tokens.shape[1]))
        return edges.graph()


def _one_prompt(direct: DirectModel, prompt: Any) -> Int[Tensor, "1 pos"]:
    """The prompt as tokens; raises ValueError unless it is one, without padding."""
    tokens = direct.adapter.tokens(prompt)
    check_are_tokens(tokens, "A graph")
    if len(tokens) != 1:
        raise ValueError(f"A graph is of one prompt, and there are {len(tokens)}: use dataset_graph for many.")
    if direct.adapter.padding(tokens, None) is not None:
        raise ValueError("The prompt is padded: give it without its padding.")
    return tokens
