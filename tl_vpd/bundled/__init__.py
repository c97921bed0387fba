"""The model and decomposition that ship: a two-layer GPT-NeoX of the standard library's source, decomposed."""

from tl_vpd.bundled.loading import (
    MODEL,
    decomposition,
    evaluation,
    model,
    tokens,
    training_record,
)

__all__ = [
    "MODEL",
    "decomposition",
    "evaluation",
    "model",
    "tokens",
    "training_record",
]
