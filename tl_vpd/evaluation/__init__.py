"""Evaluation: reconstruction by mask mode, sparsity, the fresh adversary, and controls."""

from tl_vpd.evaluation.evaluate import BUDGETS, Evaluation, evaluate
from tl_vpd.evaluation.foresight import foresight
from tl_vpd.evaluation.modes import compute_recovered

__all__ = ["BUDGETS", "Evaluation", "compute_recovered", "evaluate", "foresight"]
