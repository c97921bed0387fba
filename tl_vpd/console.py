"""What every command has: the app, errors on one line, output as it is, and the options that several commands take."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import wraps
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    help="adVersarial Parameter Decomposition of transformers' weights (VPD).",
)
_out = Console(soft_wrap=True)
_err = Console(stderr=True, soft_wrap=True)
DecompositionName = Annotated[str, typer.Argument(help="Folder of a decomposition, or 'bundled'.")]
ModelName = Annotated[str, typer.Option(help="'bundled', or a name or folder that TransformerLens knows.")]
ModelKind = Annotated[str | None, typer.Option(help="hooked_transformer or bridge (default: what is installed).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Tokens = Annotated[str, typer.Option(help="'bundled', a .npy or .safetensors file, or text files.")]
Key = Annotated[str | None, typer.Option(help="Tensor of a file, or part of the bundled tokens.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model.")]


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"tl_vpd {version('tl_vpd')}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors as one line, with the exit code that belongs to them."""
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


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A function as a command: its errors are one line, and of several processes the first speaks."""

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


def say(*lines: str) -> None:
    """Prints lines as they are."""
    for line in lines:
        _out.print(line, markup=False, highlight=False)


def named(
    decomposition: str, model: str, kind: str | None, device: str, tokens: str, key: str | None, rows: int, trust: bool
) -> Any:
    """What several commands take: a ``tl_vpd.recipe.named.Named``."""
    from tl_vpd.recipe import DataRecipe, ModelRecipe
    from tl_vpd.recipe.named import Named

    target = ModelRecipe(name=model, kind=kind, device=device)  # type: ignore[arg-type]
    return Named(decomposition, target, DataRecipe(tokens=tokens, key=key), rows, trust)
