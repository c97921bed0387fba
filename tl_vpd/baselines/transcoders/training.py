"""``train_transcoders``: a small trainer for transcoders of every MLP of a model, all layers in one run.

Every step runs the target on a batch of rows, which gives each MLP's input and output. Under the local loss that is all; end to
end, the model runs again with MLPs replaced (``TranscoderConfig.loss``), and the KL from the target's output is minimised. The
tokens of a step are those of its rows: there is no buffer of shuffled activations.

    >>> plt = train_transcoders(model, tokens, TranscoderConfig(n_latents=768, k=16))        # doctest: +SKIP
    >>> clt = train_transcoders(model, tokens, TranscoderConfig(cross_layer=True, loss="cascading"))     # doctest: +SKIP
"""

from __future__ import annotations

import time
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import trange

from tl_vpd.baselines.transcoders.activations import jump_relu, top_k_of_batch
from tl_vpd.baselines.transcoders.config import TranscoderConfig
from tl_vpd.baselines.transcoders.cost import training_flops
from tl_vpd.baselines.transcoders.losses import revival, sparsity, unexplained
from tl_vpd.baselines.transcoders.replaced_model import Clean, ReplacedModel, clean_outputs
from tl_vpd.baselines.transcoders.transcoders import Transcoder, Transcoders
from tl_vpd.checks import config_of, flag
from tl_vpd.losses import Reconstruction
from tl_vpd.training.data.run_data import run_data
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.schedules import cosine

LAST = 0.1
"""Share of the run, at its end, over whose batches the smallest activation of batch top-k is averaged."""


@torch.inference_mode(False)
@torch.enable_grad()
def train_transcoders(
    model: nn.Module, tokens: Any, config: TranscoderConfig | None = None, *, progress: bool = True
) -> Transcoders:
    """Trains transcoders of a model's MLPs on rows of tokens.

    Args:
        model: the target; its weights, hooks and flags are afterwards as they were.
        tokens: as for ``tl_vpd.decompose``.
        config: what is learned, and how (None: ``TranscoderConfig()``).
        progress: show a bar.

    Raises:
        FloatingPointError: the loss is not finite.
        TypeError: an argument is of another type.
        ValueError: the tokens or layers do not fit the model.
    """
    config, progress = config_of(TranscoderConfig, config), flag("progress", progress)
    with ReplacedModel(model, config.layers) as replaced:
        data = run_data(replaced.adapter, tokens, config.batch_size, config.seed, World())
        try:
            start = time.perf_counter()
            trainer = TranscoderTrainer(replaced, config, data.at(0))
            for step in trange(config.steps, disable=not progress, desc="Transcoders", unit="step"):
                trainer.step(step, *data.at(step))
        finally:
            data.close()
    transcoders = trainer.transcoders
    transcoders.record |= {
        "config": config.model_dump(mode="json"),
        "flops": trainer.n_tokens * training_flops(model, transcoders, config, data.context),
        "seconds": time.perf_counter() - start,
        "tokens": trainer.n_tokens,
    }
    return transcoders.requires_grad_(False)


def new_transcoders(clean: Clean, config: TranscoderConfig, real: Bool[Tensor, "batch pos"]) -> Transcoders:
    """Transcoders at the start: encoders whose pre-activations have variance 1, small decoders, the mean output as bias.

    A latent's decoder to its own MLP points in a random direction, those to later MLPs are 0. JumpReLU's thresholds are the
    batch's quantiles that let ``k`` latents per token through.

    Args:
        clean: a pass of the target, for the sizes of inputs and outputs.
        config: of the training.
        real: False at padding.
    """
    by_layer: dict[int, Transcoder] = {}
    layers, n = sorted(clean.inputs), config.n_latents
    for i, layer in enumerate(layers):
        x, y = clean.inputs[layer][real], clean.outputs[layer][real]
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + layer) % (1 << 63))
        W_enc = torch.randn(x.shape[1], n, generator=generator).to(x)
        W_enc = W_enc / (x @ W_enc).std(0).clamp_min(1e-6)
        directions = torch.randn(n, y.shape[1], generator=generator).to(y)
        W_dec = y.new_zeros(len(layers) - i if config.cross_layer else 1, n, y.shape[1])
        W_dec[0] = 0.1 * directions / directions.norm(dim=1, keepdim=True) * (y - y.mean(0)).norm(dim=1).mean()
        b_enc = -(x.mean(0) @ W_enc)  # pre-activations have mean 0, as well
        threshold = x.new_zeros(n)
        if config.activation == "jump_relu":
            z = (x @ W_enc + b_enc).flatten()
            threshold += z.kthvalue(max(1, z.numel() - round(config.k * len(x)))).values.clamp(min=0)
        skip = x.new_zeros(x.shape[1], y.shape[1]) if config.skip else None
        by_layer[layer] = Transcoder(W_enc, b_enc, W_dec, y.mean(0), threshold, skip)
    return Transcoders(by_layer, cross_layer=config.cross_layer)


