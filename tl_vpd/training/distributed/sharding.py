"""What each process keeps of V, U, Γ and AdamW's moments.

===============  ==============================================  ======================================================
sharding         whole in every process                          a share of ``1 / processes`` each
===============  ==============================================  ======================================================
``none``         parameters, gradients, moments                  –
``optimizer``    parameters, gradients during backward           moments and, after backward, gradients (ZeRO stage 2)
``full``         one parameter at a time, while it is used       parameters, gradients, moments (ZeRO stage 3, FSDP)
===============  ==============================================  ======================================================

A share is an equal run of a parameter's flattened entries, the last padded with zeros. AdamW works entry by entry and gradients
are summed, so all three take the same steps, to the rounding of sums.

Under ``full`` every parameter is a parametrization (``torch.nn.utils.parametrize``) of its share: reading it gathers it, its
backward sums the gradient over processes and keeps the share. What backward needs of a gathered tensor is not kept but
gathered again (``regathering``). V and U are read site by site outside of any module's forward, which is why FSDP's own
wrappers, which act around forwards, do not fit.

Stages: Rajbhandari et al., *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*, 2020.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tl_vpd.forward.cast_weights import CastWeights, _Cast
from tl_vpd.training.config import ShardingKind
from tl_vpd.training.distributed.processes import World


@dataclass(frozen=True)
class Split:
    """How one tensor's flattened entries are shared out."""

    shape: torch.Size
    world: World

    @property
    def each(self) -> int:
        """Entries a process, padding included."""
        return -(-self.shape.numel() // self.world.size)

    @property
    def own(self) -> slice:
        """This process's entries, without padding."""
        n = self.shape.numel()
        return slice(min(n, self.world.rank * self.each), min(n, (self.world.rank + 1) * self.each))

    def cut(self, whole: Shaped[Tensor, "..."]) -> Shaped[Tensor, " each"]:
        """This process's share of a tensor, as a copy."""
        run = whole.new_zeros(self.each)
        own = whole.reshape(-1)[self.own]
        run[: len(own)] = own
        return run

    def gather(self, run: Shaped[Tensor, " some"]) -> Shaped[Tensor, "..."]:
        """The whole tensor from every process's share, padded or not."""
        return self.world.gather_runs(self._padded(run, self.each))[: self.shape.numel()].view(self.shape)

    def add(self, whole: Float[Tensor, "..."]) -> Float[Tensor, " each"]:
        """This process's share of the sum of a tensor over processes."""
        return self.world.add_runs(self._padded(whole.reshape(-1), self.each * self.world.size))

    @staticmethod
    def _padded(run: Tensor, length: int) -> Tensor:
        return run if len(run) == length else torch.cat([run, run.new_zeros(length - len(run))])


class Sharding:
    """``none``: every process holds everything. The base of the other two.

    Use: ``start`` before a trainer is made, ``serve`` for the passes, then ``collect``, ``clip``, an optimizer's step
    and ``spread`` in every step, all inside ``regathering``; ``end`` when training is over.
    """

    kind: ShardingKind = "none"

    def __init__(self, world: World) -> None:
        self.world = world

    def start(self, module: nn.Module) -> None:
        """Splits a decomposition's parameters."""

    def end(self, module: nn.Module) -> None:
        """Puts the whole parameters back."""

    def serve(self, parts: CastWeights) -> None:
        """Lets a model's passes read the parameters that have been split."""

    def kept(self, module: nn.Module) -> list[nn.Parameter]:
        """What this process updates of a module's parameters, in their order."""
        return list(module.parameters())

    def collect(self, kept: Iterable[nn.Parameter]) -> None:
        """Adds what backward left over processes."""
        self.world.add_gradients(kept)

    def clip(self, kept: Sequence[nn.Parameter], limit: float | None) -> float:
        """Scales gradients to at most ``limit`` together; gives their norm before."""
        return float(nn.utils.clip_grad_norm_(kept, limit or float("inf")))

    def spread(self, kept: Iterable[nn.Parameter]) -> None:
        """Lets all processes see what this one updated."""

    def whole(self, kept: nn.Parameter, tensor: Tensor) -> Tensor:
        """The whole of what is kept of a parameter (itself, or a moment of its shape)."""
        return tensor

    def own(self, kept: nn.Parameter, whole: Tensor) -> Tensor:
        """The inverse of ``whole``."""
        return whole

    @contextmanager
    def regathering(self) -> Iterator[None]:
        """Inside, backward gathers parameters again instead of keeping them."""
        yield


class _Shared(Sharding):
    """What both ways of splitting have in common: a split for each parameter that is kept."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.splits: dict[nn.Parameter, Split] = {}

    def clip(self, kept: Sequence[nn.Parameter], limit: float | None) -> float:
        gradients = [p.grad for p in kept if p.grad is not None]
        norm = self.world.add(torch.stack([g.square().sum() for g in gradients]).sum()).sqrt()
        if limit is not None:
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            for g in gradients:
                g.mul_(factor)
        return float(norm)

    def whole(self, kept: nn.Parameter, tensor: Tensor) -> Tensor:
        return self.splits[kept].gather(tensor.detach())

    def own(self, kept: nn.Parameter, whole: Tensor) -> Tensor:
        return self.splits[kept].cut(whole)[: len(kept)]


class OptimizerSharding(_Shared):
    """``optimizer``: AdamW sees views of this process's entries alone; gradients are summed straight into its share."""

    kind: ShardingKind = "optimizer"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._views: dict[nn.Parameter, tuple[nn.Parameter, nn.Parameter]] = {}

    def kept(self, module: nn.Module) -> list[nn.Parameter]:
        return [self._view(p) for p in module.parameters()]

    def collect(self, kept: Iterable[nn.Parameter]) -> None:
        for view in kept:
            _, p = self._views[view]
            if p.grad is not None:
                view.grad = self.splits[view].add(p.grad)[: len(view)]
                p.grad = None

    @torch.no_grad()
    def spread(self, kept: Iterable[nn.Parameter]) -> None:
        for view in kept:
            self._views[view][1].copy_(self.splits[view].gather(view))

    def _view(self, p: nn.Parameter) -> nn.Parameter:
        if p not in self._views:
            split = Split(p.shape, self.world)
            view = nn.Parameter(p.detach().view(-1)[split.own])
            self._views[p] = self._views[view] = (view, p)
            self.splits[view] = split
        return self._views[p][0]


class FullSharding(_Shared):
    """``full``: a parameter is whole only while it is used."""

    kind: ShardingKind = "full"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._gathered: dict[int, _Again] = {}

    def start(self, module: nn.Module) -> None:
        for owner, name, p in _owned(module):
            split = Split(p.shape, self.world)
            # Unsafe in torch's sense: the parameter and its share have different shapes.
            parametrize.register_parametrization(owner, name, _Gathered(split, self), unsafe=True)
            self.splits[p] = split

    def end(self, module: nn.Module) -> None:
        for owner, name in [(m, name) for m in module.modules() for name in _parametrized(m)]:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=True)
        for p in module.parameters():
            p.grad = None
        self.splits.clear()

    def serve(self, parts: CastWeights) -> None:
        parts.V, parts.U = (_Served(own, self) for own in (parts.V, parts.U))

    def collect(self, kept: Iterable[nn.Parameter]) -> None:
        """Backward has summed the gradients already."""

    def remember(self, tensor: Tensor, again: _Again) -> Tensor:
        """Notes how to make a tensor again, for as long as it lives."""
        key = tensor.untyped_storage().data_ptr()
        if key:
            self._gathered[key] = again
            weakref.finalize(tensor, self._forget, key, again)
        return tensor

    def _forget(self, key: int, again: _Again) -> None:
        # A view of the same memory may have been remembered since.
        if self._gathered.get(key) is again:
            del self._gathered[key]

    def known(self, tensor: Tensor) -> _Again | None:
        """How to make a tensor again, or one that it is a view of."""
        return self._gathered.get(tensor.untyped_storage().data_ptr())

    @contextmanager
    def regathering(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _Packed:
        again = self.known(tensor)
        if again is None:
            return tensor
        return _Packed(again, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def sharding_of(kind: ShardingKind, world: World) -> Sharding:
    """The sharding of a kind; a process alone has nothing to share."""
    if kind not in ("none", "optimizer", "full"):
        raise ValueError(f"sharding is {kind!r}: give 'none', 'optimizer' or 'full'.")
    kinds: dict[ShardingKind, type[Sharding]] = {"none": Sharding, "optimizer": OptimizerSharding, "full": FullSharding}
    return kinds[kind if world.size > 1 else "none"](world)


def parameter_names(module: nn.Module) -> list[str]:
    """Names of a module's parameters, whether they are split or not."""
    return [name.replace("parametrizations.", "").removesuffix(".original") for name, _ in module.named_parameters()]


@dataclass(frozen=True)
class _Again:
    """How to make a gathered tensor again: from whose share, and in which dtype."""

    share: Tensor
    split: Split
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        return self.split.gather(self.share.detach()).to(self.dtype)


@dataclass(frozen=True)
class _Packed:
    """A view of a gathered tensor, without its entries."""

    again: _Again
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(concatenated: Tensor | _Packed) -> Tensor:
    if isinstance(concatenated, Tensor):
        return concatenated
    return concatenated.again().as_strided(concatenated.size, concatenated.stride, concatenated.offset)


class _Gather(torch.autograd.Function):
    """A share's whole; backward: this process's share of the summed gradient."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return split.gather(share)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.split.add(grad), None


class _Gathered(nn.Module):
    """The parametrization: whole from share."""

    def __init__(self, split: Split, sharding: FullSharding) -> None:
        super().__init__()
        self.split, self.sharding = split, sharding

    def forward(self, share: Tensor) -> Tensor:
        again = _Again(share, self.split, share.dtype)
        return self.sharding.remember(_Gather.apply(share, self.split), again)

    def right_inverse(self, whole: Tensor) -> Tensor:
        """The share of a whole."""
        return self.split.cut(whole.detach())


class _Served(_Cast):
    """V or U of a pass in the model's dtype, gathered at every use: nothing is kept, in any dtype."""

    def __init__(self, plain: _Cast, sharding: FullSharding) -> None:
        super().__init__(plain.tensors, plain.device, plain.dtype)
        self.sharding = sharding

    def __getitem__(self, site: str) -> Tensor:
        whole = self.tensors[site]
        again = self.sharding.known(whole)
        own = whole.detach() if self.constant else whole
        cast = own.to(device=self.device, dtype=self.dtype)
        if again is not None and cast is not whole:
            self.sharding.remember(cast, _Again(again.share, again.split, self.dtype))
        return cast


def _owned(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [(m, name, p) for m in module.modules() for name, p in m.named_parameters(recurse=False)]


def _parametrized(module: nn.Module) -> list[str]:
    return list(getattr(module, "parametrizations", ()))
