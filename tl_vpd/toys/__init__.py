"""Models with known truth: built, trained in seconds to minutes on a CPU, and decomposed by every method.

>>> TOYS["tms_5_2"].build().embed
Linear(in_features=5, out_features=2, bias=False)
"""

from tl_vpd.evaluation.truth import SiteTruth, Truth
from tl_vpd.toys.compressed import Compressed
from tl_vpd.toys.copying import Copying
from tl_vpd.toys.grammar import Grammar
from tl_vpd.toys.induction import Induction
from tl_vpd.toys.recipes import TOYS, recipe
from tl_vpd.toys.tms import TMS
from tl_vpd.toys.toy import TargetTraining, Toy, train

__all__ = [
    "TMS",
    "TOYS",
    "Compressed",
    "Copying",
    "Grammar",
    "Induction",
    "SiteTruth",
    "TargetTraining",
    "Toy",
    "Truth",
    "recipe",
    "train",
]
