"""Whether a device computes products in bfloat16, or would imitate them number by number.

On a processor without the instructions a product in bfloat16 takes many times as long as in float32. PyTorch computes it all the
same, and does not say so.
"""

from __future__ import annotations

from typing import Any

import torch

from tl_vpd.training.config import Precision

ALSO = ("avx_ne_convert", "avx10_2")
"""Instructions for bfloat16 that are not named after it."""


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether a device has instructions for products in bfloat16; True where PyTorch cannot tell."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
    known = [present for name, present in capabilities.items() if "bf16" in name or name in ALSO]
    return not known or any(known)


def refuse_imitated(precision: Precision, device: torch.device) -> None:
    """Refuses a precision that a device would imitate.

    Raises:
        ValueError: bfloat16 on a device without instructions for it.
    """
    if precision == "bfloat16" and not has_bfloat16(device):
        what = "processor" if device.type == "cpu" else "GPU"
        raise ValueError(
            f"precision='bfloat16' needs a {what} with instructions for it (AVX512-BF16, AMX, Arm's BF16, GPUs since NVIDIA's "
            f"Ampere), and this {what} has none, so that a step would take many times as long: leave precision out."
        )
