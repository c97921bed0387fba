"""What transcoders learn, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tl_vpd.baselines.transcoders.activations import BANDWIDTH
from tl_vpd.checks import LARGEST_SEED
from tl_vpd.frozen import Frozen

Loss = Literal["local", "cascading", "parallel", "independent"]


class TranscoderConfig(Frozen):
    """Settings of ``train_transcoders``.

    ==============  ===========================================================================================
    loss            what is minimised
    ==============  ===========================================================================================
    local           each MLP's output: the share of its variance that is left unexplained, averaged over layers
    cascading       KL(target ‖ replaced), every MLP replaced, each encoder reading the replaced residual stream
    parallel        the same, each encoder reading the target's residual stream
    independent     the same with one MLP replaced at a time, averaged over layers
    ==============  ===========================================================================================
    """

    n_latents: int = Field(1024, ge=1)
    """Latents per layer."""
    cross_layer: bool = False
    """Whether a latent writes to its own MLP's output and to those of all later layers, or to its own alone."""
    activation: Literal["batch_top_k", "jump_relu"] = "batch_top_k"
    k: float = Field(16.0, gt=0)
    """Active latents per token and layer: exactly, on average over a batch (batch top-k), or as aimed at (JumpReLU)."""
    skip: bool = False
    """Whether each MLP's output also gets a learned linear function of its input."""
    layers: tuple[int, ...] | None = None
    """Layers whose MLPs are replaced (None: all)."""
    loss: Loss = "local"
    steps: int = Field(2_000, ge=1)
    batch_size: int = Field(16, ge=1)
    """Rows of tokens in a batch."""
    seed: int = Field(0, ge=-(1 << 63), le=LARGEST_SEED)
    lr: float = Field(3e-3, gt=0)
    lr_final: float = Field(0.1, ge=0, le=1)
    """Factor of the learning rate at the end of its cosine."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of Adam."""
    clip: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient (None: any)."""
    sparsity: float = Field(1.0, ge=0)
    """JumpReLU: coefficient of ``(L0 / k − 1)²``, averaged over layers."""
    bandwidth: float = Field(BANDWIDTH, gt=0)
    """JumpReLU: width ε of the straight-through gradient."""
    threshold_lr: float = Field(10.0, gt=0)
    """JumpReLU: factor of the learning rate of thresholds, which must follow encoders that change."""
    dead_after: int = Field(50, ge=1)
    """A latent is dead when it was inactive in this many batches."""
    revive: float = Field(1 / 32, ge=0)
    """Coefficient of the loss that lets dead latents explain what is left of their own MLP's output (local loss only)."""
    revive_k: int = Field(64, ge=1)
    """Dead latents per token that take part in it."""

    @model_validator(mode="after")
    def _fits(self) -> TranscoderConfig:
        if self.k > self.n_latents:
            raise ValueError(f"k={self.k:g} latents of n_latents={self.n_latents} cannot be active: lower k.")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"layers={self.layers}: give each layer once, and at least one.")
        if self.activation == "batch_top_k":
            self.refuse_unused(
                ("sparsity", "bandwidth", "threshold_lr"), "they are JumpReLU's; batch top-k needs neither."
            )
        if self.loss != "local":
            self.refuse_unused(("revive", "revive_k", "dead_after"), "dead latents are revived under the local loss.")
        return self
