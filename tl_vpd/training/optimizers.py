"""The optimizers of V, U and Γ: AdamW for all, or Muon for matrices and AdamW for the rest.

Muon (Jordan et al., 2024; PyTorch's ``torch.optim.Muon``) moves a matrix along its momentum with all singular values set to about
1. Its steps are scaled by ``0.2 √max(rows, columns)``, after which their entries are as large as AdamW's (Liu et al., *Muon is
Scalable for LLM Training*, 2025): the authors' newer recipe does so too. Γ's matrices are the weights of its linear layers; its
biases, and the small MLPs of single subcomponents, are AdamW's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tl_vpd.training.config_sections import OptimizerConfig

KEYS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
"""What an optimizer stores for each parameter."""


def optimizers_of(
    config: OptimizerConfig, matrices: Sequence[nn.Parameter], gamma: nn.Module
) -> list[torch.optim.Optimizer]:
    """The optimizers; each group has its ``peak`` learning rate.

    Args:
        config: which.
        matrices: V and U.
        gamma: Γ.

    Raises:
        RuntimeError: this PyTorch has no Muon.
    """
    lr, gamma_lr = config.lr, config.gamma_lr or config.lr
    if config.kind == "adamw":
        groups = [_group(matrices, lr), _group(gamma.parameters(), gamma_lr)]
        return [torch.optim.AdamW(groups, weight_decay=0.0, fused=True)]
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"optimizer.kind='muon' needs a PyTorch with torch.optim.Muon, and this is {torch.__version__}: update it to 2.9 or "
            "later, or choose 'adamw'."
        )
    linear = matrices_of(gamma)
    others = [p for p in gamma.parameters() if not any(p is matrix for matrix in linear)]
    groups = [_group(group, rate) for group, rate in ((matrices, lr), (linear, gamma_lr)) if group]
    muon = torch.optim.Muon(groups, weight_decay=0.0, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW([_group(others, gamma_lr)], weight_decay=0.0, fused=True)]


def matrices_of(gamma: nn.Module) -> list[nn.Parameter]:
    """The weights of Γ's linear layers."""
    return [
        p for module in gamma.modules() if isinstance(module, nn.Linear) for p in module.parameters() if p.ndim == 2
    ]


def moments(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[nn.Parameter, str, dict[str, Tensor]]]:
    """Every parameter with its optimizer's name and what that stores for it: zeros before the first step."""
    for optimizer in optimizers:
        name = type(optimizer).__name__
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if not optimizer.state.get(p):
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                optimizer.state[p] = {key: step if key == "step" else torch.zeros_like(p) for key in KEYS[name]}
            yield p, name.lower(), optimizer.state[p]


def _group(parameters: Any, lr: float) -> dict[str, Any]:
    return {"params": list(parameters), "lr": lr, "peak": lr}
