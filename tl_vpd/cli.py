"""The command line: ``tl-vpd train``, ``plan``, ``eval``, ``feature-splitting``, ``import``, ``compact``, ``dashboard``,
``label``, ``card``, ``push``, ``demo`` and ``fact``.

Errors are one line that says what to do (with ``TL_VPD_TRACEBACK=1`` in the environment, Python's traceback). Exit codes:

====  ================================================================================================================
0     done
1     an error of the program or of a library
2     a mistake, a file that is missing or damaged, a full disk, a folder in use; files from before are intact
130   interrupted; ``train`` has saved, and continues with ``--resume``
====  ================================================================================================================

Under ``torchrun`` the first process prints for all; the others are silent, except for errors that the system raises in them
alone::

    torchrun --nproc-per-node 2 -m tl_vpd.cli train recipe.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_vpd import publish_commands, reading_commands
from tl_vpd.console import (
    DecompositionName,
    Device,
    Key,
    ModelKind,
    ModelName,
    Tokens,
    Trust,
    app,
    command,
    named,
    say,
)


@app.command()
@command
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, data, vpd or targeted, execution, saving.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in saving.folder.")] = False,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Rows run at once, to save memory.")] = None,
    sharding: Annotated[str | None, typer.Option(help="Under torchrun: none, optimizer or full.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a row.")] = None,
    keep_states: Annotated[int | None, typer.Option(min=1, help="The newest states that stay on the disk.")] = None,
    from_state: Annotated[
        Path | None, typer.Option(help="Continue from this file of saving.folder/state; later states are removed.")
    ] = None,
    from_decomposition: Annotated[
        Path | None, typer.Option(help="Start a new run from V, U and Γ of this decomposition.")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Train a decomposition as a recipe says; options overrule it."""
    from tl_vpd.decomposition import Decomposition
    from tl_vpd.recipe import Recipe
    from tl_vpd.training.memory import keep_freed_memory

    keep_freed_memory()
    settings = Recipe.read(recipe).changed(
        execution={"micro_batch": micro_batch, "sharding": sharding},
        data={"context": context},
        saving={"keep_states": keep_states},
    )
    if from_decomposition is not None and (resume or from_state):
        raise ValueError("--from-decomposition starts a new run: leave out --resume and --from-state.")
    start = None if from_decomposition is None else Decomposition.load(from_decomposition)
    if settings.train(resume=start or from_state or resume, trust_remote_code=trust_remote_code).finished:
        say(f"Finished: {settings.saving.folder}/decomposition")
    else:
        say(f"Stopped and saved; continue with the same command and --resume: tl-vpd train {recipe} --resume")
        raise typer.Exit(130)


@app.command()
@command
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file; without one, give the model's numbers.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks of the model.")] = None,
    d_model: Annotated[int | None, typer.Option(min=1, help="Width of the residual stream.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads of a block.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads (default: as many).")] = None,
    d_mlp: Annotated[int | None, typer.Option(min=1, help="MLP width.")] = None,
    gated: Annotated[bool, typer.Option("--gated", help="The MLP has a gate.")] = False,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="Tokens of the vocabulary.")] = None,
    itemsize: Annotated[int | None, typer.Option(min=1, help="Bytes of a number in the model (default: 4).")] = None,
    c: Annotated[int | None, typer.Option("--C", min=1, help="Subcomponents per site (default: the recipe's).")] = None,
    d_ci: Annotated[int | None, typer.Option(min=1, help="Width of Γ.")] = None,
    n_blocks: Annotated[int | None, typer.Option(min=1, help="Depth of Γ.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a batch.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a row.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Rows run at once.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that split the batch.")] = 1,
    sharding: Annotated[str | None, typer.Option(help="none, optimizer or full.")] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0, help="10^12 FLOP of another device per second (default: timed here).")
    ] = None,
    limit: Annotated[float, typer.Option(min=0, help="Seconds that timing a step may take; 0 for none.")] = 60.0,
    trust_remote_code: Trust = False,
) -> None:
    """Memory and time of a run, for one of its processes, before anything is trained, and what to change if it is too large."""
    from tl_vpd.recipe.recipe import recipe_and_shape

    numbers = {"layers": layers, "d_model": d_model, "heads": heads, "kv_heads": kv_heads, "d_mlp": d_mlp}
    numbers |= {"gated": gated or None, "vocabulary": vocabulary, "itemsize": itemsize}
    settings, shape = recipe_and_shape(recipe, numbers)
    settings = settings.changed(
        vpd={"C": c, "batch_size": batch_size, "gamma": {"d_ci": d_ci, "n_blocks": n_blocks}},
        execution={"micro_batch": micro_batch, "sharding": sharding},
        data={"context": context},
    )
    options = {"processes": processes, "tflops": tflops, "limit": limit, "trust_remote_code": trust_remote_code}
    say(*settings.plan(shape, **options))  # type: ignore[arg-type]


