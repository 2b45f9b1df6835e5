"""How early an answer must be decided so that the client has it in time.

`timeout_ms` is a client's own limit as a rule. An answer that is decided at the very deadline still waits for the event
loop: it comes late. So the deadline that the cascade is given lies before the client's, by what that takes, learned
from the answers of late.

That wait is the same for all. What follows, until an answer is on its way, is not: it takes a tenth of a millisecond as
a rule, and longer for who asks for more, which is to make nobody else's deadline earlier.
"""

from __future__ import annotations

import math

QUANTILE = 0.99
_STEP = 0.1  # of the logarithm, a wait
_LEAST, _MOST = 0.0005, 0.25  # seconds
_LARGEST_SHARE = 0.5  # of a request's time


class AnswerTime:
    """A running quantile of the seconds from the decision until the event loop turns to the answer.

    Each wait moves the logarithm a step: up where it took longer, down where not, in the proportion that balances at
    the quantile (Robbins and Monro 1951). A stall moves it by a tenth, like any other wait: answers that were decided
    before the first of them got its turn waited for the same, and count as one, by the longest.
    """

    def __init__(self) -> None:
        self._log = math.log(0.002)
        self._first_turn = -math.inf  # when, of the answers that wait for the same
        self._longest = 0.0  # seconds, of theirs

    @property
    def seconds(self) -> float:
        return math.exp(self._log)

    def observe(self, decided: float, turn: float) -> None:
        """An answer was decided, and had its turn; in the order of turns."""
        if decided < self._first_turn:
            self._longest = max(self._longest, turn - decided)
            return
        if self._first_turn > -math.inf:
            step = QUANTILE if self._longest > self.seconds else QUANTILE - 1
            self._log = min(math.log(_MOST), max(math.log(_LEAST), self._log + _STEP * step))
        self._first_turn, self._longest = turn, turn - decided

    def within(self, timeout_s: float) -> float:
        """The seconds in which an answer must be decided, where the client waits for `timeout_s`."""
        return timeout_s - min(self.seconds, _LARGEST_SHARE * timeout_s)
