"""The result of ``evaluate_edit``."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from tl_vpd.checks import integer
from tl_vpd.editing.activity import Activity
from tl_vpd.editing.edit import Edit
from tl_vpd.printing import Printed


@dataclass(frozen=True, eq=False)
class EditEvaluation(Printed):
    """What an edit does, beside controls.

    Attributes:
        edit: which.
        table: one row for the edit and each control. ``wanted_before``, ``wanted_after``: the mean probability of what is wanted;
            ``logit_before``, ``logit_after``: its logit. For each kind of text ``{kind}_kl``: the mean KL from the model's
            prediction, in nats, and ``{kind}_p99``: its 99th percentile; kinds are ``firing``, ``near``, ``elsewhere`` and those
            of ``other_text``.
        contexts: the tokens whose prediction the edit changes most.
        activity: how often the edited subcomponents are important in the text, and their mean activations there.
    """

    edit: Edit
    table: pd.DataFrame = field(repr=False)
    contexts: pd.DataFrame = field(repr=False)
    activity: Activity = field(repr=False)

    def to_pandas(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` most changed contexts, as far as they were asked for."""
        return self.contexts.head(integer("k", k, minimum=1))

    def frequencies(self) -> pd.DataFrame:
        """One row per edited subcomponent: ``subcomponent``, ``frequency`` (of tokens where it is important),
        ``mean_activation`` there."""
        return pd.DataFrame(
            {
                "subcomponent": [str(c) for c in self.activity.subcomponents],
                "frequency": self.activity.frequency.tolist(),
                "mean_activation": self.activity.mean.tolist(),
            }
        )
