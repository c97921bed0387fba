"""What judges are: they answer trials, from labels or from firings in other rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from tl_vpd.analysis.labels.firings import Firings
from tl_vpd.analysis.labels.trials import Answer, Trial


@runtime_checkable
class Judge(Protocol):
    """A judge of trials: ``TokenJudge``, ``LanguageJudge``, or an object of yours.

    Attributes:
        name: as tables show it.
        needs_labels: whether it reads labels.
    """

    name: str
    needs_labels: bool

    def answers(self, trials: Sequence[Trial], training: Firings, labels: Mapping[str, str]) -> Sequence[Answer | None]:
        """The answers.

        Args:
            trials: in any order, of several addresses and tests.
            training: the same addresses' firings in other rows.
            labels: texts by address; empty where there are none.

        Returns:
            For every trial an answer of the right length (None: it has none, which counts as wrong).
        """
        ...