@app.command("eval")
@command
def evaluate_command(
    decomposition: DecompositionName,
    model: ModelName = "bundled",
    kind: ModelKind = None,
    device: Device = "cpu",
    tokens: Tokens = "bundled",
    key: Key = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of tokens to use.")] = 64,
    measures: Annotated[str, typer.Option(help="In addition to mode table and counts: all, none, or names.")] = "all",
    budgets: Annotated[str, typer.Option(help="Steps of attacks with commas, '' for none, or ladder.")] = "20,60",
    starts: Annotated[int, typer.Option(min=1, help="Random starts of the standard adversary; the worst counts.")] = 1,
    attack_rows: Annotated[int, typer.Option(min=0, help="Rows that are attacked; 0 for all.")] = 8,
    controls: Annotated[bool, typer.Option(help="Also measure random, singular, shuffled and untrained.")] = True,
    off_distribution: Annotated[list[str] | None, typer.Option(help="Other text: NAME=FILES, as --tokens.")] = None,
    others: Annotated[list[str] | None, typer.Option(help="Another seed or C: NAME=FOLDER.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows run at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the report, metrics.json.")] = None,
    html: Annotated[Path | None, typer.Option(help="File for the report as one page.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Evaluate a decomposition: its faults, mask modes, adversaries, union test, transfer, controls."""
    from tl_vpd import bundled, viz
    from tl_vpd.evaluation import EvaluationConfig
    from tl_vpd.recipe import evaluating

    evaluating.check_writable(out, html)
    steps, others_steps = evaluating.budgets_of(budgets)
    config = EvaluationConfig(
        measures=evaluating.measures_of(measures),
        budgets=steps,
        starts=starts,
        adversary_budgets=others_steps,
        attack_rows=attack_rows or None,
        controls=controls,
        control_budgets=steps[:1],
        batch_size=batch_size,
        seed=seed,
        curve=bundled.training_record()["curve"] if model == "bundled" else None,
    )
    result = evaluating.evaluate_by_name(
        named(decomposition, model, kind, device, tokens, key, rows, trust_remote_code),
        config,
        off_distribution=evaluating.by_name("--off-distribution", off_distribution),
        others=evaluating.by_name("--others", others),
    )
    if out is not None:
        result.save(out)
    if html is not None:
        viz.evaluation_page(result, html, title=f"Evaluation of {decomposition}")
    say(*evaluating.evaluation_lines(result), *(f"Written: {path}" for path in (out, html) if path is not None))


@app.command("feature-splitting")
@command
def feature_splitting_command(
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, data, vpd, execution, saving.")],
    factors: Annotated[str, typer.Option(help="Times the recipe's C, with commas.")] = "0.5,1,2,4",
    rows: Annotated[
        int, typer.Option(min=1, help="Rows that are measured: of validation, or the recipe's first.")
    ] = 64,
    out: Annotated[Path | None, typer.Option(help="File for the table (.csv).")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Train decompositions with fewer and more subcomponents, and count how many of each are alive."""
    from tl_vpd.files.atomic import write_text
    from tl_vpd.recipe import Recipe
    from tl_vpd.recipe.evaluating import check_writable, numbers

    check_writable(out)
    settings, sizes = Recipe.read(recipe), numbers("--factors", factors, float)
    table = settings.feature_splitting(sizes, rows=rows, trust_remote_code=trust_remote_code)
    say(table.round(4).to_string())
    if out is not None:
        write_text(out, table.to_csv())


@app.command("import")
@command
def import_command(
    run: Annotated[str, typer.Argument(help="Folder or checkpoint of the authors' code, or the id of a W&B run.")],
    out: Annotated[Path, typer.Option(help="New folder of the decomposition; its model goes to 'model' in it.")],
    target: Annotated[str | None, typer.Option(help="The target's folder or W&B run, where it is not found.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...: that the certificate is measured on.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16: of both as stored.")] = "float32",
    tokens: Annotated[Path | None, typer.Option(help=".npy or .safetensors file of rows for the certificate.")] = None,
    key: Annotated[str, typer.Option(help="Tensor of a .safetensors file.")] = "tokens",
    rows: Annotated[int, typer.Option(min=1, help="Rows of --tokens to use.")] = 8,
    check_order: Annotated[bool, typer.Option(help="Stop if importances look like a wrong order.")] = True,
) -> None:
    """Import a released run: the decomposition, its model, and a certificate of what was measured."""
    import torch

    from tl_vpd.checks import choice
    from tl_vpd.formats.param_decomp import import_run
    from tl_vpd.recipe.data import first_stored_rows

    certificate = import_run(
        run,
        out,
        device=device,
        dtype=getattr(torch, choice("--dtype", dtype, ("float32", "float64", "bfloat16", "float16"))),
        target=target,
        tokens=None if tokens is None else first_stored_rows(tokens, key, rows),
        check_order=check_order,
    )
    say(certificate.to_pandas().to_string(index=False), f"Written: {out} and {out / 'model'}")


@app.command("compact")
@command
def compact_command(
    decomposition: DecompositionName,
    out: Annotated[Path, typer.Option(help="New folder of the smaller decomposition.")],
    model: ModelName = "bundled",
    kind: ModelKind = None,
    device: Device = "cpu",
    tokens: Tokens = "bundled",
    key: Key = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of tokens: what is important on none of them goes.")] = 512,
    threshold: Annotated[float, typer.Option(help="The largest importance at which a subcomponent goes.")] = 0.0,
    trust_remote_code: Trust = False,
) -> None:
    """Leave out the subcomponents that are never important: a smaller decomposition, in a new folder."""
    from tl_vpd.recipe.compacting import compact_by_name

    what = named(decomposition, model, kind, device, tokens, key, rows, trust_remote_code)
    counts = compact_by_name(what, out, threshold=threshold)
    say(counts.to_string(), f"{counts.before.sum()} -> {counts.after.sum()} subcomponents.  Written: {out}")


app.command()(reading_commands.dashboard)
app.command()(reading_commands.label)
app.command()(publish_commands.card)
app.command()(publish_commands.push)


@app.command()
@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the page, the metrics and the decomposition.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of the short decomposition.")] = 300,
) -> None:
    """A tour in a few minutes: the bundled model decomposed, checked, trained again for a while, and a page to look at."""
    from tl_vpd.demo import run_demo

    run_demo(out, steps=steps, say=say)


@app.command()
@command
def fact(
    out: Annotated[Path, typer.Option(help="Folder of the page, the figures, the decomposition and the runs.")] = Path(
        "fact"
    ),
    finished: Annotated[bool, typer.Option("--finished", help="Take the decomposition that ships.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the run.")] = 220,
    seed: Annotated[int, typer.Option(min=0, help="Of the run.")] = 0,
) -> None:
    """A fact of SmolLM2-135M decomposed, erased and rewired (extra ``real``), and a page to look at."""
    from tl_vpd.fact import run_fact

    run_fact(out, finished=finished, resume=resume, steps=steps, seed=seed, say=say)


if __name__ == "__main__":
    app()
