"""A model in which every reader sees every source somewhere between its value and an ablated one, edge by edge.

    input_R = residual stream + Σ_w (1 − m_wR) (ablated_w − value_w),      m = 1 for the circuit, r ∈ [0, 1] for every other edge

where w runs over the sources before the reader R, and a source's value is that of this pass, downstream of the other edges. The
residual stream itself is left as it is: each reader gets a changed copy. With every edge at r = 0 and the values of other
prompts, all readers see what they see on those prompts, and the logits are those of the other prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import Unsupported
from tl_vpd.adapters.edge_hooks import edge_hooks
from tl_vpd.analysis.audit.ablate import AblatedModel
from tl_vpd.analysis.audit.edge_set import EdgeSet, Reader

TOLERANCE = 5e-2
"""How far the sources' sum may be from the residual stream, relative to it, apart from a constant."""


@dataclass(repr=False)
class _Pass:
    """The sources' differences of one pass, as far as it has come.

    TransformerLens asks every hook for its ``repr``, which would write out all tensors.
    """

    m: Float[Tensor, "#batch #pos every"]
    ablated: Mapping[str, Tensor]
    start: Tensor | None = None
    fixed: Mapping[str, Tensor] | None = None
    differences: list[Float[Tensor, "batch pos source d_model"]] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def source(self, name: str, value: Tensor, hook: Any) -> Tensor | None:
        """Notes ``ablated − value`` of a source's hook."""
        self.ran.append(name)
        first = not self.differences
        if first and self.start is not None:
            value = self.start.to(value)
        difference = self.ablated[name].to(value) - value if self.fixed is None else self.fixed[name].to(value)
        self.differences.append(difference if difference.ndim == 4 else difference.unsqueeze(2))
        return value if first and self.start is not None else None

    def reader(self, reader: Reader, where: slice, x: Tensor, hook: Any) -> Tensor:
        """The input of a reader's targets, ``[batch, pos, target, d_model]``, or without the target axis if there is one."""
        self.ran.append(reader.hook)
        if len(self.differences) > 1:
            self.differences = [torch.cat(self.differences, 2)]
        m = self.m[..., where].unflatten(-1, (len(reader.targets), reader.n_sources))
        change = (1 - m).to(x) @ self.differences[0][:, :, : reader.n_sources]
        return x + (change if x.ndim == 4 else change.squeeze(2))


class EdgeAblatedModel(AblatedModel):
    """Runs of a model under factors for every edge. A context manager: leaving it puts the model back.

    Args:
        model: the target.
        edge_set: the edges.
        tokens: the prompts.
        token_mask: False at padding (None: no padding).

    Raises:
        Unsupported: the model has no hooks for edges, or its residual stream is not the sum of its heads and MLPs.
    """

    node_set: EdgeSet

    def __init__(
        self,
        model: nn.Module,
        edge_set: EdgeSet,
        tokens: Int[Tensor, "batch pos"],
        token_mask: Bool[Tensor, "batch pos"] | None,
    ) -> None:
        super().__init__(model, edge_set, tokens, token_mask)

    def __enter__(self) -> EdgeAblatedModel:
        super().__enter__()
        try:
            self._stack.enter_context(edge_hooks(self.adapter))
            self._require_sum()
        except BaseException:
            self._stack.close()
            raise
        return self

    @torch.no_grad()
    def _require_sum(self) -> None:
        """Raises Unsupported unless the sources add up to the last residual stream, apart from a constant."""
        last: list[Tensor] = []
        with self.model.hooks(fwd_hooks=[(self.node_set.readers[-1].hook, lambda x, hook: last.append(x))]):  # type: ignore[operator]
            values = self.values(self.tokens, self.token_mask)
        sources = [v.sum(2) if v.ndim == 4 else v for v in (value.double() for value in values.values())]
        real = torch.ones_like(self.tokens, dtype=torch.bool) if self.token_mask is None else self.token_mask
        rest = (last[0].double() - sum(sources))[real]
        error = float((rest - rest.mean(0)).norm() / last[0].double()[real].norm())
        if not error <= TOLERANCE:
            raise Unsupported(
                f"The residual stream of this {type(self.model).__name__} is not the sum of its heads and MLPs (it differs by "
                f"{error:.1%}; norms after them do this), so it has no edges: audit its nodes."
            )

    def run(
        self,
        m: Float[Tensor, "#batch #pos total"],
        ablated: Mapping[str, Tensor],
        *,
        start: Float[Tensor, "batch pos d_model"] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits with the edges' factors ``m``.

        Args:
            m: the factors, in the order of the edge set.
            ablated: values by hook.
            start: what enters the first block instead (None: the prompts' embeddings).
            fixed: ``ablated − value`` by hook, in place of this pass's.

        Raises:
            RuntimeError: a hook did not run exactly once.
        """
        edges, among = self.node_set, self.node_set.among
        if among is not None:
            every = m.new_ones(*m.shape[:-1], edges.every)
            m = every.index_copy(-1, torch.tensor(among, device=m.device), m)
        this, at = _Pass(m, ablated, start, fixed), 0
        hooks: list[tuple[str, Any]] = [(site.hook, partial(this.source, site.hook)) for site in edges.hook_sites]
        for reader in edges.readers:
            where = slice(at, at := at + len(reader.targets) * reader.n_sources)
            hooks.append((reader.hook, partial(this.reader, reader, where)))
        with self.model.hooks(fwd_hooks=hooks):  # type: ignore[operator]
            logits = self.adapter.run(self.tokens, self.token_mask)
        self._require([name for name, _ in hooks if this.ran.count(name) != 1])
        return logits
