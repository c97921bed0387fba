"""The command line: ``tl-vpd train``, ``tl-vpd plan``, ``tl-vpd eval``, ``tl-vpd demo``.

User mistakes end in one line that says what to do, and exit code 2; nothing is half done then. Under ``torchrun`` the first
process speaks for all; the others are silent, but for errors that the system raised in them alone::

    torchrun --nproc-per-node 2 -m tl_vpd.cli train recipe.yaml
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Take the weights of transformers apart (VPD).")
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, OSError, FloatingPointError) as error:
        if os.environ.get("TL_VPD_TRACEBACK"):
            raise
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        rank = _rank()
        if rank and getattr(error, "errno", None) is None:
            raise typer.Exit(2) from error
        if rank:
            err.print(f"Process {rank}: ", end="")
        err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        err.print(text, markup=False, highlight=False)
        raise typer.Exit(2) from error


def _rank() -> int:
    """Which of the processes of ``torchrun`` this is; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def _command(function: Callable[..., None]) -> Callable[..., None]:
    @wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> None:
        # TransformerLens 3 says at every model that HookedTransformer goes away in 4; users of the command cannot act on it.
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
        logging.basicConfig(level=logging.ERROR if _rank() else logging.INFO, format="%(message)s")
        with ExitStack() as silence:
            if _rank():
                nowhere = silence.enter_context(open(os.devnull, "w", encoding="utf-8"))
                silence.enter_context(redirect_stdout(nowhere))
                warnings.simplefilter("ignore")
            silence.enter_context(_plain_errors())
            function(*arguments, **keywords)

    return wrapped


@app.command()
@_command
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, data, vpd, execution, saving.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Rows run at once, to save memory.")] = None,
    sharding: Annotated[str | None, typer.Option(help="Under torchrun: none, optimizer or full.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a row.")] = None,
    keep_states: Annotated[int | None, typer.Option(min=1, help="The newest states that stay on the disk.")] = None,
) -> None:
    """Train a decomposition as a recipe says; options overrule it."""
    from tl_vpd.recipe import Recipe
    from tl_vpd.training import decompose
    from tl_vpd.training.memory import keep_freed_memory

    own = Recipe.read(recipe)
    keep_freed_memory()
    own = own.changed("execution", micro_batch=micro_batch, sharding=sharding)
    own = own.changed("data", context=context).changed("saving", keep_states=keep_states)
    if own.saving.folder is None:
        raise ValueError(f"{recipe}: saving.folder is missing; say where the decomposition goes.")
    model = own.model.load()
    tokens = own.data.load(model)
    run = decompose(
        model,
        tokens,
        own.vpd,
        execution=own.execution,
        saving=own.saving,
        resume=resume,
        context=own.data.context,
    )
    if run.finished:
        out.print(f"Finished: {own.saving.folder / 'decomposition'}", markup=False)
    else:
        out.print(f"Stopped and saved; go on with: tl-vpd train {recipe} --resume", markup=False)
        raise typer.Exit(130)


