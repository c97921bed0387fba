"""Masked passes that start at the first decomposed block.

The blocks before it have no masked site: they compute in every masked pass what they compute in the clean one. So the residual
stream that enters the first decomposed block is read in the clean pass, and put in again in masked passes, in which the blocks
before it do not run. Decomposing the last blocks of a deep model then costs what those blocks cost.

    >>> with entry.reading() as residual:           # doctest: +SKIP
    ...     model(tokens)                           # the clean pass
    >>> with entry.at(residual[0]):                 # doctest: +SKIP
    ...     model(tokens)                           # the same output; the first blocks did not run

Other threads' passes, which may be under way, run every block. A model whose later blocks read more of the earlier ones than the
residual stream is noticed by comparing outputs once (``MaskedModel.can_start_late``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.changes import Change, Later
from tl_vpd.adapters.taps import Tap, ThreadTap, put_method, tap_argument


class Entry:
    """The place where masked passes start: the argument of the first decomposed block.

    Args:
        block: the first decomposed block.
        before: the blocks before it.
    """

    def __init__(self, block: nn.Module, before: Sequence[nn.Module]) -> None:
        self.block, self.before = block, list(before)
        self._tuples = False
        """Whether blocks give their output in a tuple; known after ``reading``."""

    def reading(self) -> Change[list[Float[Tensor, "batch pos d_model"]]]:
        """Inside, a pass puts the residual stream that enters the block into the list."""

        def read(undo: Later) -> list[Tensor]:
            residual: list[Tensor] = []
            undo(self.before[-1].register_forward_hook(Tap(self._see_form)).remove)
            undo(tap_argument(self.block, ThreadTap(None, residual.append)).remove)
            return residual

        return Change(read)

    def at(self, residual: Float[Tensor, "batch pos d_model"]) -> Change[None]:
        """Inside, passes start at the block, from this residual stream."""

        def start(undo: Later) -> None:
            for block in self.before:
                put_method(undo, block, "forward", _same, self._tuples)
            undo(tap_argument(self.block, ThreadTap(None, lambda _: residual)).remove)

        return Change(start)

    def _see_form(self, block: nn.Module, arguments: Any, output: Any) -> None:
        self._tuples = isinstance(output, tuple)


def entry_of(adapter: Adapter, names: Sequence[str]) -> Entry | None:
    """Where masked passes of these sites may start; None where every block runs, or the sites are not in blocks."""
    matches = [re.match(r"blocks\.(\d+)\.", name) for name in names]
    first = min((int(match[1]) if match else 0 for match in matches), default=0)
    if first == 0:
        return None
    blocks = adapter.blocks()
    return Entry(blocks[first], blocks[:first])


def _same(tuples: bool, *arguments: Any, **keywords: Any) -> Any:
    x = arguments[0] if arguments else next(iter(keywords.values()))
    return (x,) if tuples else x
