"""How early an answer must be decided so that the client has it in time.

`timeout_ms` is a client's own limit as a rule. An answer that is decided at the very deadline still waits for the event
loop: it comes late. So does one whose time began when the loop turned to its request: the client's began before. So the
deadline that the cascade is given lies before the client's, by what both ways take.

The way in is known, of each request: how long its last byte has lain in the kernel. What it cannot know is learned from
the answers of late, the wait of a decision for the event loop. That is the same for all. What follows, until an answer
is on its way, is not: it takes a tenth of a millisecond as a rule, and longer for who asks for more, which is to make
nobody else's deadline earlier.
"""

from __future__ import annotations

import math

from server.budget.loops import Quantile

QUANTILE = 0.99
TICK_S = 0.01  # at most, of the kernel's clock: by so much it may state too long a wait
_LARGEST_SHARE = 0.5  # of a request's time, that something which may be wrong can take


class AnswerTime:
    """A running quantile of the seconds from the decision until the event loop turns to the answer.

    A stall moves it by a tenth, like any other wait: answers that were decided before the first of them got its turn
    waited for the same, and count as one, by the longest.
    """

    def __init__(self) -> None:
        # At first about a tick of the kernel's scheduler, for which a thread may wait where all cores are busy: only
        # late answers tell that a value is too small, and any that it is too large.
        self._waits = Quantile(QUANTILE, start=0.005, least=0.0005, most=0.25)
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

    def within(self, timeout_s: float, waited_s: float) -> float:
        """The seconds from now in which an answer must be decided, where the client waits for `timeout_s` and has done
        so for `waited_s`, as the kernel's clock has it. Below 0 where it waits no longer."""
        surely = max(0.0, waited_s - TICK_S)
        left = timeout_s - surely
        return left - min(self.seconds + waited_s - surely, _LARGEST_SHARE * left)
