"""Attention in terms of subcomponents: which pairs of Q and K look where, across heads, and what V and O then move."""

from tl_vpd.analysis.attention.mean import MeanStrengths, mean_strengths
from tl_vpd.analysis.attention.norms import HeadNorms, head_norms, spread_over_heads
from tl_vpd.analysis.attention.offsets import AttentionByOffset, attention_by_offset
from tl_vpd.analysis.attention.ov import OVConfig, OVOverlap, ov_overlap, random_overlap
from tl_vpd.analysis.attention.pair_ablation import pair_ablation_hooks
from tl_vpd.analysis.attention.score_terms import ScoreTerms, pattern_of, score_terms
from tl_vpd.analysis.attention.static import StaticStrengths, static_strengths, strongest_static
from tl_vpd.analysis.attention.values import ValueGivenKey, head_alignment, value_given_key

__all__ = [
    "AttentionByOffset",
    "HeadNorms",
    "MeanStrengths",
    "OVConfig",
    "OVOverlap",
    "ScoreTerms",
    "StaticStrengths",
    "ValueGivenKey",
    "attention_by_offset",
    "head_alignment",
    "head_norms",
    "mean_strengths",
    "ov_overlap",
    "pair_ablation_hooks",
    "pattern_of",
    "random_overlap",
    "score_terms",
    "spread_over_heads",
    "static_strengths",
    "strongest_static",
    "value_given_key",
]
