"""Taps on every site of a model, and one forward pass as they see it.

Users' hooks (``tl_vpd.hooks``) and training (``MaskedModel``) read inputs, replace outputs and check that every site ran exactly
once in the same way: a ``SitePass`` is made for a forward pass, given to the taps while the pass runs, and dropped.

    >>> taps = SiteTaps(adapter, names)                                # doctest: +SKIP
    >>> with taps.on(), taps.during(SitePass(lambda name, x, y: 2 * y)) as run:   # doctest: +SKIP
    ...     model(tokens)
    >>> taps.check_each_once(run)                                      # doctest: +SKIP
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.changes import Change, Later, enter
from tl_vpd.adapters.taps import is_elsewhere, this_thread
from tl_vpd.forward.quiet import frozen, users_hooks_aside
from tl_vpd.forward.remains import copies_are_clean
from tl_vpd.forward.site_edit import SiteEdit
from tl_vpd.forward.turns import others_wait, turn

SiteFunction = Callable[[str, Tensor, Tensor], Tensor | None]
"""From a site's name, its input and its output as the model passes them to another output (None: the model's stays)."""


class SitePass:
    """What one forward pass reads at the sites, what it replaces their outputs with, and how often each ran.

    Args:
        function: replaces the sites' outputs (None: the model's stay).
        read: is called with each site's name and input, as the model passes it, before the output is computed.
        collect: whether ``inputs`` gathers every site's input, without a head axis, and the residual streams; or the names of
            what it gathers.

    Attributes:
        inputs: by site ``[batch, pos, d_in]``; sites that read the same tensor share it. Residual streams too, by their name.
        residual: the stream ``[batch, pos, d_model]`` that enters the first decomposed block (None: inputs are not gathered, or
            no block comes before it).
        times: how often each site ran.
        thread: that made it (None: a compiler); what the model does in others is not this pass.
    """

    def __init__(
        self,
        function: SiteFunction | None = None,
        *,
        read: Callable[[str, Tensor], None] | None = None,
        collect: bool | Collection[str] = False,
    ) -> None:
        self.function, self.read, self.collect = function, read, collect
        self.inputs: dict[str, Tensor] = {}
        self.residual: Tensor | None = None
        self.times: Counter[str] = Counter()
        self.waiting: dict[str, Tensor] = {}
        self.thread = this_thread()

    def collects(self, name: str) -> bool:
        """Whether ``inputs`` gathers an input."""
        return self.collect if isinstance(self.collect, bool) else name in self.collect

    def is_elsewhere(self) -> bool:
        """Whether another thread's pass is running."""
        return is_elsewhere(self.thread)


class SiteTaps:
    """Taps on sites. They store nothing but the pass that is running, while it runs (None: the taps do nothing).

    Args:
        adapter: of the model.
        names: the sites that are tapped.
        streams: blocks whose residual stream is gathered with the sites' inputs, by the name it gets there.

    Attributes:
        edits: changes of the sites' weights that act in every pass; what a pass sees and replaces is the changed output.
    """

    def __init__(self, adapter: Adapter, names: Sequence[str], streams: Mapping[str, int] | None = None) -> None:
        self.adapter, self.names, self.streams = adapter, list(names), dict(streams or {})
        self.edits: list[Mapping[str, SiteEdit]] = []
        self.current: SitePass | None = None

    def put_on(self, undo: Later) -> None:
        """Taps every site.

        Args:
            undo: notes how to remove the taps.
        """
        for name in self.names:
            for handle in self.adapter.tap(name, partial(self._read, name), partial(self._write, name)):
                undo(handle.remove)
        for name, layer in self.streams.items():
            undo(self.adapter.tap_stream(layer, partial(self._read_stream, name)).remove)

    def on(self) -> Change[None]:
        """Inside, the taps are on the model, which is frozen and without users' hooks; other threads wait."""
        return Change(self._on)

    def _on(self, undo: Later) -> None:
        enter(undo, turn(self.adapter.model))
        enter(undo, others_wait(self.adapter.model))
        copies_are_clean(undo, self.adapter)
        enter(undo, frozen(self.adapter))
        enter(undo, users_hooks_aside(self.adapter))
        self.put_on(undo)

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
        names = [*self.names, *filter(run.collects, self.streams)]
        wrong = {name: run.times[name] for name in names if run.times[name] != 1}
        if not wrong:
            return
        if (moved := self.adapter.moved()) is not None:
            raise RuntimeError(
                f"{moved} was replaced by another module after it was tapped, as adding or removing an SAE does: detach the "
                "decomposition, and attach it again."
            )
        sites = ", ".join(f"{name} {n} times" for name, n in list(wrong.items())[:6])
        more = f" (and {len(wrong) - 6} more)" if len(wrong) > 6 else ""
        reason = (
            "a layer that a model uses several times cannot be decomposed, so use a copy of it for each time"
            if max(wrong.values()) > 1
            else "the model does not compute them the way its adapter expects, so masks and hooks would not act"
        )
        raise RuntimeError(f"In one forward pass these sites did not run exactly once: {sites}{more}; {reason}.")

    def _read(self, name: str, x: Tensor) -> None:
        run = self.current
        if run is None or run.is_elsewhere():
            return
        run.waiting[name] = x
        if run.collects(name):
            layout = self.adapter.layout(name)
            run.inputs[name] = layout.input_of_site(x) if layout.by_head or layout.x_has_heads else x
        if run.read is not None:
            run.read(name, x)

    def _read_stream(self, name: str, x: Tensor) -> None:
        run = self.current
        if run is None or run.is_elsewhere() or not run.collects(name):
            return
        run.inputs[name] = x
        run.times[name] += 1

    def _write(self, name: str, y: Tensor) -> Tensor | None:
        run = self.current
        if run is None or run.is_elsewhere():
            return None
        x = run.waiting.pop(name, None)
        if x is None:  # a second HookPoint for the same product, as some versions fire
            return None
        run.times[name] += 1
        edits = [edit[name] for edit in self.edits if name in edit]
        for edit in edits:
            y = edit.output(self.adapter, name, x, y)
        replaced = None if run.function is None else run.function(name, x, y)
        return y if replaced is None and edits else replaced
