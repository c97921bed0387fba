"""The model and decomposition that ship: a two-layer GPT-NeoX of the standard library's source, decomposed."""

from tl_vpd.bundled.loading import (
    MODEL,
    decomposition,
    evaluation,
    model,
    tokens,
    training_record,
)
from tl_vpd.bundled.real_model import smollm2

__all__ = [
    "MODEL",
    "decomposition",
    "evaluation",
    "model",
    "smollm2",
    "tokens",
    "training_record",
]
