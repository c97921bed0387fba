"""Evaluation: reconstruction by mask mode, sparsity, adversaries, aggregation, transfer, splitting, controls, and a verdict."""

from tl_vpd.evaluation.adversaries import STANDARD, Adversary, adversaries, attack
from tl_vpd.evaluation.cancelling import cancelling_pairs
from tl_vpd.evaluation.consistency import consistency
from tl_vpd.evaluation.evaluate import BUDGETS, MEASURES, evaluate
from tl_vpd.evaluation.feature_splitting import alive_of, sizes, train_sizes
from tl_vpd.evaluation.future_leakage import foresight
from tl_vpd.evaluation.hidden import hidden_errors
from tl_vpd.evaluation.mask_transfer import transfer
from tl_vpd.evaluation.modes import compute_recovered
from tl_vpd.evaluation.off_distribution import scrambled, slices
from tl_vpd.evaluation.report import Evaluation
from tl_vpd.evaluation.sample import ALIVE, Sample, sampled
from tl_vpd.evaluation.sparsity_sweep import resolution
from tl_vpd.evaluation.union_test import aggregation, aggregation_pairs
from tl_vpd.evaluation.verdict import Check, checks, warnings_of

__all__ = [
    "ALIVE",
    "BUDGETS",
    "MEASURES",
    "STANDARD",
    "Adversary",
    "Check",
    "Evaluation",
    "Sample",
    "adversaries",
    "aggregation",
    "aggregation_pairs",
    "alive_of",
    "attack",
    "cancelling_pairs",
    "checks",
    "compute_recovered",
    "consistency",
    "evaluate",
    "foresight",
    "hidden_errors",
    "resolution",
    "sampled",
    "scrambled",
    "sizes",
    "slices",
    "train_sizes",
    "transfer",
    "warnings_of",
]
