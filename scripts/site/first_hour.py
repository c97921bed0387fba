"""The tables of docs/your_own_model.md, from benchmarks/results/first_hour.json."""

from __future__ import annotations

from scripts.site.tables import Record, Rows

SIZES = {
    "toy": "toy (induction, 2 layers of 64), all",
    "block": "bundled (2 layers of 96), block 1",
    "bundled": "bundled, all",
    "defaults": "bundled, all, with `VPDConfig(batch_size=4)`",
    "smol": "SmolLM2-135M (30 layers of 576), block 29",
    "middle": "SmolLM2-135M, block 15",
}


def hour(record: Record) -> Rows:
    """Where the time of a first try goes."""
    run = record["runs"]["smol"]
    texts = {
        "read the model and the text": ("prepare", ""),
        "train": ("train", f"{run['cpu_seconds_of_training'] / 60:.0f} min"),
        "evaluate on 32 other rows": ("evaluate", ""),
    }
    clocks = {what: run["seconds"][key] for what, (key, _) in texts.items()}
    return [
        {
            "": what,
            "by the clock": f"{clock / 60:.0f} min" if clock >= 60 else f"{clock:.0f} s",
            "of the processor": texts[what][1],
        }
        for what, clock in clocks.items()
    ]


def sizes(record: Record) -> Rows:
    """First tries of several sizes."""
    rows = []
    for name, text in SIZES.items():
        run = record["runs"][name]
        config, seconds = run["config"], run["seconds"]["train"]
        rows.append(
            {
                "model, sites": text,
                "subcomponents": f"{run['subcomponents']:,}",
                "Γ": f"{config['gamma']['n_blocks']} × {config['gamma']['d_ci'] or 'default'}",
                "steps × rows": f"{config['steps']:,} × {config['batch_size']}",
                "clock, processor": f"{seconds / 60:.2g} min, {run['cpu_seconds_of_training'] / 60:.2g} min",
                "yardstick": f"{run['yardstick']:.2f}",
                "rounded": share_of(run["rounded_share"]),
                "attacked": share_of(run["attacked_share"]),
                "L0": f"{run['l0']:,.0f} ({share_of(run['l0'] / run['subcomponents'])})",
            }
        )
    return rows


def looks(record: Record) -> Rows:
    """What runs say of themselves: rounded masks as a share of the yardstick, and L0 as a share of all."""
    names = {"bundled": "good: bundled, all", "smol": "good: SmolLM2, block 29", "middle": "too little: block 15"}
    rows = []
    for name, text in {**names, "collapsed": "collapsed", "dense": "dense"}.items():
        checks = record["runs"][name]["checks"]
        cells = {}
        for progress, share, l0, total in zip(
            *(checks[key] for key in ("progress", "share", "l0", "total")), strict=True
        ):
            cells[f"{progress:.0%}"] = f"{share_of(share)}, {share_of(l0 / total)}"
        rows.append({"rounded, L0": text, **{look: cells[look] for look in ("1%", "3%", "10%", "20%", "100%")}})
    return rows


TABLES = (hour, sizes, looks)


def share_of(share: float) -> str:
    """In percent, with a digit behind the point where it is small."""
    return f"{share:.1%}" if share < 0.02 else f"{share:.0%}"
