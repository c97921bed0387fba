"""``decompose``: from a model and tokens to a decomposition, with a progress bar, metrics, checkpoints and resume.

    >>> run = decompose(model, tokens, VPDConfig(steps=2_000), out="runs/gpt2")      # doctest: +SKIP
    >>> run.decomposition.save("gpt2-vpd"); run.history.tail()                       # doctest: +SKIP

In the folder ``out``: ``metrics.jsonl`` (one line a logged step), ``state/`` (for resuming), and at the end
``decomposition/``. Ctrl-C finishes the step at hand, saves, and returns what there is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_vpd.adapters import adapt
from tl_vpd.adapters.hooked_transformer import HookedTransformerAdapter
from tl_vpd.components.initialise import start_at_channels
from tl_vpd.decomposition import Decomposition
from tl_vpd.fingerprint import Fingerprint
from tl_vpd.hooks.tapped import TappedModel
from tl_vpd.sites import select
from tl_vpd.storage import library_versions, write_json
from tl_vpd.training.config import VPDConfig, counts_for
from tl_vpd.training.data import TokenBatches
from tl_vpd.training.state import latest_state, load_state, save_state
from tl_vpd.training.trainer import StepMetrics, Trainer

log = logging.getLogger(__name__)
TOKENS = "tokens.json"
"""What a run was trained on: rows, their length, a checksum."""


@dataclass(frozen=True)
class Run:
    """What ``decompose`` gives back: the decomposition, a row of metrics a logged step, and whether it got to the end."""

    decomposition: Decomposition
    history: pd.DataFrame
    finished: bool
    config: VPDConfig


def new_decomposition(model: nn.Module, config: VPDConfig) -> Decomposition:
    """A freshly initialised decomposition of a model, on its device.

    Raises:
        Unsupported, TypeError: the model cannot be decomposed. KeyError, ValueError: sites or C do not fit the model.
    """
    adapter = adapt(model)
    names = select(config.sites, adapter.sites)
    sites = [adapter.sites[name] for name in names]
    decomposition = Decomposition(
        sites,
        counts_for(config, {s.name: s for s in sites}),
        config.gamma.resolved(adapter.d_model),
        fingerprints={name: Fingerprint.of(_finite(name, adapter.weight(name))) for name in names},
        record={
            "training": config.model_dump(mode="json"),
            "target": {
                "class": type(model).__name__,
                "name": str(getattr(getattr(model, "cfg", None), "model_name", "")),
            },
            "versions": library_versions(),
        },
        seed=config.seed,
    ).to(adapter.device)
    if config.init == "channels":
        for name in names:
            start_at_channels(decomposition.components, name, adapter.weight(name))
    return decomposition


def decompose(
    model: nn.Module,
    tokens: Int[Tensor, "n pos"] | str | list[str],
    config: VPDConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    save_every: int = 500,
    log_every: int = 10,
    progress: bool = True,
) -> Run:
    """Trains a decomposition of ``model`` on rows of tokens.

    Args:
        model: the target; its weights, hooks, flags and gradients are afterwards as they were.
        tokens: rows ``[n, pos]`` of one length, or strings (padding is left out of Γ, losses and statistics).
        config: the algorithm (None: ``VPDConfig()``).
        out: folder for metrics, state and the result (None: nothing is written).
        resume: go on from the newest state in ``out`` (there must be one).
        save_every: steps between states. log_every: steps between metrics. progress: show a bar.

    Raises:
        ValueError, KeyError, TypeError: tokens, sites, C or the model do not fit; nothing has been written then.
        FileExistsError: ``out`` holds a run already and ``resume`` is off.
        OSError: ``out`` cannot be written, found out before the first step.
        FloatingPointError: a loss is not finite; the last saved state is intact.
    """
    config = config or VPDConfig()
    adapter = adapt(model)
    rows = adapter.tokens(tokens)
    batches = TokenBatches(rows, config.batch_size, config.seed)
    decomposition = new_decomposition(model, config)
    folder = None if out is None else Path(out)
    state = None if folder is None else _find_state(folder, resume)
    if folder is not None and state is not None:
        _check_tokens(folder, rows)
    history: list[StepMetrics] = []
    with TappedModel(decomposition, model) as tapped, _interruptible() as interrupted:
        trainer = Trainer(tapped, config, (config.batch_size, rows.shape[1]))
        if state is not None:
            load_state(trainer, state)
            history = _read_history(folder, before=trainer.done)
            log.info("resumed at step %d", trainer.done)
        else:
            trainer.warm_up()
        if folder is not None:
            save_state(trainer, folder / "state")  # a folder that cannot be written fails here, not at the end
            write_json(folder / TOKENS, _describe(rows))
            _write_history(folder, history)
        _train(trainer, batches, adapter, folder, history, interrupted, save_every, log_every, progress)
        finished = trainer.done >= config.steps
    if folder is not None and finished:
        decomposition.save(folder / "decomposition")
    return Run(decomposition, pd.DataFrame([asdict(m) for m in history]), finished, config)


def _train(
    trainer: Trainer,
    batches: TokenBatches,
    adapter: HookedTransformerAdapter,
    folder: Path | None,
    history: list[StepMetrics],
    interrupted: threading.Event,
    save_every: int,
    log_every: int,
    progress: bool,
) -> None:
    steps = trainer.config.steps
    with tqdm(total=steps, initial=trainer.done, disable=not progress, desc="decomposing", unit="step") as bar:
        while trainer.done < steps and not interrupted.is_set():
            tokens = batches.at(trainer.done)
            metrics = trainer.step(tokens, adapter.padding(tokens, None))
            bar.update()
            if metrics.step % log_every == 0 or trainer.done == steps:
                history.append(metrics)
                bar.set_postfix(
                    kl_stoch=f"{metrics.stochastic:.3f}", kl_adv=f"{metrics.adversarial:.3f}", l0=f"{metrics.l0:.1f}"
                )
                if folder is not None:
                    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(metrics)) + "\n")
            if folder is not None and trainer.done % save_every == 0:
                save_state(trainer, folder / "state")
    if folder is not None and trainer.done % save_every:
        save_state(trainer, folder / "state")
    if interrupted.is_set():
        where = f" and saved; resume with resume=True and out={str(folder)!r}" if folder is not None else ""
        log.warning("Interrupted: stopped after step %d of %d%s.", trainer.done, steps, where)


def _finite(name: str, W: Tensor) -> Tensor:
    if not bool(W.isfinite().all()):
        raise ValueError(
            f"The weight of {name} holds values that are not finite; a model with NaNs cannot be decomposed."
        )
    return W


def _find_state(folder: Path, resume: bool) -> Path | None:
    state = latest_state(folder / "state")
    if resume and state is None:
        raise FileNotFoundError(f"{folder} holds no training state to resume from; start without resume.")
    if state is not None and not resume:
        raise FileExistsError(
            f"{folder} holds a run already: pass resume=True to go on with it, or choose another folder."
        )
    return state


def _describe(rows: Int[Tensor, "n pos"]) -> dict[str, Any]:
    digest = hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()
    return {"rows": len(rows), "context": rows.shape[1], "sha256": digest}


def _check_tokens(folder: Path, rows: Int[Tensor, "n pos"]) -> None:
    path = folder / TOKENS
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if stored is not None and stored != _describe(rows):
        raise ValueError(
            f"{folder} was trained on other tokens ({stored['rows']} rows of {stored['context']}): resume with the very rows "
            "the run was started with, or choose another folder."
        )


def _read_history(folder: Path | None, before: int) -> list[StepMetrics]:
    """The logged steps before the state's; later ones are of work that was lost and is done again."""
    path = folder / "metrics.jsonl" if folder is not None else None
    if path is None or not path.is_file():
        return []
    history = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed run
        if row["step"] < before:
            history.append(StepMetrics(**row))
    return history


def _write_history(folder: Path, history: list[StepMetrics]) -> None:
    text = "".join(json.dumps(asdict(m)) + "\n" for m in history)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into a flag, so that a step is never cut in two; the second one interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    signal.signal(signal.SIGINT, ask)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
