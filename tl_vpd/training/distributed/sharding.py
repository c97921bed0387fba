"""What each process stores of V, U, Γ and AdamW's moments: PyTorch's ``fully_shard`` (FSDP2) on the decomposition's modules.

===============  ==================================================  ==================================================
sharding         whole in every process                              ``1 / processes`` each
===============  ==================================================  ==================================================
``none``         parameters, gradients, moments                      –
``optimizer``    parameters, from their first use in a step on       gradients, moments (ZeRO stage 2)
``full``         one module's parameters at a time, while in use     parameters, gradients, moments (ZeRO stage 3)
===============  ==================================================  ==================================================

Modules are V and U of each site (``SiteComponents``), and Γ's blocks and projections. Parameters are split along their first
axis. Gradients are sums over processes, not means, and AdamW works entry by entry, so that all three take the same steps, to the
rounding of sums.

Under ``none`` gradients are added by plain ``all_reduce`` after the last backward: a step has several backward passes through the
same parameters, which ``DistributedDataParallel``, made for one forward and one backward, would each add up.

Stages: Rajbhandari et al., *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*, 2020.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tl_vpd.checks import choice
from tl_vpd.components import Components
from tl_vpd.importance import DecomposedWeights
from tl_vpd.importance.build import build
from tl_vpd.importance.global_mlp import GlobalMLP
from tl_vpd.importance.mlps import PerSiteMLPs
from tl_vpd.importance.transformer import SharedTransformer
from tl_vpd.training.config import ShardingKind
from tl_vpd.training.distributed.processes import World

log = logging.getLogger(__name__)


def shard(weights: DecomposedWeights, kind: ShardingKind, world: World) -> None:
    """Splits a decomposition's parameters among processes, in place; a process alone keeps them whole.

    Args:
        weights: the same in every process.
        kind: what is split.
        world: the processes.

    Raises:
        ValueError: the kind does not exist.
        RuntimeError: this PyTorch is too old.
    """
    choice("sharding", kind, get_args(ShardingKind))
    if kind == "none" or world.size == 1:
        if kind != "none":
            log.warning("sharding=%r does nothing in a run of one process: start several with torchrun.", kind)
        return
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise RuntimeError(
            f"sharding={kind!r} needs a PyTorch with FSDPModule.set_force_sum_reduction_for_comms, and this is "
            f"{torch.__version__}: update it."
        )
    mesh = init_device_mesh(weights.device.type, (world.size,))
    for module in (*weights.components.by_site.values(), *gamma_units(weights.gamma)):
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=kind == "full")
        sharded.set_gradient_divide_factor(1.0)  # sums, not means,
        sharded.set_force_sum_reduction_for_comms(True)  # also with gloo, which has no scaled sums
        sharded.set_reshard_after_backward(kind == "full")


def after_update(weights: DecomposedWeights) -> None:
    """Lets passes see sharded parameters that have changed: whole copies from before are discarded."""
    for module in weights.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def unshard(weights: DecomposedWeights) -> None:
    """Gives every process the whole parameters, in plain modules; every process must call it."""
    if not is_sharded(weights):
        return
    after_update(weights)
    weights.zero_grad(set_to_none=True)
    tensors = {name: whole(p) for name, p in weights.named_parameters()}
    with torch.device("meta"):
        sites = weights.sites
        weights.components = Components(list(sites.values()), weights.counts)
        weights.gamma = build(weights.gamma_config, list(sites.values()), weights.counts)
    weights.load_state_dict(tensors, assign=True)


def is_sharded(weights: nn.Module) -> bool:
    """Whether a decomposition's parameters are split among processes."""
    return any(isinstance(module, FSDPModule) for module in weights.modules())


def whole(tensor: Tensor) -> Tensor:
    """A parameter, or a moment of AdamW, as a whole tensor; every process must call it where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(target: Tensor, tensor: Tensor) -> None:
    """Copies a whole tensor into a parameter or moment: where it is sharded, this process's part."""
    target = target.detach()
    if isinstance(target, DTensor):
        part = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(tensor)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Scales gradients to at most ``limit`` together (None: not at all); returns their norm before."""
    if limit is None:
        return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    return whole(nn.utils.clip_grad_norm_(parameters, limit))


def gamma_units(gamma: nn.Module) -> list[nn.Module]:
    """The modules of Γ whose parameters are gathered together."""
    units: list[nn.Module] = []
    for module in gamma.modules():
        if isinstance(module, SharedTransformer):
            units += [module.embed, *module.blocks, module.unembed]
        elif isinstance(module, PerSiteMLPs):
            units += module.mlps
        elif isinstance(module, GlobalMLP):
            units += [module.embed, module.unembed]
    return units or [gamma]