@app.command()
@_command
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file; without one, give the model's numbers.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks of the model.")] = None,
    d_model: Annotated[int | None, typer.Option(min=1, help="Width of the residual stream.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads of a block.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads (default: as many).")] = None,
    d_mlp: Annotated[int | None, typer.Option(min=1, help="MLP width.")] = None,
    gated: Annotated[bool, typer.Option("--gated", help="The MLP has a gate.")] = False,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="Tokens of the vocabulary.")] = None,
    itemsize: Annotated[int, typer.Option(min=1, help="Bytes of a number in the model (bfloat16: 2).")] = 4,
    c: Annotated[int | None, typer.Option("--C", min=1, help="Subcomponents a site (default: the recipe's).")] = None,
    d_ci: Annotated[int | None, typer.Option(min=1, help="Width of Γ.")] = None,
    n_blocks: Annotated[int | None, typer.Option(min=1, help="Depth of Γ.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a batch.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a row.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Rows run at once.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the batch.")] = 1,
    sharding: Annotated[str | None, typer.Option(help="none, optimizer or full.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0, help="What a device does a second: adds the time.")] = None,
) -> None:
    """Memory and matrix products of a run, for one of its processes, before anything is trained."""
    from tl_vpd.planning.footprint import Target, footprint, transformer
    from tl_vpd.recipe import Recipe

    own = Recipe() if recipe is None else Recipe.read(recipe)
    own = own.changed("execution", micro_batch=micro_batch, sharding=sharding)
    numbers = {"layers": layers, "d_model": d_model, "heads": heads, "d_mlp": d_mlp, "vocabulary": vocabulary}
    given = {name: value for name, value in numbers.items() if value is not None}
    more = {"kv_heads": kv_heads, "gated": gated or None, "itemsize": None if itemsize == 4 else itemsize}
    of_model = {**given, **{name: value for name, value in more.items() if value is not None}}
    if recipe is not None and of_model:
        raise ValueError(f"{recipe} says which model: leave out {_options(of_model)}.")
    if recipe is None and len(given) < len(numbers):
        missing = {name: None for name in numbers if name not in given}
        raise ValueError(f"Give a recipe, or the model's numbers too: {_options(missing)}.")
    if recipe is None:
        target = transformer(**given, kv_heads=kv_heads, gated=gated, itemsize=itemsize)
        length = 0
    else:
        model = own.model.load()
        target, length = Target.of(model), model.cfg.n_ctx
    context = context or own.data.context or length
    if not context:
        raise ValueError("Give --context: the tokens in a row.")
    gamma = {name: value for name, value in {"d_ci": d_ci, "n_blocks": n_blocks}.items() if value is not None}
    own = own.changed("vpd", C=c, batch_size=batch_size, gamma={**own.vpd.gamma.model_dump(), **gamma})
    found = footprint(target, own.vpd, context=context, execution=own.execution, processes=processes)
    for line in plan_lines(found, own.vpd.steps, tflops):
        out.print(line, markup=False, highlight=False)


def plan_lines(found: Any, steps: int, tflops: float | None) -> list[str]:
    """A footprint as a table and its counts, and the time at a rate."""
    table = found.table().round(3).astype(object)
    lines = [table.where(table.notna(), "").to_string(index=False)]
    lines.append(", ".join(f"{what}: {n:,}" for what, n in found.counts.items()))
    if tflops:
        seconds = found.step_flops / (tflops * 1e12)
        lines.append(
            f"at {tflops:g} TFLOP a second: {seconds:.3g} s a step, {seconds * steps / 3600:.3g} h for {steps:,}"
        )
    return lines


def _options(names: Any) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


@app.command("eval")
@_command
def evaluate_command(
    decomposition: Annotated[str, typer.Argument(help="Folder of a decomposition, or 'bundled'.")],
    model: Annotated[str, typer.Option(help="'bundled', or a name or folder that TransformerLens knows.")] = "bundled",
    kind: Annotated[str | None, typer.Option(help="hooked_transformer or bridge (default: what is installed).")] = None,
    tokens: Annotated[str, typer.Option(help="'bundled', a .npy or .safetensors file, or text files.")] = "bundled",
    key: Annotated[str, typer.Option(help="Tensor of a .safetensors file; part of the bundled tokens.")] = "validation",
    rows: Annotated[int, typer.Option(min=1, help="Rows of tokens to use.")] = 64,
    budgets: Annotated[str, typer.Option(help="Steps of the fresh adversaries, with commas; '' for none.")] = "20,60",
    starts: Annotated[int, typer.Option(min=1, help="Random starts of the standard adversary; the worst counts.")] = 1,
    attack_rows: Annotated[int, typer.Option(min=0, help="Rows that are attacked; 0 for all.")] = 8,
    controls: Annotated[bool, typer.Option(help="Also measure random, singular and shuffled controls.")] = True,
    measures: Annotated[str, typer.Option(help="What beside mode table and counts: all, none, or names.")] = "all",
    slices: Annotated[list[str] | None, typer.Option("--slice", help="Other text: NAME=FILES, as --tokens.")] = None,
    others: Annotated[list[str] | None, typer.Option("--other", help="Another seed or C: NAME=FOLDER.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows run at once.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    seed: int = 0,
    save: Annotated[Path | None, typer.Option("--out", help="Write metrics.json here (a file).")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as one page here (a file).")] = None,
) -> None:
    """Evaluate a decomposition: what is wrong with it, mask modes, adversaries, aggregation, transfer, controls."""
    from tl_vpd import Decomposition, bundled, viz
    from tl_vpd.evaluation import MEASURES, evaluate
    from tl_vpd.recipe import DataRecipe, ModelRecipe, usable_device

    try:
        steps = [int(b) for b in budgets.split(",") if b.strip()]
    except ValueError as error:
        raise ValueError(f"--budgets {budgets!r}: give whole numbers with commas, such as 20,320.") from error
    chosen = {"all": MEASURES, "none": ()}.get(measures) or [m for m in measures.split(",") if m not in ("", "none")]
    for path in (save, html):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: {path.parent} is no folder.")
        if path is not None and path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: give the name of a file.")

    device = usable_device(device)

    def loaded(name: str) -> Decomposition:
        return bundled.decomposition(device=device) if name == "bundled" else Decomposition.load(name, device=device)

    own = loaded(decomposition)
    target = ModelRecipe(name=model, kind=cast(Any, kind), device=device).load()
    data = DataRecipe(tokens=tokens, key=key).first(target, rows)
    found = evaluate(
        own,
        target,
        data,
        budgets=steps,
        starts=starts,
        controls=controls,
        control_budgets=steps[:1],
        adversary_budgets=steps,
        attack_rows=attack_rows or None,
        batch_size=batch_size,
        seed=seed,
        curve=bundled.training_record()["curve"] if model == "bundled" else None,
        measures=chosen,
        off_distribution={n: DataRecipe(tokens=p, key=key).first(target, rows) for n, p in _pairs("--slice", slices)},
        others={name: loaded(folder) for name, folder in _pairs("--other", others)},
    )
    if save is not None:
        found.save(save)
    if html is not None:
        viz.evaluation_page(found, html, title=f"Evaluation of {decomposition}")
    show(found)
    for path in (save, html):
        if path is not None:
            out.print(f"Written: {path}", markup=False)


@app.command("feature-splitting")
@_command
def feature_splitting_command(
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, data, vpd, execution, saving.")],
    factors: Annotated[str, typer.Option(help="Times the recipe's C, with commas.")] = "0.5,1,2,4",
    rows: Annotated[int, typer.Option(min=1, help="Rows that the counts are taken on.")] = 64,
    save: Annotated[Path | None, typer.Option("--out", help="Write the table here (.csv).")] = None,
) -> None:
    """Train decompositions with fewer and more subcomponents, and count how many of each are alive."""
    from tl_vpd.evaluation import sizes, train_sizes
    from tl_vpd.recipe import Recipe

    try:
        times = [float(f) for f in factors.split(",") if f.strip()]
    except ValueError as error:
        raise ValueError(f"--factors {factors!r}: give numbers with commas, such as 0.5,1,2,4.") from error
    given = Recipe.read(recipe)
    model = given.model.load()
    decompositions = train_sizes(
        model,
        given.data.load(model),
        given.vpd,
        factors=times,
        execution=given.execution,
        saving=given.saving,
    )
    table = sizes(decompositions, model, given.data.first(model, rows))
    out.print(table.round(4).to_string(), markup=False, highlight=False)
    if save is not None:
        table.to_csv(save)


def _pairs(option: str, given: list[str] | None) -> list[tuple[str, str]]:
    """``NAME=VALUE`` options as pairs; raises ValueError for one without a name."""
    pairs = [text.partition("=") for text in given or []]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ValueError(
                f"{option} {name + equals + value!r}: give a name and a path, such as {option} prose=text.txt."
            )
    return [(name, value) for name, _, value in pairs]


def show(found: Any) -> None:
    """Prints an evaluation's verdict and tables."""
    record = found.record

    def say(text: str) -> None:
        out.print(text, markup=False, highlight=False)

    for warning in found.warnings or ["No known fault was found."]:
        say(f"! {warning}" if found.warnings else warning)
    say("\n" + found.table().round(4).to_string())
    for name in record["tables"]:
        if record["tables"][name]:
            say(f"\n{name}\n" + found.to_pandas(name).round(4).to_string(index=False))
    say("\n" + found.sites_table().round(3).to_string())
    target = f"target CE {record['target_ce']:.4f}   " if "target_ce" in record else ""
    say(
        f"{target}L0 {record['l0']:.1f} a token of {record['alive']} alive, "
        f"{record['built']} built, {record['summed_rank']} summed ranks   {record['tokens']} tokens"
    )
    for what, why in record["left_out"].items():
        say(f"{what} left out: {why}")


@app.command()
@_command
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where the page, the metrics and the decomposition go.")] = Path(
        "demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Steps of the short decomposition.")] = 300,
) -> None:
    """The whole of it in a few minutes: the bundled model taken apart, checked, trained afresh, and a page to look at."""
    from tl_vpd.demo import run_demo

    run_demo(folder, steps=steps, say=lambda text: out.print(text, markup=False, highlight=False))


if __name__ == "__main__":
    app()
