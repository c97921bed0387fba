"""A model in which latents of transcoders (or of SAEs of MLPs' outputs) lie somewhere between their values and ablated ones.

    output of MLP j = y + Σ_i (a'_i − a_i) W_dec,i→j,     a' = ablated + m (a − ablated)

where y is what the model's MLP puts out in this pass, and a_i are the latents of the layers i that write to it: their encoders
read this pass. So what the transcoders do not explain (circuit-tracer's error nodes) stays on, and at m = 1 the model is itself.
A latent is written ``blocks.3.transcoder:4821@5``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.analysis.audit.ablate import AblatedModel
from tl_vpd.analysis.audit.node_set import HookSite, NodeSet, among_of
from tl_vpd.baselines.transcoders import ReplacedModel, Transcoders


def latent_set_of(transcoders: Transcoders, among: str | Sequence[str] | None) -> NodeSet:
    """Every latent of every layer.

    Args:
        transcoders: whose latents.
        among: patterns of names (``blocks.1.*``): only these are audited (None: all).

    Raises:
        KeyError: a pattern matches nothing.
    """
    names = {layer: f"blocks.{layer}.transcoder" for layer in transcoders.layers}
    return among_of(
        [HookSite(names[layer], names[layer], "column", n) for layer, n in transcoders.n_latents.items()], among
    )


class LatentAblatedModel(AblatedModel):
    """Runs of a model under factors for every latent. A context manager: leaving it puts the model back.

    Args:
        model: the target.
        node_set: the latents.
        tokens: the prompts.
        token_mask: False at padding (None: no padding).
        transcoders: whose latents.

    Raises:
        ValueError: the transcoders are of another model, or their thresholds are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        node_set: NodeSet,
        tokens: Int[Tensor, "batch pos"],
        token_mask: Bool[Tensor, "batch pos"] | None,
        transcoders: Transcoders,
    ) -> None:
        super().__init__(model, node_set, tokens, token_mask)
        self.transcoders = transcoders
        self.replaced = ReplacedModel(model, transcoders.layers)
        self.replaced.check(transcoders)

    def __enter__(self) -> LatentAblatedModel:
        self._stack.enter_context(self.replaced)
        return self

    @torch.no_grad()
    def clean(self) -> Float[Tensor, "batch pos vocab"]:
        """Logits of the model itself on the prompts."""
        return self.replaced.clean(self.tokens, self.token_mask).output

    @torch.no_grad()
    def values(self, tokens: Tensor, token_mask: Tensor | None) -> dict[str, Tensor]:
        """All latents on these prompts, in the model's own pass."""
        clean = self.replaced.clean(tokens, token_mask)
        read = clean.outputs if self.transcoders.reads == "mlp_out" else clean.inputs
        return {
            f"blocks.{layer}.transcoder": self.transcoders.encode(layer, read[layer])
            for layer in self.transcoders.layers
        }

    def run(
        self, m: Float[Tensor, "#batch #pos total"], ablated: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits with the latents' factors ``m``.

        Args:
            m: the factors, in the order of the node set.
            ablated: values by name.
        """
        assert isinstance(self.node_set, NodeSet)
        where = dict(zip((site.name for site in self.node_set.hook_sites), self.node_set.slices(), strict=True))
        changes: dict[int, Tensor] = {}

        def replace(layer: int, x: Tensor, y: Tensor) -> Tensor:
            name = f"blocks.{layer}.transcoder"
            if name in where:
                acts = self.transcoders.encode(layer, y if self.transcoders.reads == "mlp_out" else x)
                changes[layer] = (
                    torch.lerp(
                        ablated[name].to(acts).expand_as(acts), acts, m[..., where[name]].to(acts).expand_as(acts)
                    )
                    - acts
                )
            for source in self.transcoders.sources(layer):
                if source in changes:
                    W_dec = self.transcoders[source].W_dec[self.transcoders.targets(source).index(layer)]
                    y = y + (changes[source] @ W_dec).view_as(y)
            return y

        return self.replaced.run(self.tokens, replace, self.token_mask)
