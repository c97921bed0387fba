"""Γ for deep models: one shared transformer for each chunk of sites, which does not see the other chunks' inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.importance.transformer import GammaCache, SharedTransformer


class ChunkedTransformers(nn.Module):
    """``SharedTransformer``s over consecutive chunks of sites (the last may be shorter).

    Args:
        d_in: width by input.
        counts: number of subcomponents by site.
        chunk: number of sites in one.
        causal: whether a position attends to itself and earlier ones alone.
        reads: by site, the input that its transformer reads for it (None: that of the same name).
        size: of each transformer: ``d_ci``, ``n_blocks``, ``n_heads``, ``d_mlp``.
    """

    needs = "inputs"

    def __init__(
        self,
        d_in: Mapping[str, int],
        counts: Mapping[str, int],
        *,
        chunk: int,
        causal: bool = False,
        reads: Mapping[str, str] | None = None,
        **size: int,
    ) -> None:
        super().__init__()
        names, self.causal, reads = list(counts), causal, reads or {}
        chunks = [names[i : i + chunk] for i in range(0, len(names), chunk)]
        self.parts = nn.ModuleList(
            SharedTransformer(
                {name: d_in[name] for name in (reads.get(site, site) for site in sites)},
                {site: counts[site] for site in sites},
                causal=causal,
                **size,
            )
            for sites in chunks
        )

    def forward(
        self,
        inputs: Mapping[str, Float[Tensor, "batch pos _"]],
        token_mask: Bool[Tensor, "batch pos_of_keys"] | None = None,
        cache: GammaCache | None = None,
    ) -> Float[Tensor, "batch pos C_total"]:
        """Pre-sigmoid values of all sites, in their order; arguments as for ``SharedTransformer``."""
        return torch.cat([transformer(inputs, token_mask, cache) for transformer in self.parts], dim=-1)

    def output_biases(self) -> list[Tensor]:
        """The biases that are added last."""
        return [bias for transformer in self.parts for bias in transformer.output_biases()]  # type: ignore[operator, union-attr]

    def rows_of_subcomponents(self) -> dict[str, list[str]]:
        """By parameter that has one row per subcomponent: the sites whose subcomponents they are, in order."""
        return {
            f"parts.{i}.{name}": sites
            for i, transformer in enumerate(self.parts)
            for name, sites in transformer.rows_of_subcomponents().items()  # type: ignore[operator, union-attr]
        }
