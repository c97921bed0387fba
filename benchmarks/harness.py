"""What benchmarks share: variants timed in turn, this process's memory, the machine's name, and records in ``results/``.

On a noisy machine only ratios mean something: variants run in turn, round after round, and medians over rounds are compared.

    >>> seconds = seconds_in_turn({"sum": lambda: sum(range(1000)), "max": lambda: max(range(1000))}, rounds=5)
    >>> 0 < ratio(seconds, "sum", "max") < 1000
    True
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tl_vpd import Decomposition, VPDConfig

RESULTS = Path(__file__).parent / "results"
Variant = Callable[[], object]


def parser(name: str, documentation: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line, with the file of its record as ``--out``.

    Args:
        name: of the benchmark.
        documentation: shown by ``--help``: the module's docstring.
    """
    made = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="the file of the record")
    return made


def read(path: Path) -> dict[str, Any]:
    """A record that another run has written; empty if there is none."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def write(path: Path, record: Mapping[str, Any], name: str, **settings: Any) -> None:
    """Writes a record with what it was measured with.

    Args:
        path: the file.
        record: figures by name.
        name: of the benchmark.
        settings: to be noted beside command, versions and machine.
    """
    noted = {"command": f"python -m benchmarks.{name}", **settings, **machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**record, "settings": noted}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def trained(model: nn.Module, tokens: Tensor, config: VPDConfig, folder: Path) -> Decomposition:
    """A run's decomposition: read where it is finished, else trained or continued.

    Args:
        model: the target.
        tokens: rows.
        config: of the run.
        folder: of the run, a new one for each config.
    """
    from tl_vpd import Decomposition
    from tl_vpd.training import SavingConfig, decompose

    if (folder / "decomposition").is_dir():
        return Decomposition.load(folder / "decomposition")
    saving = SavingConfig(folder=folder, save_every=100, keep_states=1)
    resume = (folder / "state").is_dir() and any((folder / "state").iterdir())
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped before its first state
    return decompose(model, tokens, config, saving=saving, resume=resume, progress=False).decomposition


def machine() -> dict[str, str | int]:
    """What the figures were measured on, and with which versions."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformer_lens": version("transformer_lens"),
    }


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def seconds_of(function: Variant, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a call takes, on a GPU up to its last operation.

    Args:
        function: what is timed.
        clock: ``time.process_time`` counts the processor's seconds, which other work on the machine changes little.
    """
    _wait()
    start = clock()
    function()
    _wait()
    return clock() - start


def seconds_in_turn(
    variants: Mapping[str, Variant], *, rounds: int, warm_up: int = 2, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every variant in each round; a round runs each once, every other round in reverse order.

    Args:
        variants: what is timed, by name.
        rounds: that count.
        warm_up: rounds before those.
        clock: of the seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for i in range(warm_up + rounds):
        for name in order if i % 2 else reversed(order):
            duration = seconds_of(variants[name], clock)
            if i >= warm_up:
                seconds[name].append(duration)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of one variant's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def resident_mb() -> float:
    """Memory of this process now, in MB."""
    return _status("VmRSS")


def peak_mb() -> float:
    """The most memory that this process has had, or has had since ``restart_peak``, in MB."""
    return _status("VmHWM")  # resource.ru_maxrss would count the parent's


def restart_peak() -> None:
    """Frees what is free, and counts the peak from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
