"""``viz.dashboard``: writes the pages.

    folder/index.html            all subcomponents and components, with search and sorting
    folder/subcomponent.html     one of them, as subcomponent.html#blocks.1.mlp.W_in:12
    folder/component.html        one component, as component.html#3
    folder/prompts.html          prompts token by token, as prompts.html#0
    folder/data/*.js             what the pages read: one list, and for every site files of a few hundred subcomponents

The pages share one script, which reads only the data of what is looked at. Pages opened from a disk may not fetch files, but may
run scripts: data are scripts that hand one value to ``tlVpd.put``. The pages' policy admits their script and what it loads.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_vpd.adapters import adapt
from tl_vpd.analysis import Harvest, logit_effects
from tl_vpd.checks import config_of, instance, path_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.importance_statistics import ALIVE
from tl_vpd.files.atomic import new_folder, write_text
from tl_vpd.forward.target_check import check_target
from tl_vpd.viz.dashboard.config import DashboardConfig
from tl_vpd.viz.dashboard.data import DashboardData
from tl_vpd.viz.dashboard.edges import NO_EDGES, Ends, component_edges_of, edges_of
from tl_vpd.viz.dashboard.heads import heads_of
from tl_vpd.viz.dashboard.labels import Scores, labels_and_scores
from tl_vpd.viz.dashboard.prompts import prompt_records
from tl_vpd.viz.dashboard.records import Records, short
from tl_vpd.viz.text import escape, for_script, label

SHARD = 200
"""Subcomponents of a file."""
PAGES = ("index", "subcomponent", "component", "prompts")


def dashboard(
    decomposition: Decomposition,
    model: nn.Module,
    harvested: Harvest,
    folder: str | os.PathLike[str],
    *,
    data: DashboardData | None = None,
    config: DashboardConfig | None = None,
) -> Path:
    """Writes a folder of pages about every harvested subcomponent; ``index.html`` opens from the disk, without any network.

    A harvest with ``samples``, ``bins`` and ``lags`` shows random firings, histograms and neighbours.

    Args:
        decomposition: of the model's weights.
        model: the target, for logits, heads and prompts.
        harvested: what is shown.
        folder: does not exist, or is empty.
        data: components, labels, edges, ablations and prompts (None: there are none).
        config: how much is shown (None: the defaults).

    Returns:
        The path of the first page.

    Raises:
        FileExistsError: there is something in the folder.
        ValueError: the harvest, the clustering or the graph is of another decomposition, or the decomposition of another model;
            or the prompts are not this model's.
        KeyError: a label's subcomponent was not harvested.
        TypeError: an argument is of another type.
        OSError: the folder cannot be written; it is not there then.
    """
    config, data, place = config_of(DashboardConfig, config), config_of(DashboardData, data), path_of("folder", folder)
    instance("decomposition", decomposition, Decomposition)
    adapter = adapt(model)
    check_target(decomposition, adapter, check_weights=True)
    instance("harvested", harvested, Harvest)
    _check_harvest(harvested, decomposition)
    data.check(decomposition)
    effects = None
    if adapter.unembedding() is not None:
        effects = logit_effects(decomposition, model, k=config.logits)
    passed = heads_of(decomposition, adapter, config.heads)
    records = Records(decomposition, harvested, effects, passed, config)
    texts, scores = _texts_and_scores(data, records)
    with new_folder(place) as written:
        (written / "data").mkdir()
        files = _write_shards(written / "data", records, edges_of(data.graph, records.places, config.edges))
        titles = []
        prompts = () if data.prompts is None else prompt_records(decomposition, model, data.prompts, records)
        for i, record in enumerate(prompts):
            _write_data(written / "data", f"prompt-{i}", record)
            titles.append("".join(records.tokens.texts[t] for t in record["tokens"][:16]))
        index = _index(records, files, data, texts, scores) | {"prompts": titles}
        _write_data(written / "data", "index", index)
        for page in PAGES:
            write_text(written / f"{page}.html", _page(page, config.title))
    return place / "index.html"


@torch.no_grad()
def _check_harvest(harvested: Harvest, decomposition: Decomposition) -> None:
    """Raises ValueError unless a harvest is of this decomposition."""
    if harvested.site_axis.counts != decomposition.counts:
        raise ValueError("The harvest is of a decomposition with other sites or numbers of subcomponents.")
    norms = [decomposition.V[s].norm(dim=0) * decomposition.U[s].norm(dim=-1) for s in decomposition.sites]
    norm = torch.cat(norms).cpu().double()[harvested.chosen.cpu()]
    if not torch.allclose(harvested.norm.cpu().double(), norm, rtol=1e-2):
        raise ValueError("The harvest is of another decomposition, whose subcomponents have other norms.")


def _texts_and_scores(data: DashboardData, records: Records) -> tuple[dict[str, str], Scores]:
    """Labels by address, and numbers by name and address: of the labels' table and of ablations."""
    components = [component.address for component in data.clustering or ()]
    texts, scores = labels_and_scores(data.labels, {**records.places, **dict.fromkeys(components)})
    if data.ablations is not None:
        changes = data.ablations[["subcomponent", "change"]].rename(columns={"change": "ablation"})
        scores |= labels_and_scores(changes[changes["subcomponent"].isin(records.places)], records.places)[1]
    return texts, scores


