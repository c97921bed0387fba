"""The model and decomposition that ship: a two-layer GPT-NeoX of the standard library's source, decomposed."""

from tl_vpd.bundled.loading import (
    DECOMPOSITION,
    MODEL,
    decomposition,
    evaluation,
    hooked_transformer,
    model,
    tokens,
    training_record,
)

__all__ = [
    "DECOMPOSITION",
    "MODEL",
    "decomposition",
    "evaluation",
    "hooked_transformer",
    "model",
    "tokens",
    "training_record",
]