class TranscoderTrainer:
    """Transcoders, their optimizer, and what a training keeps in mind of them.

    Args:
        replaced: the target, tapped.
        config: of the training.
        first: a batch and its padding, from which the transcoders start.

    Attributes:
        transcoders: that are trained.
        inactive_for: by layer, how many batches each latent has been inactive.
        n_tokens: real tokens so far.
    """

    def __init__(
        self,
        replaced: ReplacedModel,
        config: TranscoderConfig,
        first: tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None],
    ) -> None:
        self.replaced, self.config = replaced, config
        tokens, token_mask = first
        clean, real = replaced.clean(tokens, token_mask), _real(tokens, token_mask)
        self.transcoders = new_transcoders(clean, config, real).requires_grad_(True)
        groups: dict[float, list[nn.Parameter]] = {1.0: [], config.threshold_lr: []}
        for name, parameter in self.transcoders.named_parameters():
            groups[config.threshold_lr if name.endswith("threshold") else 1.0].append(parameter)
        self.optimizer = torch.optim.Adam(
            [{"params": found, "factor": factor} for factor, found in groups.items()], lr=config.lr, betas=config.betas
        )
        self.inactive_for = {
            layer: torch.zeros(n, device=tokens.device) for layer, n in self.transcoders.n_latents.items()
        }
        self.n_tokens = 0
        self._smallest: dict[int, list[Tensor]] = {layer: [] for layer in self.transcoders.layers}

    def step(
        self, step: int, tokens: Int[Tensor, "batch pos"], token_mask: Bool[Tensor, "batch pos"] | None = None
    ) -> float:
        """One step; returns the loss.

        Args:
            step: its number.
            tokens: a batch.
            token_mask: False at padding (None: no padding).

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if step < (1 - LAST) * (self.config.steps - 1):
            self._smallest = {layer: [] for layer in self._smallest}
        loss = self.loss(self.replaced.clean(tokens, token_mask), tokens, token_mask)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"Step {step}: the loss is not finite; lower the learning rate.")
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * self.config.lr * cosine(step, self.config.steps, self.config.lr_final)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.transcoders.parameters(), self.config.clip)
        self.optimizer.step()
        self._set_thresholds()
        self.n_tokens += tokens.numel() if token_mask is None else int(token_mask.sum())
        return float(loss.detach())

    def loss(
        self, clean: Clean, tokens: Int[Tensor, "batch pos"], token_mask: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            clean: the target's pass on it.
            tokens: the batch.
            token_mask: False at padding (None: no padding).
        """
        real = _real(tokens, token_mask)
        z: dict[int, Tensor] = {}

        def encode(layer: int, x: Tensor) -> Tensor:
            one = self.transcoders[layer]
            z[layer] = one.pre_acts(x)
            if self.config.activation == "jump_relu":
                return jump_relu(z[layer], one.threshold, self.config.bandwidth)
            acts = top_k_of_batch(z[layer], self.config.k, token_mask)
            self._note(layer, acts.detach())
            return acts

        if self.config.loss == "cascading":
            output = self.replaced.error_propagating(self.transcoders, tokens, token_mask, encode=encode)
            loss = Reconstruction(clean.output, token_mask=token_mask)(output)
        else:
            outputs = clean_outputs(self.transcoders, clean, encode=encode)
            loss = self._of_outputs(clean, outputs, tokens, token_mask)
        layers = self.transcoders.layers
        for layer in layers:
            one, pre = self.transcoders[layer], z[layer][real]
            if self.config.activation == "jump_relu":
                fires = (pre > one.threshold).any(0)
                loss = loss + self.config.sparsity / len(layers) * sparsity(
                    pre, one.threshold, self.config.k, self.config.bandwidth
                )
                self._count(layer, fires)
            dead = self.inactive_for[layer] >= self.config.dead_after
            if self.config.loss == "local" and self.config.revive and bool(dead.any()):
                y = clean.outputs[layer][real]
                error = (y - outputs[layer][real]).detach()
                again = revival(pre, dead, one.W_dec[0], error, y, self.config.revive_k)
                loss = loss + self.config.revive / len(layers) * again
        return loss

    def _of_outputs(
        self, clean: Clean, outputs: dict[int, Tensor], tokens: Tensor, token_mask: Tensor | None
    ) -> Float[Tensor, ""]:
        """The loss of MLP outputs that were computed from the target's own stream."""
        if self.config.loss == "local":
            real = _real(tokens, token_mask)
            left = [unexplained(clean.outputs[layer][real], y[real]) for layer, y in outputs.items()]
            return torch.stack(left).mean()
        distance = Reconstruction(clean.output, token_mask=token_mask)
        if self.config.loss == "parallel":
            return distance(self.replaced.with_outputs(tokens, outputs, token_mask))
        alone = [distance(self.replaced.with_outputs(tokens, {j: y}, token_mask)) for j, y in outputs.items()]
        return torch.stack(alone).mean()

    def _note(self, layer: int, acts: Tensor) -> None:
        """Batch top-k: which latents are active, and the smallest activation that was left."""
        positive = acts > 0
        self._count(layer, positive.flatten(0, -2).any(0))
        if bool(positive.any()):
            self._smallest[layer].append(acts[positive].min())

    def _count(self, layer: int, fires: Tensor) -> None:
        self.inactive_for[layer] = torch.where(fires, 0.0, self.inactive_for[layer] + 1)

    @torch.no_grad()
    def _set_thresholds(self) -> None:
        """Batch top-k: the mean over the last batches; JumpReLU: not below 0."""
        for layer in self.transcoders.layers:
            threshold = self.transcoders[layer].threshold
            if self.config.activation == "jump_relu":
                threshold.clamp_(min=0)
            elif self._smallest[layer]:
                threshold.fill_(torch.stack(self._smallest[layer]).mean())


def _real(tokens: Tensor, token_mask: Tensor | None) -> Bool[Tensor, "batch pos"]:
    return torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask
