"""The command line's threads sleep while they wait; a library's user decides."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tl_vpd import openmp


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["python", "-m", "tl_vpd.cli", "train"], True),
        (["python", "-u", "-m", "tl_vpd.cli", "train"], True),
        (["python", "/somewhere/bin/tl-vpd", "demo"], True),
        (["python", "C:\\bin\\tl-vpd.exe", "demo"] if os.name == "nt" else ["python", "tl-vpd.exe"], True),
        (["python", "-m", "pytest", "tl_vpd.cli"], False),
        (["python", "-c", "import tl_vpd"], False),
        (["python", "train.py", "-m", "tl_vpd.cli"], False),
        (["python"], False),
    ],
)
def test_which_processes_are_the_command(arguments, command):
    assert openmp.is_command(arguments) is command


@pytest.mark.parametrize(
    ("argv", "environment", "policy"),
    [
        (["python", "-m", "tl_vpd.cli"], {}, "PASSIVE"),
        (["python", "-m", "tl_vpd.cli"], {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        (["python", "-m", "tl_vpd.cli"], {"GOMP_SPINCOUNT": "1000"}, "None"),
        (["python", "notebook.py"], {}, "None"),
    ],
)
def test_the_setting_is_made_before_torch_is_loaded(argv, environment, policy):
    """The module alone: ``tl_vpd/__init__.py`` imports it before everything else, which the next test reads there."""
    clean = {name: value for name, value in os.environ.items() if name not in openmp.SETTINGS}
    code = (
        "import os, runpy, sys\n"
        f"sys.orig_argv = {argv}\n"
        f"runpy.run_path({openmp.__file__!r})\n"
        "print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == [policy, "False"]


def test_it_is_the_first_import_of_the_package():
    import tl_vpd

    with open(tl_vpd.__file__, encoding="utf-8") as file:
        imports = [line for line in file if line.startswith(("import tl_vpd", "from tl_vpd"))]
    assert imports[0].startswith("import tl_vpd.openmp")
