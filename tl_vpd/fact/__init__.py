"""A fact of a real language model, decomposed, erased and rewired: ``tl-vpd fact``.

>>> run_fact(Path("fact"), finished=True, say=print)                        # doctest: +SKIP
"""

from tl_vpd.fact.run import run_fact

__all__ = ["run_fact"]
