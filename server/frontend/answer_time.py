"""How early an answer must be decided so that the client has it in time.

`timeout_ms` is a client's own limit as a rule. An answer that is decided at the very deadline still waits for the event
loop: it comes late. So the deadline that the cascade is given lies before the client's, by what that takes, learned
from the answers of late.

That wait is the same for all. What follows, until an answer is on its way, is not: it takes a tenth of a millisecond as
a rule, and longer for who asks for more, which is to make nobody else's deadline earlier.
"""

from __future__ import annotations

import math

from server.budget.loops import Quantile

QUANTILE = 0.99
_LARGEST_SHARE = 0.5  # of a request's time


class AnswerTime:
    """A running quantile of the seconds from the decision until the event loop turns to the answer.

    A stall moves it by a tenth, like any other wait: answers that were decided before the first of them got its turn
    waited for the same, and count as one, by the longest.
    """

    def __init__(self) -> None:
        self._waits = Quantile(QUANTILE, start=0.002, least=0.0005, most=0.25)
        self._first_turn = -math.inf  # when, of the answers that wait for the same
        self._longest = 0.0  # seconds, of theirs

    @property
    def seconds(self) -> float:
        return self._waits.value

    def observe(self, decided: float, turn: float) -> None:
        """An answer was decided, and had its turn; in the order of turns."""
        if decided < self._first_turn:
            self._longest = max(self._longest, turn - decided)
            return
        if self._first_turn > -math.inf:
            self._waits.observe(self._longest)
        self._first_turn, self._longest = turn, turn - decided

    def within(self, timeout_s: float) -> float:
        """The seconds in which an answer must be decided, where the client waits for `timeout_s`."""
        return timeout_s - min(self.seconds, _LARGEST_SHARE * timeout_s)
