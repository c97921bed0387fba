"""Copying with and without a spare: two layers of attention, trained so that each can copy without the other.

A row is a beginning-of-sequence token and a block of random tokens, twice. In the second block the next token is the one after
the same place in the first, so a single head that attends ``length − 1`` tokens back suffices. With ``layer_dropout`` each
layer's output is left out of a row with that probability in training (never all of them): both layers learn to copy, and what
one of them does is spare as long as the other is there. The positive control of ``tl_vpd.evaluation.redundancy`` (Vigouroux &
Sharkey, arXiv 2607.13047: layer dropout 0.4). With one layer, nothing is spare.

>>> Twice(d_vocab=9, length=3, batch_size=2).at(0).shape
torch.Size([2, 7])
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.adapters import adapt
from tl_vpd.checks import check_fields
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.truth import Truth
from tl_vpd.importance import GammaConfig
from tl_vpd.toys.toy import SeededBatches, TargetTraining, Toy
from tl_vpd.toys.transformers import ATTENTION_ONLY, accuracy_at, cross_entropy_at, small_transformer
from tl_vpd.training import VPDConfig, new_decomposition
from tl_vpd.training.data import Batches

BOS = 0
TRAINING = TargetTraining(steps=1_500, rows=64, lr=3e-3, schedule="cosine", weight_decay=0.1)


@dataclass(frozen=True)
class Twice(SeededBatches):
    """Batches ``[batch_size, 1 + 2 · length]`` of a block of random tokens, twice."""

    rows: ClassVar[str] = "blocks, twice"
    d_vocab: int
    length: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, d_vocab=2, length=2, batch_size=1)

    @property
    def context(self) -> int:
        """Tokens in a row."""
        return 1 + 2 * self.length

    def at(self, step: int) -> Int[Tensor, "batch pos"]:
        """The batch of a step."""
        generator = self.generator("twice", step)
        block = torch.randint(1, self.d_vocab, (self.batch_size, self.length), generator=generator)
        return torch.cat([torch.full((self.batch_size, 1), BOS), block, block], dim=1)


@dataclass(frozen=True)
class Copying(Toy):
    """The toy; ``layer_dropout`` 0 or ``n_layers`` 1 leaves it without a spare."""

    n_layers: int = 2
    layer_dropout: float = 0.4
    """Probability with which a layer is left out of a row in training."""
    d_vocab: int = 17
    """Tokens, the beginning-of-sequence token among them."""
    length: int = 6
    """Of a block."""
    d_model: int = 32
    training: TargetTraining = TRAINING
    output: ClassVar[Literal["kl", "mse"]] = "kl"

    def __post_init__(self) -> None:
        self.check(n_layers=1, layer_dropout=(0.0, 0.9), d_vocab=2, length=2, d_model=2)

    def build(self, seed: int = 0) -> Any:
        """Layers of one head each, positions added to queries and keys only, no norms."""
        return small_transformer(
            seed,
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_heads=1,
            d_head=self.d_model,
            d_vocab=self.d_vocab,
            n_ctx=1 + 2 * self.length,
            **ATTENTION_ONLY,
        )

    def batches(self, rows: int, seed: int = 0) -> Batches:
        """Random blocks, twice."""
        return Twice(self.d_vocab, self.length, rows, seed)

    def loss(self, model: Any, batch: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Cross-entropy with the next token in the second block, under layer dropout."""
        # The batch decides what is left out.
        generator = torch.Generator().manual_seed(zlib.crc32(batch.cpu().numpy().tobytes()))
        active = torch.rand(len(batch), self.n_layers, generator=generator) >= self.layer_dropout
        one = torch.randint(self.n_layers, (len(batch),), generator=generator)
        active[torch.arange(len(batch)), one] |= ~active.any(1)
        return cross_entropy_at(self._with_layers(model, batch, active), batch, self._copied(batch))

    def quality(self, model: Any) -> dict[str, float]:
        """Accuracy in the second block, with all layers and with each of them alone."""
        tokens = self.batches(64, seed=-1).at(0)
        where = self._copied(tokens)
        result = {"accuracy": accuracy_at(model(tokens), tokens, where)}
        for layer in range(self.n_layers):
            alone = torch.zeros(len(tokens), self.n_layers, dtype=torch.bool)
            alone[:, layer] = True
            result[f"accuracy_layer_{layer}"] = accuracy_at(self._with_layers(model, tokens, alone), tokens, where)
        return result

    def truth(self, model: Any) -> Truth:
        """Only inputs: with a spare, which layer is needed is not determined."""
        return Truth(probe=self.batches(64, seed=-2).at(0))

    def _copied(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Where the next token is known: from the end of the first block on."""
        return (torch.arange(tokens.shape[1]) >= self.length).expand(tokens.shape)

    def _with_layers(self, model: Any, tokens: Tensor, active: Bool[Tensor, "batch layer"]) -> Tensor:
        """Logits with the outputs of the active layers of every row alone."""

        def only(layer: int) -> Any:
            return lambda out, hook: out * active[:, layer, None, None].to(out.dtype)

        hooks = [(f"blocks.{i}.hook_attn_out", only(i)) for i in range(self.n_layers)]
        logits: Tensor = model.run_with_hooks(tokens, fwd_hooks=hooks)
        return logits


@torch.no_grad()
def first_layer_alone(model: Any) -> Decomposition:
    """A decomposition by hand that calls the first layer important everywhere, and later ones nowhere.

    Its subcomponents are the singular directions of every weight. Where a later layer can copy as well, those of the first have
    hidden twins.
    """
    adapter = adapt(model)
    config = VPDConfig(C=adapter.d_model, gamma=GammaConfig(kind="per_site_mlps", hidden=1))
    vpd = new_decomposition(model, config)
    for parameter in vpd.gamma.parameters():
        parameter.zero_()
    for name, bias in zip(vpd.sites, vpd.gamma.output_biases(), strict=True):
        u, sigma, vh = torch.linalg.svd(adapter.weight(name), full_matrices=False)
        vpd.V[name].copy_(u)
        vpd.U[name].copy_(sigma[:, None] * vh)
        bias.fill_(1.0 if name.startswith("blocks.0.") else -1.0)
    return vpd
