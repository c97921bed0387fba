"""The command line: ``tl-vpd train``, ``plan``, ``eval``, ``feature-splitting``, ``import``, ``compact``, ``dashboard``,
``card``, ``push`` and ``demo``.

Errors are one line that says what to do (with ``TL_VPD_TRACEBACK=1`` in the environment, Python's traceback). Exit codes:

====  ================================================================================================================
0     done
1     an error of the program or of a library
2     a mistake, a file that is missing or damaged, a full disk, a folder in use; files from before are intact
130   interrupted; ``train`` has saved, and continues with ``--resume``
====  ================================================================================================================

Under ``torchrun`` the first process
prints for all; the others are silent, except for errors that the system raises in them alone::

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
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="adVersarial Parameter Decomposition of transformers' weights (VPD).",
)
_out = Console(soft_wrap=True)
_err = Console(stderr=True, soft_wrap=True)
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a decomposition.")]
ReportFile = Annotated[Path | None, typer.Option(help="Its report (default: metrics.json in the folder, if any).")]
Licence = Annotated[str | None, typer.Option(help="Of the decomposition, as the Hub names it, such as mit.")]
BaseModel = Annotated[str | None, typer.Option(help="The target's name on the Hub.")]
TargetLicence = Annotated[str | None, typer.Option(help="Of the target.")]
Datasets = Annotated[list[str] | None, typer.Option("--dataset", help="Name on the Hub of the text; may be repeated.")]
TextLicence = Annotated[str | None, typer.Option(help="Of the text.")]


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, OSError, ImportError, FloatingPointError) as error:
        _show(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        if not _rank():
            _err.print("Interrupted; what was saved before is intact.", markup=False, highlight=False)
        raise typer.Exit(130) from error
    except (RuntimeError, MemoryError, AssertionError, ArithmeticError, AttributeError) as error:
        if isinstance(error, typer.Exit | typer.Abort):
            raise
        _show(error, " (an error of the program or of a library: set TL_VPD_TRACEBACK=1 to see where)")
        raise typer.Exit(1) from error


def _show(error: Exception, hint: str = "") -> None:
    """Prints an error on one line; raises it instead if ``TL_VPD_TRACEBACK`` is set."""
    if os.environ.get("TL_VPD_TRACEBACK"):
        raise error
    rank = _rank()
    if rank and getattr(error, "errno", None) is None:
        return
    if rank:
        _err.print(f"Process {rank}: ", end="")
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    _err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    _err.print(" ".join(text.splitlines()) + hint, markup=False, highlight=False)


def _rank() -> int:
    """Which of the processes of ``torchrun`` this is; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def _command(function: Callable[..., None]) -> Callable[..., None]:
    @wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> None:
        # TransformerLens 3 says at every model that HookedTransformer goes away in 4; users of the command cannot act on that.
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
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, data, vpd or targeted, execution, saving.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in saving.folder.")] = False,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Rows run at once, to save memory.")] = None,
    sharding: Annotated[str | None, typer.Option(help="Under torchrun: none, optimizer or full.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a row.")] = None,
    keep_states: Annotated[int | None, typer.Option(min=1, help="The newest states that stay on the disk.")] = None,
    from_state: Annotated[
        Path | None, typer.Option(help="Continue from this file of saving.folder/state; later states are removed.")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Train a decomposition as a recipe says; options overrule it."""
    from tl_vpd.recipe import Recipe
    from tl_vpd.training.memory import keep_freed_memory

    keep_freed_memory()
    settings = Recipe.read(recipe).changed(
        execution={"micro_batch": micro_batch, "sharding": sharding},
        data={"context": context},
        saving={"keep_states": keep_states},
    )
    if settings.train(resume=from_state or resume, trust_remote_code=trust_remote_code).finished:
        _say(f"Finished: {settings.saving.folder}/decomposition")
    else:
        _say(f"Stopped and saved; continue with the same command and --resume: tl-vpd train {recipe} --resume")
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
    _say(*settings.plan(shape, **options))  # type: ignore[arg-type]


@app.command("eval")
@_command
def evaluate_command(
    decomposition: Annotated[str, typer.Argument(help="Folder of a decomposition, or 'bundled'.")],
    model: Annotated[str, typer.Option(help="'bundled', or a name or folder that TransformerLens knows.")] = "bundled",
    kind: Annotated[str | None, typer.Option(help="hooked_transformer or bridge (default: what is installed).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    tokens: Annotated[str, typer.Option(help="'bundled', a .npy or .safetensors file, or text files.")] = "bundled",
    key: Annotated[str | None, typer.Option(help="Tensor of a file, or part of the bundled tokens.")] = None,
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
    from tl_vpd.recipe.data import DataRecipe
    from tl_vpd.recipe.model import ModelRecipe

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
        decomposition,
        ModelRecipe(name=model, kind=kind, device=device),  # type: ignore[arg-type]
        DataRecipe(tokens=tokens, key=key),
        config,
        rows=rows,
        off_distribution=evaluating.by_name("--off-distribution", off_distribution),
        others=evaluating.by_name("--others", others),
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        result.save(out)
    if html is not None:
        viz.evaluation_page(result, html, title=f"Evaluation of {decomposition}")
    _say(*evaluating.evaluation_lines(result), *(f"Written: {path}" for path in (out, html) if path is not None))


@app.command("feature-splitting")
@_command
def feature_splitting_command(
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, data, vpd, execution, saving.")],
    factors: Annotated[str, typer.Option(help="Times the recipe's C, with commas.")] = "0.5,1,2,4",
    rows: Annotated[int, typer.Option(min=1, help="Rows that the counts are measured on.")] = 64,
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
    _say(table.round(4).to_string())
    if out is not None:
        write_text(out, table.to_csv())


@app.command("import")
@_command
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
    _say(certificate.to_pandas().to_string(index=False), f"Written: {out} and {out / 'model'}")


@app.command("compact")
@_command
def compact_command(
    decomposition: Annotated[str, typer.Argument(help="Folder of a decomposition, or 'bundled'.")],
    out: Annotated[Path, typer.Option(help="New folder of the smaller decomposition.")],
    model: Annotated[str, typer.Option(help="'bundled', or a name or folder that TransformerLens knows.")] = "bundled",
    kind: Annotated[str | None, typer.Option(help="hooked_transformer or bridge (default: what is installed).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    tokens: Annotated[str, typer.Option(help="'bundled', a .npy or .safetensors file, or text files.")] = "bundled",
    key: Annotated[str | None, typer.Option(help="Tensor of a file, or part of the bundled tokens.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of tokens: what is important on none of them goes.")] = 512,
    threshold: Annotated[float, typer.Option(help="The largest importance at which a subcomponent goes.")] = 0.0,
    trust_remote_code: Trust = False,
) -> None:
    """Leave out the subcomponents that are never important: a smaller decomposition, in a new folder."""
    from tl_vpd.recipe.compacting import compact_by_name
    from tl_vpd.recipe.data import DataRecipe
    from tl_vpd.recipe.model import ModelRecipe

    counts = compact_by_name(
        decomposition,
        ModelRecipe(name=model, kind=kind, device=device),  # type: ignore[arg-type]
        DataRecipe(tokens=tokens, key=key),
        out,
        rows=rows,
        threshold=threshold,
        trust_remote_code=trust_remote_code,
    )
    _say(counts.to_string(), f"{counts.before.sum()} -> {counts.after.sum()} subcomponents.  Written: {out}")


@app.command("dashboard")
@_command
def dashboard_command(
    decomposition: Annotated[str, typer.Argument(help="Folder of a decomposition, or 'bundled'.")],
    out: Annotated[Path, typer.Option(help="New folder of the pages.")],
    model: Annotated[str, typer.Option(help="'bundled', or a name or folder that TransformerLens knows.")] = "bundled",
    kind: Annotated[str | None, typer.Option(help="hooked_transformer or bridge (default: what is installed).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    tokens: Annotated[str, typer.Option(help="'bundled', a .npy or .safetensors file, or text files.")] = "bundled",
    key: Annotated[str | None, typer.Option(help="Tensor of a file, or part of the bundled tokens.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of tokens to look at.")] = 512,
    alpha: Annotated[float, typer.Option(min=0, help="Of the components, as in docs/components.md; 0 for none.")] = 3.0,
    labels: Annotated[Path | None, typer.Option(help="CSV file: subcomponent, label, and any numbers.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Pages about every subcomponent, with search and sorting, that open offline."""
    from tl_vpd.recipe.dashboards import dashboard_by_name
    from tl_vpd.recipe.data import DataRecipe
    from tl_vpd.recipe.model import ModelRecipe

    page = dashboard_by_name(
        decomposition,
        ModelRecipe(name=model, kind=kind, device=device),  # type: ignore[arg-type]
        DataRecipe(tokens=tokens, key=key),
        out,
        rows=rows,
        alpha=alpha,
        labels=labels,
        trust_remote_code=trust_remote_code,
    )
    _say(f"Written: open {page}")


@app.command()
@_command
def card(
    folder: Folder,
    report: ReportFile = None,
    out: Annotated[Path | None, typer.Option(help="File for the card (default: printed).")] = None,
    repository: Annotated[str | None, typer.Option(help="user/repo where it will be loaded from.")] = None,
    licence: Licence = None,
    base_model: BaseModel = None,
    target_licence: TargetLicence = None,
    dataset: Datasets = None,
    text_licence: TextLicence = None,
) -> None:
    """The card of a decomposition: what it is, how to load it, what was measured and what may be claimed."""
    from tl_vpd.files.atomic import write_text
    from tl_vpd.recipe.publishing import decomposition_and_report

    config = _card_config(licence, base_model, target_licence, dataset, text_licence)
    decomposition, evaluation = decomposition_and_report(folder, report)
    text = str(decomposition.model_card(repository, report=evaluation, card=config))
    if out is None:
        typer.echo(text)
    else:
        write_text(out, text)
        _say(f"Written: {out}")


@app.command("push")
@_command
def push_command(
    folder: Folder,
    repository: Annotated[str, typer.Argument(help="user/repo on the Hugging Face Hub; made if needed.")],
    report: ReportFile = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees it (default: as it is, or as the account says).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if needed (default: the main one).")] = None,
    licence: Licence = None,
    base_model: BaseModel = None,
    target_licence: TargetLicence = None,
    dataset: Datasets = None,
    text_licence: TextLicence = None,
) -> None:
    """Push a decomposition to the Hugging Face Hub, with its report and its card, in one commit."""
    from tl_vpd.recipe.publishing import decomposition_and_report

    config = _card_config(licence, base_model, target_licence, dataset, text_licence)
    decomposition, evaluation = decomposition_and_report(folder, report)
    address = decomposition.push_to_hub(repository, report=evaluation, card=config, private=private, revision=revision)
    _say(f"Pushed: {address}")


@app.command()
@_command
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the page, the metrics and the decomposition.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of the short decomposition.")] = 300,
) -> None:
    """A tour in a few minutes: the bundled model decomposed, checked, trained again for a while, and a page to look at."""
    from tl_vpd.demo import run_demo

    run_demo(out, steps=steps, say=_say)


def _card_config(
    licence: str | None,
    base_model: str | None,
    target_licence: str | None,
    datasets: list[str] | None,
    text_licence: str | None,
) -> Any:
    """What ``card`` and ``push`` are told for the card."""
    from tl_vpd.publishing import CardConfig

    return CardConfig(
        licence=licence,
        base_model=base_model,
        target_licence=target_licence,
        datasets=tuple(datasets or ()),
        text_licence=text_licence,
    )


def _say(*lines: str) -> None:
    for line in lines:
        _out.print(line, markup=False, highlight=False)


if __name__ == "__main__":
    app()
