"""Short runs as a program: ``python -m tests.training.a_run FOLDER [KEY=VALUE ...] [-- FOLDER ...]``, with torchrun or without.

Keys: ``resume``, ``slow`` (sleeps in every step), ``until`` (interrupts itself after so many steps), ``sharding``,
``micro_batch``, ``checkpoint``, ``gamma`` (a kind of Γ), ``dtype`` (the target's), ``precision``, ``merged``, ``data``
(``tensor``, ``mapped`` or ``rows``), ``tied`` (the first MLP's W_out is the transpose of its W_in, and so are its subcomponents),
``targeted`` (a targeted run, with other settings).
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import ExecutionConfig, SavingConfig, VPDConfig
from tl_vpd.training import TargetedConfig, Trainer, decompose, decompose_targeted
from tl_vpd.training.masked_passes import MaskedPasses

CONFIG = VPDConfig(
    steps=8,
    batch_size=4,
    C=5,
    gamma=GAMMA,
    faithfulness={"warm_up_steps": 2},
    minimality={"frequency_half_life": 4.0},
    coefficients={"locality": 0.01},
    optimizer={"gamma_clip": 0.1},
)
ROWS = (12, 6)
PROMPTS = [[1, 2, 3], [3, 2, 1], [4, 5]]
TARGETED = TargetedConfig(
    steps=8,
    batch_size=4,
    nontarget_batch_size=2,
    C=5,
    gamma={"kind": "global_mlp", "hidden": 8},
    minimality={"frequency_half_life": 4.0},
    decay=5.0,
)
EXECUTION = ("micro_batch", "sharding", "precision", "checkpoint")
AS_OPTION = {"micro_batch": int, "checkpoint": bool}
TIED = ("blocks.0.mlp.W_in", "blocks.0.mlp.W_out")
PLAIN_STEP, PLAIN_PASSES = Trainer.step, MaskedPasses.run


def main(folder: Path, given: dict[str, str]) -> None:
    """Eight steps, saved after each; the bytes that each process stores are in ``bytes-RANK.json``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    bytes_of: dict[str, int] = {}

    def watched_passes(self: MaskedPasses, *arguments: Any) -> Any:
        for result in PLAIN_PASSES(self, *arguments):
            bytes_of["parameters after a pass"] = size_of(list(self.engine.decomposition.parameters()))
            yield result

    def watched(self: Trainer, *arguments: Any) -> Any:
        measured = PLAIN_STEP(self, *arguments)
        folder.mkdir(parents=True, exist_ok=True)
        bytes_of["parameters"] = size_of(list(self.decomposition.parameters()))
        bytes_of["moments"] = size_of(
            [t for o in self.optimizers for s in o.state.values() for t in s.values() if t.ndim]
        )
        (folder / f"bytes-{self.world.rank}.json").write_text(json.dumps(bytes_of))
        if "slow" in given:
            sys.stdout.write(f"{self.done}\n")
            sys.stdout.flush()
            time.sleep(0.4)
        if self.done == int(given.get("until", -1)):
            os.kill(os.getpid(), signal.SIGTERM)
        return measured

    Trainer.step, MaskedPasses.run = watched, watched_passes  # type: ignore[method-assign]
    model = tiny_model(dtype=getattr(torch, given.get("dtype", "float32")))
    config = CONFIG.model_copy(
        update={
            "gamma": CONFIG.gamma.model_copy(update={"kind": given.get("gamma", CONFIG.gamma.kind), "chunk": 5}),
            "merged": 0.5 if "merged" in given else 0.0,
            "tied": (TIED,) if "tied" in given else (),
        }
    )
    if "tied" in given:
        with torch.no_grad():
            model.blocks[0].mlp.W_out.copy_(model.blocks[0].mlp.W_in.T)
    rows = data(folder, given.get("data", "tensor"))
    what = (model, PROMPTS, rows, TARGETED) if "targeted" in given else (model, rows, config)
    run = (decompose_targeted if "targeted" in given else decompose)(
        *what,
        execution=ExecutionConfig(
            **{name: AS_OPTION.get(name, str)(given[name]) for name in EXECUTION if name in given}
        ),
        saving=SavingConfig(folder=folder, save_every=1, log_every=1, keep_states=3),
        resume="resume" in given,
        progress=False,
    )
    decomposition = copy.deepcopy(run.decomposition)  # which sharded modules cannot be
    assert not any(isinstance(module, FSDPModule) for module in decomposition.modules())


def data(folder: Path, kind: str) -> Any:
    """The same twelve rows of tokens as a tensor, from a memory-mapped file, or one by one."""
    tokens: Tensor = some_tokens(shape=ROWS)
    if kind == "rows":
        return list(tokens)
    if kind == "mapped":
        return np.load(folder.parent / "tokens.npy", mmap_mode="r")
    return tokens


def size_of(tensors: list[Tensor]) -> int:
    """Bytes of what this process stores of tensors."""
    stored = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in stored)


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    for run in " ".join(sys.argv[1:]).split(" -- "):
        where, *pairs = run.split()
        main(Path(where), {key: value for key, _, value in (pair.partition("=") for pair in pairs)})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
