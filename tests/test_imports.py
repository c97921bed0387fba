"""Importing the package changes nothing of the process that imports it, and costs little."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

STATE = """
import json, locale, logging, multiprocessing, os, random, signal, socket, sys, threading, warnings
import numpy, torch, transformer_lens, matplotlib, pandas
import rich.style  # draws from Python's generator when it is imported

def state():
    root = logging.getLogger()
    return {
        "warnings": [str(f) for f in warnings.filters],
        "logging": [root.level, [str(h) for h in root.handlers], logging.root.manager.disable, logging.lastResort is not None],
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), len(threading.enumerate())],
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
                          torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()],
        "print": str(torch._tensor_str.PRINT_OPTS),
        "generators": [torch.get_rng_state().sum().item(), hash(random.getstate()), numpy.random.get_state()[1].tolist()],
        "numpy": [numpy.geterr(), numpy.get_printoptions()["precision"]],
        "pandas": [pandas.get_option(o) for o in ("display.max_rows", "display.width", "mode.chained_assignment")],
        "matplotlib": [matplotlib.rcParams._get("backend") if hasattr(matplotlib.rcParams, "_get") else
                       dict.__getitem__(matplotlib.rcParams, "backend"), matplotlib.rcParams["figure.figsize"]],
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(s)) for s in sorted(signal.valid_signals())],
        "hooks": [str(sys.excepthook), str(sys.unraisablehook), str(threading.excepthook), str(sys.displayhook),
                  str(sys.breakpointhook), sys.gettrace() is None, sys.getprofile() is None],
        "limits": [sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_int_max_str_digits()],
        "start method": multiprocessing.get_start_method(allow_none=True),
        "locale": locale.setlocale(locale.LC_ALL),
        "folder": os.getcwd(),
        "path": sys.path,
        "streams": [id(sys.stdout), id(sys.stderr), id(sys.stdin)],
        "socket": socket.getdefaulttimeout(),
        "models": [str(transformer_lens.HookedRootModule.__call__), str(torch.nn.Module.__call__), str(torch.load)],
    }

before = json.dumps(state(), default=str)
"""
ROOMS = [
    "analysis",
    "baselines",
    "bundled",
    "cli",
    "demo",
    "editing",
    "evaluation",
    "fact",
    "formats",
    "planning",
    "recipe",
    "toys",
    "viz",
]


def run(code: str) -> str:
    """What a Python process writes."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("rooms", [[], ROOMS], ids=["tl_vpd", "every room"])
def test_imports_change_nothing_global(rooms):
    imports = "".join(f"import tl_vpd.{room}\n" for room in rooms)
    code = f"{STATE}\nimport tl_vpd\n{imports}print(before)\nprint(json.dumps(state(), default=str))"
    before, after = (json.loads(line) for line in run(code).splitlines()[-2:])
    assert {key: (value, after[key]) for key, value in before.items() if after[key] != value} == {}


def test_an_import_says_nothing_and_loads_no_room_that_is_not_used():
    code = "import sys, tl_vpd; print(*(m for m in sys.modules if m.startswith('tl_vpd.') and m.count('.') == 1))"
    lines = run(code).splitlines()
    assert len(lines) == 1
    assert {name.removeprefix("tl_vpd.") for name in lines[0].split()}.isdisjoint(ROOMS)


def test_an_import_costs_little_more_than_that_of_transformer_lens():
    code = """
import time
import transformer_lens
began = time.process_time()
import tl_vpd
print(time.process_time() - began)
"""
    assert min(float(run(code).splitlines()[-1]) for _ in range(3)) < 1.0  # 0.5 s, twice that on a slow core
