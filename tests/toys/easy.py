"""A toy that learns its circuit in seconds."""

from __future__ import annotations

from tl_vpd.toys import Induction, TargetTraining

INDUCTION = Induction(
    d_vocab=9,
    context=17,
    shortest=4,
    longest=6,
    d_model=32,
    training=TargetTraining(500, 64, 5e-3, "cosine", weight_decay=0.3),
)
