"""Γ, the causal-importance function: from clean site inputs to one importance in [0, 1] per subcomponent and token."""

from tl_vpd.importance.build import build
from tl_vpd.importance.config import GammaConfig
from tl_vpd.importance.decomposed import DecomposedWeights
from tl_vpd.importance.squash import lower_leaky, upper_leaky
from tl_vpd.importance.transformer import GammaCache

__all__ = ["DecomposedWeights", "GammaCache", "GammaConfig", "build", "lower_leaky", "upper_leaky"]
