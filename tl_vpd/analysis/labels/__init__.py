"""Labels of subcomponents and components, and scores that say what the labels are worth.

>>> fires = firings(vpd, model, tokens)                                      # doctest: +SKIP
>>> labels = label(fires)                                                    # doctest: +SKIP
>>> labels.with_scores(score_labels(fires, TokenJudge())).top()              # doctest: +SKIP
"""

from tl_vpd.analysis.labels.asking import LanguageModel, Question
from tl_vpd.analysis.labels.endpoint import Cost, Endpoint
from tl_vpd.analysis.labels.firings import Firings, FiringsConfig, firings
from tl_vpd.analysis.labels.judges import Judge
from tl_vpd.analysis.labels.label import LabelConfig, label, label_cost
from tl_vpd.analysis.labels.labels import Label, Labels
from tl_vpd.analysis.labels.language import LanguageJudge
from tl_vpd.analysis.labels.local import LocalModel
from tl_vpd.analysis.labels.nulls import null_firings
from tl_vpd.analysis.labels.offline import TokenJudge
from tl_vpd.analysis.labels.scores import LabelScores, Score, ScoreConfig, score_labels
from tl_vpd.analysis.labels.trials import Excerpt, Trial

__all__ = [
    "Cost",
    "Endpoint",
    "Excerpt",
    "Firings",
    "FiringsConfig",
    "Judge",
    "Label",
    "LabelConfig",
    "LabelScores",
    "Labels",
    "LanguageJudge",
    "LanguageModel",
    "LocalModel",
    "Question",
    "Score",
    "ScoreConfig",
    "TokenJudge",
    "Trial",
    "firings",
    "label",
    "label_cost",
    "null_firings",
    "score_labels",
]
