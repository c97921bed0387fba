"""``decompose``: from a model and tokens to a decomposition, with a progress bar, metrics, checkpoints and resume.

    >>> run = decompose(model, tokens, VPDConfig(steps=2_000), out="runs/gpt2")      # doctest: +SKIP
    >>> run.decomposition.save("gpt2-vpd"); run.history.tail()                       # doctest: +SKIP

In the folder ``out``: ``metrics.jsonl`` (one line a logged step), ``state/`` (for resuming), and at the end
``decomposition/``. Ctrl-C and SIGTERM finish the step at hand, save, and return what there is. Under ``torchrun`` every process
trains on its share of the batch (``tl_vpd.training.distributed.processes``); the first writes the files.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.components.fingerprint import Fingerprint
from tl_vpd.components.initialise import start_at_channels
from tl_vpd.components.storage import library_versions, write_json
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.site import select
from tl_vpd.training.config import VPDConfig, counts_for
from tl_vpd.training.data import ProcessBatches, batches_of
from tl_vpd.training.distributed.processes import World, world
from tl_vpd.training.distributed.sharding import Kind, sharding_of
from tl_vpd.training.engine.eager import Precision
from tl_vpd.training.state import latest_state, load_state, save_state
from tl_vpd.training.ties import Ties, check_ties
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
    check_ties(config.tied, {name: adapter.weight(name) for name in names})
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
                "processing": adapter.processing(),
            },
            "versions": library_versions(),
        },
        seed=config.seed,
    ).to(adapter.device)
    if config.init == "channels":
        for name in names:
            start_at_channels(decomposition.components, name, adapter.weight(name))
    if config.init_scale != 1:
        with torch.no_grad():
            for part in decomposition.components.parameters():
                part.mul_(config.init_scale)
    Ties(decomposition.components, config.tied).follow()
    return decomposition


def decompose(
    model: nn.Module,
    tokens: Any,
    config: VPDConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    micro_batch: int | None = None,
    sharding: Kind = "none",
    precision: Precision = "float32",
    checkpoint: bool = False,
    joined: bool = False,
    blocked_logits: bool | None = None,
    compile: bool | str = False,
    context: int | None = None,
    save_every: int = 500,
    keep_states: int = 2,
    log_every: int = 10,
    progress: bool = True,
) -> Run:
    """Trains a decomposition of ``model`` on rows of tokens.

    Args:
        model: the target; its weights, hooks, flags and gradients are afterwards as they were.
        tokens: rows ``[n, pos]`` of one length (a tensor, or an array, memory-mapped or not), strings (padding is left out of Γ,
            losses and statistics), an iterable of rows, a Hugging Face dataset, or an object that makes the batch of each step
            (``tl_vpd.training.data``). A model of one's own may take vectors, ``[n, pos, d]`` or ``[n, d]``.
        config: the algorithm (None: ``VPDConfig()``).
        out: folder for metrics, state and the result (None: nothing is written).
        resume: go on from the newest state in ``out`` (there must be one).
        micro_batch: rows run at once, to save memory; the result is that of the whole batch (None: all of them).
        sharding: what each process of a run under ``torchrun`` keeps a share of instead of the whole: ``none``, the
            ``optimizer``'s moments, or V, U, Γ, gradients and moments (``full``; ``tl_vpd.training.distributed.sharding``).
        precision: of matrix products: ``float32``, or ``bfloat16`` by autocast. What is learned stays float32.
        checkpoint: compute a layer's activations again in backward, to save memory; the result is the same.
        joined: run the stochastic and the adversarial masks in one pass of twice the rows: fewer operations, more memory, and
            the same result to rounding.
        blocked_logits: make logits for a few tokens at a time, in each loss, to save memory; the same to rounding (None: where
            those of the rows run at once would take more than 128 MiB).
        compile: run the step's passes as compiled graphs (``tl_vpd.training.engine.compiled``): the same to rounding, and faster, after
            some minutes of compilation. Needs a C++ compiler, or Triton on a GPU. A name: a backend of ``torch.compile``, or
            ``recorded`` for graphs that need no compiler.
        context: length of the rows that a dataset of text is cut into (None: the model's context).
        save_every: steps between states. keep_states: newest states that stay. log_every: steps between metrics.
        progress: show a bar.

    Raises:
        ValueError, KeyError, TypeError: tokens, sites, C or the model do not fit; nothing has been written then.
        FileExistsError: ``out`` holds a run already and ``resume`` is off.
        OSError: ``out`` cannot be written, found out before the first step.
        FloatingPointError: a loss is not finite; the last saved state is intact.
    """
    config = config or VPDConfig()
    counts = {"save_every": save_every, "log_every": log_every, "keep_states": keep_states, "micro_batch": micro_batch}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: at least 1 is needed.")
    adapter = adapt(model)
    folder = None if out is None else Path(out)
    with world(adapter.device) as processes, closing(_batches(adapter, tokens, config, context, processes)) as batches:
        adapter.tokens(batches.sample())
        decomposition = new_decomposition(model, config)
        state = None if folder is None else _find_state(folder, resume)
        if folder is not None and state is not None:
            _check_tokens(folder, batches.describe())
        processes.wait()  # nobody writes before all have looked
        history: list[StepMetrics] = []
        shares = sharding_of(sharding, processes)
        shares.start(decomposition)
        with (
            MaskedModel(decomposition, model, fused_attention=True) as masked_model,
            shares.regathering(),
            _interruptible() as interrupted,
        ):
            shares.serve(masked_model.weights)
            shape = (config.batch_size, batches.context)
            trainer = Trainer(
                masked_model,
                config,
                shape,
                micro_batch=micro_batch,
                world=processes,
                sharding=shares,
                precision=precision,
                checkpoint=checkpoint,
                joined=joined,
                blocked_logits=blocked_logits,
                compile=compile,
            )
            if state is not None:
                load_state(trainer, state)
                history = _read_history(folder, before=trainer.done)
                log.info("resumed at step %d", trainer.done)
            else:
                trainer.warm_up()
            files = None if folder is None else _Files(folder, save_every, keep_states, log_every)
            if files is not None:
                files.start(trainer, batches.describe(), history)
            _train(trainer, batches, adapter, files, history, interrupted, log_every, progress and processes.first)
            finished = trainer.done >= config.steps
        shares.end(decomposition)
        if finished and not all(bool(p.isfinite().all()) for p in decomposition.parameters()):
            raise FloatingPointError(
                "The last update gave numbers that are not finite; nothing was written as the result."
            )
        if folder is not None and finished and processes.first:
            decomposition.save(folder / "decomposition")
        processes.wait()
    return Run(decomposition, pd.DataFrame([asdict(m) for m in history]), finished, config)


def _batches(adapter: Adapter, data: Any, config: VPDConfig, context: int | None, processes: World) -> ProcessBatches:
    text = isinstance(data, str) or (isinstance(data, list) and bool(data) and isinstance(data[0], str))
    if text or isinstance(data, Tensor):
        data = adapter.tokens(data)
    length = context or getattr(getattr(adapter.model, "cfg", None), "n_ctx", None)
    tokenizer = getattr(adapter.model, "tokenizer", None)
    rows = processes.rows(config.batch_size)
    own = slice(rows.start, rows.stop)
    return batches_of(data, config.batch_size, config.seed, tokenizer=tokenizer, context=length, own=own)


@dataclass(frozen=True)
class _Files:
    """What a run writes while it trains; only the first process writes."""

    folder: Path
    save_every: int
    keep: int
    log_every: int

    def start(self, trainer: Trainer, data: dict[str, Any], history: list[StepMetrics]) -> None:
        """A folder that cannot be written fails here, not at the end."""
        self.save(trainer)
        if trainer.world.first:
            write_json(self.folder / TOKENS, data)
            _write_history(self.folder, history)

    def save(self, trainer: Trainer) -> None:
        """Writes a state."""
        save_state(trainer, self.folder / "state", keep=self.keep)

    def log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Adds a line of metrics."""
        if trainer.world.first:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(metrics)) + "\n")


