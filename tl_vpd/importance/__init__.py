"""Γ, the causal-importance function: clean site inputs in, one importance in [0, 1] a subcomponent and token out."""

from tl_vpd.importance.build import Gamma, build
from tl_vpd.importance.config import GammaConfig
from tl_vpd.importance.decomposed import DecomposedWeights
from tl_vpd.importance.squash import lower_leaky, upper_leaky

__all__ = ["DecomposedWeights", "Gamma", "GammaConfig", "build", "lower_leaky", "upper_leaky"]
