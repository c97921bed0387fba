"""A method's result on a toy next to the truth: cosines of pieces with features (in two dimensions the vectors themselves), and
where in a row each site of a known circuit is needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.checks import integer
from tl_vpd.evaluation import ALIVE
from tl_vpd.evaluation.ground_truth import MethodResult
from tl_vpd.evaluation.truth import Truth
from tl_vpd.viz.style import AMBER, SERIES


@torch.no_grad()
def ground_truth(result: MethodResult, model: nn.Module, inputs: Shaped[Tensor, "rows pos ..."], truth: Truth) -> Any:
    """A matplotlib figure with a panel for each site that has one subcomponent per feature.

    In two dimensions: what the weight does with each feature (grey) and what each alive piece does with the feature that it is
    matched to (coloured arrows). In more: the cosine of every feature with every alive piece, matched ones on the diagonal; a
    piece that serves two features shows twice in its column, a feature that was split twice in its row.

    Args:
        result: of a method.
        model: the target.
        inputs: a sample of the model's data, from which follows what is alive.
        truth: about the model.

    Raises:
        ValueError: no site of the truth has one subcomponent per feature.
        ImportError: matplotlib is not installed.
    """
    sites = {name: known for name, known in truth.sites.items() if known.axis is not None}
    if not sites:
        raise ValueError(f"None of {', '.join(truth.sites) or 'no sites'} has one subcomponent per feature to show.")
    g = result.importances(inputs)
    figure = _figure(4.2 * len(sites), 4.0)
    for axes, (name, known) in zip(figure.subplots(1, len(sites), squeeze=False).flat, sites.items(), strict=True):
        true = known.effects(adapt(model).weight(name))
        pieces = known.effects(result.pieces(name)[g[name].mean((0, 1)) > ALIVE])
        cosines = F.normalize(true, dim=-1, eps=1e-30)[:, None] * F.normalize(pieces.transpose(0, 1), dim=-1, eps=1e-30)
        _arrows(axes, true, pieces, cosines.sum(-1)) if true.shape[-1] == 2 else _cosines(axes, cosines.sum(-1))
        axes.set_title(f"{name}: {pieces.shape[0]} alive of {known.count} true", fontsize=10)
    return figure


@torch.no_grad()
def needed(result: MethodResult, truth: Truth, *, row: int = 0) -> Any:
    """A matplotlib figure of one row of the probe: a line for each site with its largest importance per token, and a frame around
    the tokens where the site is needed.

    Args:
        result: of a method.
        truth: about the model.
        row: of the probe.

    Raises:
        ValueError: the truth does not say where any site is needed.
        IndexError: the probe has no such row.
        TypeError: the row is not an integer.
        ImportError: matplotlib is not installed.
    """
    if not truth.needed:
        raise ValueError("This truth does not say where any site is needed.")
    row = integer("row", row)
    if not 0 <= row < len(truth.probe):
        raise IndexError(f"row={row}: the probe has rows 0 to {len(truth.probe) - 1}.")
    g = result.importances(truth.probe[row : row + 1])
    shown = torch.stack([g[site][0].amax(-1) for site in truth.needed])
    n_sites, n_pos = shown.shape
    figure = _figure(2.2 + 0.24 * n_pos, 0.9 + 0.28 * n_sites)
    axes = figure.subplots()
    amber = "#" + bytes(int(part) for part in AMBER.split(",")).hex()
    colours = LinearSegmentedColormap.from_list("importance", ["#fff", amber])
    image = axes.imshow(shown.numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto")
    for line, where in enumerate(rows[row] for rows in truth.needed.values()):
        for pos in where.nonzero()[:, 0].tolist():
            corner = pos - 0.46, line - 0.42
            axes.add_patch(Rectangle(corner, 0.92, 0.84, fill=False, edgecolor="#1d2430", linewidth=1.3))
    tokens = truth.probe[row]
    labels = [str(token) for token in tokens.tolist()] if tokens.ndim == 1 else [str(i) for i in range(n_pos)]
    axes.set_xticks(range(n_pos), labels, fontsize=7)
    axes.set_yticks(range(n_sites), list(truth.needed), fontsize=8)
    axes.set(xlabel="token" if tokens.ndim == 1 else "position")
    figure.colorbar(image, ax=axes, label="largest importance")
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _matched(cosines: Float[Tensor, "feature n"]) -> dict[int, int]:
    """The piece of each feature under the matching with the largest sum of cosines; with too few pieces, some have none."""
    features, pieces = linear_sum_assignment(cosines.double().numpy(), maximize=True)
    return dict(zip(features.tolist(), pieces.tolist(), strict=True))


def _arrows(
    axes: Any,
    true: Float[Tensor, "feature 2"],
    pieces: Float[Tensor, "n feature 2"],
    cosines: Float[Tensor, "feature n"],
) -> None:
    matched = _matched(cosines)
    for j, (x, y) in enumerate(true.tolist()):
        axes.plot([0, x], [0, y], color="#b8b8b8", linewidth=6, solid_capstyle="butt")
        if j in matched:
            style = {
                "arrowstyle": "-|>",
                "color": SERIES[j % len(SERIES)],
                "linewidth": 1.8,
                "shrinkA": 0,
                "shrinkB": 0,
            }
            axes.annotate("", tuple(pieces[matched[j], j].tolist()), (0, 0), arrowprops=style)
        axes.annotate(f"feature {j}", (1.22 * x, 1.22 * y), ha="center", va="center", fontsize=8)
    reach = 1.45 * float(true.norm(dim=-1).max())
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="dimension 1", ylabel="dimension 2")


def _cosines(axes: Any, cosines: Float[Tensor, "feature n"]) -> None:
    matched = list(_matched(cosines).values())
    order = matched + [c for c in range(cosines.shape[1]) if c not in matched]
    image = axes.imshow(cosines[:, order].numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes.set(xlabel="alive piece", ylabel="feature")
    axes.figure.colorbar(image, ax=axes, label="cosine")
