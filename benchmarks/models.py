"""Models, decompositions and training steps that benchmarks measure, all of random weights.

A step is the trainer's (``trainer_step``), in one of ``VARIANTS``, or that of the method on one page (``reference_step``),
which does the same work on the same numbers as one would first write it: Δ formed, masks stored, every pass separate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tl_vpd.training.distributed.processes import World

SITES = ("*W_Q", "*W_K", "*W_V", "*W_O", "*W_in", "*W_out")


@dataclass(frozen=True)
class Size:
    """A model, its decomposition and a batch.

    Attributes:
        C: subcomponents of Q, K, V, O, in and out.
        needed: GFLOP of the matrix products in a step of the mathematics (not a number: not worked out).
    """

    d_model: int
    d_mlp: int
    vocabulary: int
    batch: int
    context: int
    C: tuple[int, ...]
    d_gamma: int
    d_gamma_mlp: int
    needed: float = float("nan")
    layers: int = 2
    heads: int = 4
    blocks: int = 2

    @property
    def has_reference(self) -> bool:
        """Whether the reference is measured beside the trainer."""
        return self.needed == self.needed


SIZES = {
    "S": Size(64, 256, 256, 16, 32, (64, 64, 128, 128, 256, 256), 128, 512, 7.8),
    "M": Size(256, 1024, 1024, 8, 128, (256, 256, 512, 512, 1024, 1024), 256, 1024, 207.0),
    "V": Size(256, 1024, 50304, 8, 128, (256, 256, 512, 512, 1024, 1024), 256, 1024),
    "L": Size(768, 3072, 50304, 32, 512, (512, 512, 1024, 1024, 3072, 3584), 2048, 8192, layers=4, heads=12, blocks=8),
}
MERGED: dict[str, Any] = {
    "merged": 0.5,
    "minimality": {"kind": "smooth_l0", "frequency_reference": 1024.0},
    "faithfulness": {"kind": "relative"},
    "adversary": {"pool": 4},
    "coefficients": {"delta": 1e3},
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),
    "merged": (MERGED, {}),
    "bfloat16": ({}, {"precision": "bfloat16"}),
    "merged_bfloat16": (MERGED, {"precision": "bfloat16"}),
    "checkpoint": ({}, {"checkpoint": True}),
    "whole_logits": ({}, {"blocked_logits": False}),
    "compiled": ({}, {"compile": True}),
    "compiled_bfloat16": ({}, {"compile": True, "precision": "bfloat16"}),
    "compiled_merged": (MERGED, {"compile": True}),
    "compiled_merged_bfloat16": (MERGED, {"compile": True, "precision": "bfloat16"}),
}
"""Settings of ``VPDConfig`` and of ``ExecutionConfig``."""


def hooked_transformer(*, layers: int, d_model: int, heads: int, vocabulary: int, context: int, **flags: Any) -> Any:
    """A random HookedTransformer.

    Args:
        layers: number of blocks.
        d_model: width of the residual stream.
        heads: attention heads per block.
        vocabulary: number of tokens.
        context: longest prompt.
        flags: other fields of its config.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    settings: dict[str, Any] = {
        "n_layers": layers,
        "d_model": d_model,
        "n_heads": heads,
        "d_head": d_model // heads,
        "d_mlp": 4 * d_model,
        "d_vocab": vocabulary,
        "n_ctx": context,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "seed": 0,
    }
    return HookedTransformer(HookedTransformerConfig(**{**settings, **flags}))


def target_of(size: Size, device: torch.device | None = None) -> Any:
    """The model of a size: rotary positions, RMSNorm; on a GPU where there is one, unless a device is named."""
    return hooked_transformer(
        layers=size.layers,
        d_model=size.d_model,
        heads=size.heads,
        vocabulary=size.vocabulary,
        context=size.context,
        d_mlp=size.d_mlp,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=size.d_model // size.heads,
        device=str(device or ("cuda" if torch.cuda.is_available() else "cpu")),
    )


def config_of(size: Size, sites: tuple[str, ...] = SITES, **recipe: Any) -> Any:
    """The ``VPDConfig`` of a size."""
    from tl_vpd import VPDConfig

    return VPDConfig(
        steps=1000,
        batch_size=size.batch,
        sites=sites,
        C={name: C for name, C in zip(SITES, size.C, strict=True) if name in sites},
        gamma={"d_ci": size.d_gamma, "d_mlp": size.d_gamma_mlp, "n_blocks": size.blocks, "n_heads": 4},
        **recipe,
    )


def trainer_step(
    size: Size,
    variant: str = "paper",
    sites: tuple[str, ...] = SITES,
    *,
    device: torch.device | None = None,
    world: World | None = None,
) -> Callable[[], object]:
    """A step of ``tl_vpd``'s trainer on a random HookedTransformer.

    Args:
        size: of model, decomposition and batch.
        variant: of the trainer.
        sites: patterns of what is decomposed.
        device: where (None: on a GPU, if there is one).
        world: the processes that split the batch (None: one).
    """
    from tl_vpd import ExecutionConfig
    from tl_vpd.forward import MaskedModel
    from tl_vpd.training import Trainer, new_decomposition

    model, (recipe, execution) = target_of(size, device), VARIANTS[variant]
    config = config_of(size, sites, **recipe)
    masked_model = MaskedModel(new_decomposition(model, config), model, fused_attention=True)
    masked_model.__enter__()  # for as long as the benchmark runs
    shape, how = (size.batch, size.context), ExecutionConfig(**execution)
    trainer = Trainer(masked_model, config, shape, execution=how, world=world)
    tokens = random_tokens(size).to(masked_model.adapter.device)
    if world is not None:
        tokens = tokens[list(world.rows(size.batch))]
    return lambda: trainer.step(tokens)


def reference_step(size: Size) -> Callable[[], object]:
    """A step of the paper's recipe by ``tl_vpd.training.reference``, on the same model written out as functions."""
    from tests.training.functional_target import FunctionalTarget
    from tl_vpd.masking.routing import uniform_k
    from tl_vpd.training import new_decomposition
    from tl_vpd.training.reference import Reference, Samples, Site

    model, config = target_of(size), config_of(size)
    vpd, target, shape = new_decomposition(model, config), FunctionalTarget(model), (size.batch, size.context)
    sites = {
        name: Site(target.W[name], target.b[name], vpd.V[name], vpd.U[name], torch.rand(*shape, C + 1).requires_grad_())
        for name, C in vpd.site_axis.counts.items()
    }
    reference, tokens, real = Reference(config, target, sites, vpd.gamma), random_tokens(size), torch.ones(shape).bool()
    rows = range(size.batch)
    slots, generator = torch.arange(size.context).expand(shape), torch.Generator().manual_seed(0)

    def step() -> object:
        sources = {name: torch.rand_like(site.r) for name, site in sites.items()}
        routing = dict(zip(sites, uniform_k(len(sites), shape, generator=generator), strict=True))
        return reference.step(tokens, real, Samples((rows, rows), sources, slots, routing))

    return step


def random_tokens(size: Size) -> Tensor:
    """A batch."""
    return torch.randint(0, size.vocabulary, (size.batch, size.context), generator=torch.Generator().manual_seed(0))
