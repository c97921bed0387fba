"""Files and names that describe a run: which model, which tokens, and the three configs of ``tl_vpd.decompose``."""

from tl_vpd.recipe.data import DataRecipe, text_windows
from tl_vpd.recipe.model import ModelRecipe, usable_device
from tl_vpd.recipe.recipe import Recipe

__all__ = ["DataRecipe", "ModelRecipe", "Recipe", "text_windows", "usable_device"]
