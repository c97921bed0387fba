"""Taps on every site of a model, and one forward pass as they see it.

Users' hooks (``tl_vpd.hooks``) and training (``MaskedModel``) read inputs, replace outputs and check that every site ran exactly
once in the same way: a ``SitePass`` is made for a forward pass, given to the taps while the pass runs, and dropped.

    >>> taps = SiteTaps(adapter, names)                                # doctest: +SKIP
    >>> handles = taps.put_on()                                        # doctest: +SKIP
    >>> with taps.during(SitePass(lambda name, x, y: 2 * y)) as run:   # doctest: +SKIP
    ...     model(tokens)
    >>> taps.check_each_once(run)                                      # doctest: +SKIP
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.taps import Handle
from tl_vpd.forward.quiet import frozen, users_hooks_aside

SiteFunction = Callable[[str, Tensor, Tensor], Tensor | None]
"""From a site's name, its input and its output as the model passes them to another output (None: the model's stays)."""


class SitePass:
    """What one forward pass reads at the sites, what it replaces their outputs with, and how often each ran.

    Args:
        function: replaces the sites' outputs (None: the model's stay).
        read: is called with each site's name and input, as the model passes it, before the output is computed.
        collect: whether ``inputs`` gathers every site's input, without a head axis.

    Attributes:
        inputs: by site ``[batch, pos, d_in]``; sites that read the same tensor share it.
        times: how often each site ran.
    """

    def __init__(
        self,
        function: SiteFunction | None = None,
        *,
        read: Callable[[str, Tensor], None] | None = None,
        collect: bool = False,
    ) -> None:
        self.function, self.read, self.collect = function, read, collect
        self.inputs: dict[str, Tensor] = {}
        self.times: Counter[str] = Counter()
        self.waiting: dict[str, Tensor] = {}


class SiteTaps:
    """Taps on sites. They store nothing but the pass that is running, while it runs (None: the taps do nothing).

    Args:
        adapter: of the model.
        names: the sites that are tapped.
    """

    def __init__(self, adapter: Adapter, names: Sequence[str]) -> None:
        self.adapter, self.names = adapter, list(names)
        self.current: SitePass | None = None

    def put_on(self) -> list[Handle]:
        """Taps every site; if one cannot be tapped, none is."""
        handles: list[Handle] = []
        try:
            for name in self.names:
                handles += self.adapter.tap(name, partial(self._read, name), partial(self._write, name))
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        return handles

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the taps are on the model, which is frozen and without users' hooks."""
        with frozen(self.adapter), users_hooks_aside(self.adapter), ExitStack() as stack:
            for handle in self.put_on():
                stack.callback(handle.remove)
            yield

    @contextmanager
    def during(self, run: SitePass | None) -> Iterator[SitePass | None]:
        """Inside, forward passes of the model are this one."""
        before, self.current = self.current, run
        try:
            yield run
        finally:
            self.current = before

    def check_each_once(self, run: SitePass) -> None:
        """Raises RuntimeError unless every site ran exactly once: masks would not act on the others."""
        wrong = {name: run.times[name] for name in self.names if run.times[name] != 1}
        if wrong:
            raise RuntimeError(
                f"In one forward pass these sites did not run exactly once: {wrong}. The model does not "
                "compute them the way its adapter expects, so masks and hooks would not act."
            )

    def _read(self, name: str, x: Tensor) -> None:
        run = self.current
        if run is None:
            return
        run.waiting[name] = x
        if run.collect:
            layout = self.adapter.layout(name)
            run.inputs[name] = layout.input_of_site(x) if layout.by_head or layout.x_has_heads else x
        if run.read is not None:
            run.read(name, x)

    def _write(self, name: str, y: Tensor) -> Tensor | None:
        run = self.current
        if run is None:
            return None
        x = run.waiting.pop(name, None)
        if x is None:  # a second HookPoint for the same product, as some versions fire
            return None
        run.times[name] += 1
        return None if run.function is None else run.function(name, x, y)
