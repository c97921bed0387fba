"""Evaluation: reconstruction by mask mode, sparsity, adversaries, unions, transfer of masks, controls, and a verdict."""

from tl_vpd.evaluation.adversaries import STANDARD, Adversary, Attack, adversaries, attack
from tl_vpd.evaluation.cancelling import cancelling_pairs
from tl_vpd.evaluation.check import Check
from tl_vpd.evaluation.config import LADDER, MEASURES, EvaluationConfig
from tl_vpd.evaluation.consistency import consistency
from tl_vpd.evaluation.evaluate import evaluate
from tl_vpd.evaluation.feature_splitting import alive_subcomponents, decompose_at_sizes, feature_splitting
from tl_vpd.evaluation.future_leakage import future_leakage
from tl_vpd.evaluation.hidden import hidden_errors
from tl_vpd.evaluation.importance_statistics import ALIVE
from tl_vpd.evaluation.mask_transfer import mask_transfer
from tl_vpd.evaluation.modes import compute_recovered
from tl_vpd.evaluation.nontarget import nontarget
from tl_vpd.evaluation.nulls import decompose_shuffled, shuffled_model, untrained
from tl_vpd.evaluation.off_distribution import off_distribution, scrambled
from tl_vpd.evaluation.probe_null import ProbeNull, probe_null
from tl_vpd.evaluation.redundancy import Redundancy, redundancy
from tl_vpd.evaluation.report import Evaluation
from tl_vpd.evaluation.sample import Sample, sampled
from tl_vpd.evaluation.sparsity_sweep import sparsity_sweep
from tl_vpd.evaluation.union_test import union_test, union_test_pairs
from tl_vpd.evaluation.verdict import checks, warnings_of

__all__ = [
    "ALIVE",
    "LADDER",
    "MEASURES",
    "STANDARD",
    "Adversary",
    "Attack",
    "Check",
    "Evaluation",
    "EvaluationConfig",
    "ProbeNull",
    "Redundancy",
    "Sample",
    "adversaries",
    "alive_subcomponents",
    "attack",
    "cancelling_pairs",
    "checks",
    "compute_recovered",
    "consistency",
    "decompose_at_sizes",
    "decompose_shuffled",
    "evaluate",
    "feature_splitting",
    "future_leakage",
    "hidden_errors",
    "mask_transfer",
    "nontarget",
    "off_distribution",
    "probe_null",
    "redundancy",
    "sampled",
    "scrambled",
    "shuffled_model",
    "sparsity_sweep",
    "union_test",
    "union_test_pairs",
    "untrained",
    "warnings_of",
]
