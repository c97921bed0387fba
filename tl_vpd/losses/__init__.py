"""The losses of VPD, one equation per file (VPD paper, section "Summary of loss terms"):

    L = c_adv · L_adversarial + c_stoch · L_stochastic + c_imp · L_importance + c_freq · L_frequency + c_Δ · L_faithfulness

The first two are one distance between outputs (``reconstruction``) under two kinds of masks.
"""

from tl_vpd.losses.faithfulness import check_relative, faithfulness, faithfulness_terms
from tl_vpd.losses.frequency_minimality import RunningFrequency, frequency_minimality
from tl_vpd.losses.importance_minimality import importance_minimality
from tl_vpd.losses.kl import kl_divergence
from tl_vpd.losses.locality import check_units, locality, locality_terms
from tl_vpd.losses.penalty import Penalty
from tl_vpd.losses.reconstruction import Reconstruction
from tl_vpd.losses.squared_error import squared_error
from tl_vpd.losses.unembedding import Unembedding, unembedded_kl

__all__ = [
    "Penalty",
    "Reconstruction",
    "RunningFrequency",
    "Unembedding",
    "check_relative",
    "check_units",
    "faithfulness",
    "faithfulness_terms",
    "frequency_minimality",
    "importance_minimality",
    "kl_divergence",
    "locality",
    "locality_terms",
    "squared_error",
    "unembedded_kl",
]
