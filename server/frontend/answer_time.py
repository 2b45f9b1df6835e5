"""How early an answer must be decided so that the client has it in time.

`timeout_ms` is a client's own limit as a rule. An answer that is decided at the very deadline still waits for the event
loop, is shaped and sent: it comes late. So the deadline that the cascade is given lies before the client's, by what
that takes, learned from the answers of late.
"""

from __future__ import annotations

import math

QUANTILE = 0.99
_STEP = 0.1  # of the logarithm, an answer
_LEAST, _MOST = 0.0005, 0.25  # seconds
_LARGEST_SHARE = 0.5  # of a request's time


class AnswerTime:
    """A running quantile of the seconds from the decision to the answer's last byte.

    Each answer moves the logarithm a step: up where it took longer, down where not, in the proportion that balances at
    the quantile (Robbins and Monro 1951). One that a stall delayed moves it by a tenth, like any other.
    """

    def __init__(self) -> None:
        self._log = math.log(0.002)

    @property
    def seconds(self) -> float:
        return math.exp(self._log)

    def observe(self, seconds: float) -> None:
        step = QUANTILE if seconds > self.seconds else QUANTILE - 1
        self._log = min(math.log(_MOST), max(math.log(_LEAST), self._log + _STEP * step))

    def within(self, timeout_s: float) -> float:
        """The seconds in which an answer must be decided, where the client waits for `timeout_s`."""
        return timeout_s - min(self.seconds, _LARGEST_SHARE * timeout_s)
