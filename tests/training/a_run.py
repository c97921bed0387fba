"""A short run as a program of its own: ``python -m tests.training.a_run FOLDER [resume] [slow]``, alone or under torchrun."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import torch

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import VPDConfig
from tl_vpd.training import Trainer, decompose

CONFIG = VPDConfig(steps=8, batch_size=4, C=5, gamma=GAMMA, warm_up_steps=2, frequency_half_life=4.0)


def main(folder: Path, resume: bool, slow: bool) -> None:
    """Eight steps, saved after each; ``slow`` sleeps in every step, so that it can be killed in the middle."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if slow:
        step = Trainer.step

        def sleepy(self, *arguments):
            found = step(self, *arguments)
            sys.stdout.write(f"{self.done}\n")
            sys.stdout.flush()
            time.sleep(0.4)
            return found

        Trainer.step = sleepy
    model = tiny_model(dtype=torch.float32)
    decompose(
        model, some_tokens(shape=(12, 6)), CONFIG, out=folder, resume=resume, save_every=1, log_every=1, progress=False
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), "resume" in sys.argv, "slow" in sys.argv)
