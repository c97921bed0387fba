"""Γ, the causal-importance function: from clean site inputs to one importance in [0, 1] per subcomponent and token."""

from tl_vpd.importance.build import build
from tl_vpd.importance.config import GammaConfig
from tl_vpd.importance.decomposed import DecomposedWeights
from tl_vpd.importance.squash import lower_leaky, upper_leaky

__all__ = ["DecomposedWeights", "GammaConfig", "build", "lower_leaky", "upper_leaky"]
