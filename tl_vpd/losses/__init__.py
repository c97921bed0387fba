"""The losses of VPD: faithfulness, minimality (importance and frequency), reconstruction (stochastic and adversarial).

L = c_stoch · L_stoch + c_adv · L_adv + c_imp · L_imp + c_freq · L_freq + c_Δ · L_Δ
"""

from tl_vpd.losses.faithfulness import faithfulness, faithfulness_terms
from tl_vpd.losses.minimality import (
    Penalty,
    RunningFrequency,
    frequency_minimality,
    importance_minimality,
    penalty_sums,
)
from tl_vpd.losses.reconstruction import Reconstruction

__all__ = [
    "Penalty",
    "Reconstruction",
    "RunningFrequency",
    "faithfulness",
    "faithfulness_terms",
    "frequency_minimality",
    "importance_minimality",
    "penalty_sums",
]
