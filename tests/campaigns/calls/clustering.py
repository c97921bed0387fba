"""Calls of ``tl_vpd.analysis.clustering``."""

from __future__ import annotations

from tests.campaigns.calls.analysis import config
from tests.campaigns.calls.kinds import (
    SEED,
    Kind,
    any_of,
    either,
    file_to_write,
    integer,
    number,
    only,
    path_to_read,
    plain,
    sequence,
)
from tests.campaigns.calls.world import Call, World, call
from tl_vpd import analysis


def calls(w: World) -> list[Call]:
    """The table."""
    patterns = analysis.importance_patterns(w.vpd, w.model, w.tokens)
    clustering, ci = analysis.cluster(w.vpd, w.model, patterns), w.importances
    saved = clustering.save(w.folder / "clustering.json")
    last = len(clustering) - 1
    prompts = {**w.target, "prompts": (w.tokens, any_of(only(patterns), w.of_prompts["prompts"][1]))}
    threshold: Kind = lambda v: None if number(0, 1)(v) and plain(v) > 0.9 else number(0, 1)(v)  # noqa: E731
    alphas = (0.5, number(0))
    return [
        call(
            lambda **o: analysis.importance_patterns(**o).important.toarray(),
            "analysis: importance_patterns",
            **w.of_prompts,
            threshold=(0.25, threshold),
            batch_size=(2, integer(1)),
        ),
        call(
            analysis.ClusterConfig,
            alpha=alphas,
            threshold=(0.25, number(0, 1)),
            greed=(0.5, number(above=0)),
            seed=(3, SEED),
            lags=(2, integer(0, 64)),
            batch_size=(2, integer(1)),
        ),
        call(clustering[0].nodes, "analysis: Component.nodes", pos=(1, integer(0))),
        call(
            lambda **o: analysis.cluster(**o).partition,
            "analysis: cluster",
            **prompts,
            config=config(analysis.ClusterConfig),
        ),
        call(
            lambda **o: analysis.cluster_ensemble(**o).to_pandas(),
            "analysis: cluster_ensemble",
            **prompts,
            alphas=([0.5], either(sequence(number(0)))),
            seeds=([3], either(sequence(SEED))),
            config=config(analysis.ClusterConfig),
        ),
        call(analysis.component_edges, graph=(w.graph, only(w.graph)), clustering=(clustering, only(clustering))),
        call(clustering.__getitem__, "analysis: Clustering[index]", index=(0, integer(-last - 1, last))),
        call(
            lambda merges: len(clustering.at(merges)),
            "analysis: Clustering.at",
            merges=(1, integer(0, len(clustering.chosen) - 1)),
        ),
        call(clustering.top, k=(2, integer(1))),
        call(clustering.importances, ci=(ci, only(ci))),
        call(clustering.save, path=(w.folder / "new_clustering.json", file_to_write)),
        call(
            lambda **o: analysis.Clustering.load(**o).partition,
            "analysis: Clustering.load",
            path=(saved, path_to_read(saved)),
            decomposition=(w.vpd, only(w.vpd)),
        ),
    ]
