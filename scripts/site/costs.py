"""The tables of docs/performance.md: what steps, hooks and modes cost, from results files."""

from __future__ import annotations

from collections.abc import Mapping

from scripts.site.first_hour import share_of
from scripts.site.tables import Record, Rows

VARIANTS = {
    "paper": "the paper's",
    "merged": "merged",
    "bfloat16": "the paper's, bfloat16",
    "compiled": "the paper's, compiled",
    "compiled_merged": "merged, compiled",
    "compiled_bfloat16": "the paper's, compiled, bfloat16",
    "compiled_merged_bfloat16": "merged, compiled, bfloat16",
}
"""Variants of a step, and their names on the page."""
STEP = {
    "trainer, s": "{trainer_s:.3f}",
    "one page, s": "{reference_s:.3f}",
    "one page / trainer": "{ratio:.2f}",
    "floor / trainer": "{floor_share:.0%}",
    "peak, MB": "{peak_mb:,.0f}",
    "one page, MB": "{reference_peak_mb:,.0f}",
}
FIRST = {
    "first step, s of processor": "{first_step_cpu_s:.0f}",
    "from the cache": "{cached_first_step_cpu_s:.0f}",
    "peak, MB": "{peak_mb:,.0f}",
    "then, MB": "{settled_mb:,.0f}",
    "peak from the cache, MB": "{cached_peak_mb:,.0f}",
    "then, from the cache, MB": "{cached_settled_mb:,.0f}",
}
GROWTH = {
    "seconds": "{seconds:.2f}",
    "GFLOP (predicted)": "{predicted_gflop:.1f}",
    "peak MB": "{peak_mb:.0f}",
    "MB (predicted)": "{predicted_mb:.0f}",
}
HOOKS = {
    "idle": "attached, nothing listens",
    "read_one_site": "one site's activations cached",
    "read_one_site_product_only": "the model, and that product",
    "ablate_8": "eight subcomponents of a site ablated",
    "ablate_8_sites": "one of each of eight sites ablated",
    "all_masked": "every site under masks that are there already",
    "all_masked_products_only": "the model, and the two products of every site",
}
MODES = {
    "model": "the model",
    "gamma": "Γ",
    "products": "`(x @ V) @ U` of every site",
    "rounded": '`masked("rounded")`',
    "masks": "every site under masks that are there already",
    "importances": "`causal_importances`",
    "attach_first": "`attach`, weights that are new",
    "attach": "`attach`, weights that are known",
    "after_attach": "the first forward pass after it",
}
BESIDE = {"default": "spin (default)", "passive": "sleep (`PASSIVE`)"}


def step(record: Record) -> Rows:
    """Steps by size and variant, beside the method on one page; columns that no run has are left out."""
    by_size = {size: {"paper": record[size], **_variants(record, size)} for size in ("S", "M") if size in record}
    rows = []
    for size, figures in by_size.items():
        for which, text in VARIANTS.items():
            if "trainer_s" in figures.get(which, {}):
                cells = _cells(figures[which], STEP)
                if "merged" in which:  # the floor is of the paper's products
                    cells["floor / trainer"] = ""
                rows.append({"size": size, "recipe": text, **cells})
    return [{title: row[title] for title in row if any(other[title] for other in rows)} for row in rows]


def first_step(record: Record) -> Rows:
    """A compiled run's first step and memory, with PyTorch's cache empty and full, beside an uncompiled one."""
    figures = {"uncompiled": record["S"], **{VARIANTS[w]: f for w, f in _variants(record, "S").items()}}
    return [{"S": text, **_cells(row, FIRST)} for text, row in figures.items()]


def growth(record: Record) -> Rows:
    """Steps of a base size with one number changed at a time."""
    groups = ((what, values) for what, values in record.items() if what != "settings")
    return [{"": f"{what} {value}", **_cells(row, GROWTH)} for what, values in groups for value, row in values.items()]


def hooks(record: Record) -> Rows:
    """Forward passes with a decomposition, over the plain model's."""
    return [
        {"": text, "HookedTransformer": f"{record[key]:.2f}", "TransformerBridge": f"{record['bridge'][key]:.2f}"}
        for key, text in HOOKS.items()
    ]


def modes(record: Record) -> Rows:
    """Seconds of masked modes at GPT-2 small's size, and what they are of what they consist of."""
    ratios = {
        "gamma": f"{record['gamma_over_floor']:.2f} times its products at this machine's rate",
        "rounded": f"{record['rounded_over_model_gamma_products']:.2f} times the sum of these three, "
        f"{record['rounded_over_model']:.1f} times the model",
        "masks": f"{record['masks_over_model_products']:.2f} times the model and the products",
        "importances": f"{record['seconds']['inputs']:.2f} of it the model",
    }
    return [
        {"": text, "seconds": f"{record['seconds'][key]:.2f}", "of these": ratios.get(key, "")}
        for key, text in MODES.items()
    ]


def neighbour(record: Record) -> Rows:
    """A step on two threads, alone and beside a process that occupies a core."""
    return [
        {
            "threads that wait": text,
            "alone, s": f"{record[key]['alone_s']:.3f}",
            "beside, s": f"{record[key]['beside_s']:.3f}",
            "ratio": f"{record[key]['ratio']:.2g}",
        }
        for key, text in BESIDE.items()
    ]


def throughput(record: Record) -> Rows:
    """Tokens per second of functions that read data, beside the passes that they cannot do without."""
    return [
        {
            "": f"`{name}`",
            "tokens per second of the processor": f"{row['tokens_per_cpu_second']:,}",
            "passes": share_of(row["share"]),
            "model and Γ alone": share_of(row["share_of_model_and_gamma"]),
        }
        for name, row in record.items()
        if name != "settings"
    ]


TABLES = (step, first_step, growth, hooks, modes, neighbour, throughput)
"""Each of the results file of its name."""


def _variants(record: Record, size: str) -> dict[str, dict[str, float]]:
    return {which: record[which][size] for which in VARIANTS if size in record.get(which, {})}


def _cells(figures: Mapping[str, float], columns: Mapping[str, str]) -> dict[str, str]:
    """Each column's text; empty where the figure was not measured."""
    return {title: _text(figures, template) for title, template in columns.items()}


def _text(figures: Mapping[str, float], template: str) -> str:
    try:
        return template.format_map(figures)
    except KeyError:
        return ""
