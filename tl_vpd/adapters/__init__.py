"""The only room that knows TransformerLens's classes: where a site's input, output and weight are in a model."""

from tl_vpd.adapters.base import Adapter
from tl_vpd.adapters.lookup import adapt, sites
from tl_vpd.adapters.taps import Unsupported

__all__ = ["Adapter", "Unsupported", "adapt", "sites"]