def _train(
    trainer: Trainer,
    batches: ProcessBatches,
    adapter: Adapter,
    files: _Files | None,
    history: list[StepMetrics],
    interrupted: threading.Event,
    log_every: int,
    progress: bool,
) -> None:
    steps = trainer.config.steps
    with tqdm(total=steps, initial=trainer.done, disable=not progress, desc="decomposing", unit="step") as bar:
        while trainer.done < steps and not _asked_to_stop(trainer, interrupted):
            tokens = adapter.tokens(batches.at(trainer.done))
            metrics = trainer.step(tokens, adapter.padding(tokens, None))
            bar.update()
            if metrics.step % log_every == 0 or trainer.done == steps:
                history.append(metrics)
                bar.set_postfix(
                    kl_stoch=f"{metrics.stochastic:.3f}", kl_adv=f"{metrics.adversarial:.3f}", l0=f"{metrics.l0:.1f}"
                )
                if files is not None:
                    files.log(trainer, metrics)
            if files is not None and trainer.done % files.save_every == 0:
                files.save(trainer)
    if files is not None and trainer.done % files.save_every:
        files.save(trainer)
    if interrupted.is_set():
        where = f" and saved; resume with resume=True and out={str(files.folder)!r}" if files is not None else ""
        log.warning("Interrupted: stopped after step %d of %d%s.", trainer.done, steps, where)


def _asked_to_stop(trainer: Trainer, interrupted: threading.Event) -> bool:
    """Whether any process was asked to stop: all of them stop after the same step."""
    if trainer.world.size == 1:
        return interrupted.is_set()
    asked = torch.tensor(float(interrupted.is_set()), device=trainer.decomposition.device)
    stop = bool(trainer.world.add(asked) > 0)
    if stop:
        interrupted.set()
    return stop


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
    there = state is not None or (folder / "decomposition").exists() or (folder / "metrics.jsonl").exists()
    if there and not resume:
        raise FileExistsError(
            f"{folder} holds a run already: pass resume=True to go on with it, or choose another folder."
        )
    return state


def _check_tokens(folder: Path, now: dict[str, Any]) -> None:
    path = folder / TOKENS
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    # Of rows that one of the runs has not in memory there is no checksum of all.
    if stored is not None and any(stored[key] != now[key] for key in stored.keys() & now.keys()):
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
    """Turns the first Ctrl-C or SIGTERM into a flag, so that a step is never cut in two; the second interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def ask(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
