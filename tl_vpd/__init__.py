"""tl_vpd: adVersarial Parameter Decomposition for TransformerLens.

>>> run = tl_vpd.decompose(model, tokens, tl_vpd.VPDConfig(steps=20_000))     # doctest: +SKIP
>>> with run.decomposition.attach(model) as attached:                         # doctest: +SKIP
...     logits, cache = model.run_with_cache(tokens)
"""

from tl_vpd.adapters import Unsupported, sites
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation import Evaluation, evaluate
from tl_vpd.hooks import Attached, CausalImportances
from tl_vpd.site import Site, Subcomponent
from tl_vpd.training import Run, VPDConfig, decompose

__all__ = [
    "Attached",
    "CausalImportances",
    "Decomposition",
    "Evaluation",
    "Run",
    "Site",
    "Subcomponent",
    "Unsupported",
    "VPDConfig",
    "decompose",
    "evaluate",
    "sites",
]