def _write_shards(folder: Path, records: Records, edges: Mapping[str, Ends]) -> dict[str, str]:
    """Writes all subcomponents; the beginning of the files' names by site."""
    files: dict[str, str] = {}
    shards: dict[str, dict[int, Any]] = {}
    for address in records.places:
        site, _, index = address.rpartition(":")
        file = files.setdefault(site, f"site-{len(files)}")
        name = f"{file}-{int(index) // SHARD}"
        if name not in shards:
            _flush(folder, shards)
        shards.setdefault(name, {})[int(index)] = records.of(address) | edges.get(address, NO_EDGES)
    _flush(folder, shards)
    return files


def _flush(folder: Path, shards: dict[str, dict[int, Any]]) -> None:
    for name, shard in shards.items():
        _write_data(folder, name, shard)
    shards.clear()


def _write_data(folder: Path, name: str, value: Any) -> None:
    text = for_script(value, compact=True)
    write_text(folder / f"{name}.js", f'tlVpd.put("{name}", {text});\n')


def _index(
    records: Records,
    files: Mapping[str, str],
    data: DashboardData,
    texts: Mapping[str, str],
    scores: Mapping[str, Mapping[str, float | None]],
) -> dict[str, Any]:
    """What all pages know: one column per number, in the order of the harvest."""
    harvested, sites = records.harvested, list(files)
    addresses = [address.rpartition(":") for address in records.places]
    components: list[dict[str, Any]] = []
    component_of: dict[int, int] = {}
    edges = component_edges_of(data.graph, data.clustering, records.config.edges)
    for component in data.clustering or ():
        members = [records.places[str(m)] for m in component.members if str(m) in records.places]
        component_of |= dict.fromkeys(members, component.number)
        named = [texts[str(m)] for m in component.members if str(m) in texts]
        about = texts.get(component.address) or "; ".join(dict.fromkeys(named[:3]))
        shown = {"members": members, "density": short(component.density), "label": about}
        components.append(shown | edges.get(component.number, NO_EDGES))
    mean = harvested.mean_importance.tolist()
    alive = sum((short(value) or 0.0) > ALIVE for value in mean)  # as the pages count them
    return {
        "title": label(records.config.title),
        "about": f"{len(harvested):,} subcomponents of {len(sites)} sites, {alive:,} of them important somewhere on "
        f"{harvested.n:,} tokens. Importance at a token says whether the piece of a weight is needed there: 1 that it is, 0 "
        "that it can be removed. Density: the fraction of tokens at which importance is above 0."
        + (" Ablation: how the metric changes where it alone is ablated." if data.ablations is not None else ""),
        "alive": ALIVE,
        "threshold": harvested.threshold,
        "shard": SHARD,
        "sites": sites,
        "files": [files[site] for site in sites],
        "tokens": records.tokens.texts,
        "site": [sites.index(site) for site, _, _ in addresses],
        "index": [int(index) for _, _, index in addresses],
        "mean": [short(value) for value in mean],
        "density": [short(value) for value in harvested.density.tolist()],
        "firings": harvested.firings.tolist(),
        "labels": {records.places[a]: text for a, text in texts.items() if a in records.places},
        "scores": {label(name): [column.get(a) for a in records.places] for name, column in scores.items()},
        "component": [component_of.get(i) for i in range(len(addresses))],
        "components": components,
    }


def _page(name: str, title: str) -> str:
    """One of the pages."""
    here = Path(__file__).parent
    script, style = ((here / f"dashboard.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    policy = (
        f"default-src 'none'; script-src {_hash(script)} 'strict-dynamic'; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{style}</style><script>{script}</script></head>\n"
        f'<body data-page="{name}"><main><noscript>These pages need JavaScript.</noscript></main>'
        '<p id="readout" role="status"></p></body></html>\n'
    )


def _hash(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
