"""A function of tensors as one compiled graph, checked before it is used.

The function runs once under ``make_fx``, which records every operation, also of backward passes inside it; the graph is compiled
(``torch.compile``) for arguments of these shapes, and its results on other numbers are compared with those of the function.

    >>> double = compiled(lambda x: x * 2, [torch.ones(3)], RECORDED, TOLERANCE["float32"], gradients=False)
    >>> double(torch.tensor([1.0, 2.0, 3.0]))
    tensor([2., 4., 6.])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_vpd.adapters import Unsupported

Function = Callable[..., Any]
RECORDED = "recorded"
"""In the place of a backend of ``torch.compile``: graphs run as they were recorded, which needs no compiler."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""How far a compiled graph may be from the model itself, as a share of the norm of each result."""


def compiled(
    function: Function, arguments: Sequence[Tensor | None], backend: str, tolerance: float, *, gradients: bool
) -> Function:
    """A function of those arguments that are tensors, compiled for their shapes; the others stay None.

    Args:
        function: of all arguments; returns a tensor, several, or None.
        arguments: with which it is recorded.
        backend: of ``torch.compile``, or ``recorded``.
        tolerance: how far its results may be from the function's.
        gradients: whether it runs with gradients on.

    Raises:
        Unsupported: its operations cannot be recorded, or the graph gives other results.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    def filled(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        return function(*(None if a is None else next(rest) for a in arguments))

    tensors = [a for a in arguments if a is not None]
    try:
        with torch.set_grad_enabled(gradients):
            graph: Any = make_fx(filled)(*(t.clone() for t in tensors))
            graph.graph.eliminate_dead_code()
            graph.recompile()
            optimised = graph if backend == RECORDED else _optimised(graph, backend, tensors[0].device)
            results = zip(_on_other_numbers(optimised, tensors), _on_other_numbers(filled, tensors), strict=True)
            error = max(_relative_error(a, b) for a, b in results)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as failure:
        instead = "leave compile out" if backend == RECORDED else f"use compile={RECORDED!r}, or leave compile out"
        reason = str(failure).strip().splitlines()[0]
        raise Unsupported(f"This model's passes cannot be compiled ({reason}): {instead}.") from failure
    if not error < tolerance:
        raise Unsupported(
            f"A compiled pass of this model is off by {error:.1e} on other data (its operations depend on the data): "
            "leave compile out."
        )
    return optimised


def _optimised(graph: Function, backend: str, device: torch.device) -> Function:
    """The graph by ``torch.compile``; on a CPU its kernels and products are called from C++, not from Python."""
    options: Any = {"cpp_wrapper": True} if backend == "inductor" and device.type == "cpu" else None
    return torch.compile(graph, dynamic=False, backend=backend, options=options)


def _on_other_numbers(function: Function, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A function's results for other numbers of the same shapes, and those numbers after it: it writes into some of them."""
    others = [t.detach().flip(0) if t.ndim else t * 2 for t in tensors]
    results = function(*others)
    return [*([results] if isinstance(results, Tensor) else results or ()), *others]


def _relative_error(a: Tensor, b: Tensor) -> float:
    """The distance of a from b divided by the norm of b; where b is not finite, only whether a is not either."""
    a, b = a.detach().double(), b.detach().double()
    if not bool(b.isfinite().all()):
        return 0.0 if torch.equal(a.isfinite(), b.isfinite()) else float("inf")
    return float((a - b).norm()) / max(float(b.norm()), 1e-20) if b.numel() else 0.0
