"""What a process that speaks HTTP is made of, and what it asks of whoever runs the cascade.

`routes.classify` is written against this and knows no more. Two classes are a `Front`: the service, whose cascade runs
in its own process, and `remote.engine_link.EngineLink`, whose cascade runs in another one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from server.budget.places import Places
from server.bundle.manifest import Manifest
from server.cascade.scheduler import Priority
from server.core import Answer, Pixels
from server.errors import Draining, Overloaded
from server.frontend.answer_time import AnswerTime
from server.frontend.bodies import BodyLimits, Intake
from server.frontend.connection import ConnectionLimits, Connections
from server.frontend.decoding import Decoder
from server.frontend.images import ImageLimits
from server.metrics import RequestCounts
from server.settings import Settings


class Phase(Enum):
    STARTING = "starting"
    SERVING = "serving"
    LEAVING = "leaving"
    DRAINING = "draining"
    STOPPED = "stopped"

    def check(self) -> None:
        """Raises Draining where nothing new is taken."""
        if self is not Phase.SERVING and self is not Phase.LEAVING:
            raise Draining(f"The server is {self.value}", retry_after_s=1)

    @property
    def closing(self) -> bool:
        """Whether connections should wind down."""
        return self is not Phase.STARTING and self is not Phase.SERVING


@dataclass(frozen=True, slots=True)
class Figures:
    """What one process that speaks HTTP is at."""

    connections: int = 0
    requests: int = 0
    held_bytes: int = 0
    decode_age_s: float = 0.0  # of the image that a thread has been at for the longest
    decodes_stalled: int = 0


class Front(ABC):
    """Connections, bodies and decoding of one process; the cascade behind them is for who inherits."""

    def __init__(
        self,
        settings: Settings,
        manifest: Manifest,
        counts: RequestCounts,
        places: Places,
        clock: Callable[[], float],
    ) -> None:
        self.settings = settings
        self.manifest = manifest
        self.phase = Phase.STARTING
        self.counts = counts
        self.places = places
        self.clock = clock
        self.exits = len(manifest.stages)
        self.stage_gmacs = manifest.stage_gmacs
        self.connections = Connections(
            ConnectionLimits(
                max_connections=settings.max_connections,
                max_header_bytes=settings.max_header_bytes,
                header_timeout_s=settings.header_timeout_s,
                keep_alive_timeout_s=settings.keep_alive_timeout_s,
                body_timeout_s=settings.body_timeout_s,
                min_body_bytes_per_s=settings.min_body_bytes_per_s,
                send_timeout_s=settings.send_timeout_s,
            ),
            counts.request_refused,
        )
        self.answer_time = AnswerTime()
        self.intake = Intake(settings.max_requests, settings.max_held_bytes)
        self.body_limits = BodyLimits(settings.max_body_bytes, settings.max_images)
        self.decoder = Decoder(
            manifest.preprocessing.plain,
            ImageLimits(settings.max_pixels, settings.max_aspect, settings.min_side),
            settings.decode_threads,
            settings.max_queued_decodes,
            clock,
        )

    @abstractmethod
    def check_door(self) -> None:
        """Refuse before the body is read. Raises Draining, Overloaded."""

    @abstractmethod
    def check_queue(self, priority: Priority) -> None:
        """Refuse before the images are decoded what the queue has no room for. Raises Overloaded.

        After the body was read, not before: so that a refused client keeps its connection, and does not add the cost
        of a new one to the load.
        """

    @abstractmethod
    def note_arrival(self, images: int, timeout_s: float, priority: Priority) -> None:
        """Count what is asked of the server, whether or not it can be done. LOW takes what others leave."""

    @abstractmethod
    def submit(
        self,
        pixels: Sequence[Pixels],
        *,
        arrived: float,
        deadline: float,
        max_exit: int | None,
        min_confidence: float | None,
        priority: Priority,
        place: float,
    ) -> Awaitable[Answer]:
        """As `Batcher.submit`; `arrived`: when the body was there."""

    @abstractmethod
    def note_answer(
        self, pixels: Sequence[Pixels], answer: Answer, total_s: float, *, steered: bool, low: bool
    ) -> None:
        """Behind the answer."""

    # -- what this process is at

    @property
    def closing(self) -> bool:
        return self.phase.closing

    def figures(self) -> Figures:
        began = self.decoder.oldest
        age = 0.0 if began == math.inf else self.clock() - began
        intake = self.intake
        return Figures(self.connections.open, intake.requests, intake.held_bytes, age, self.stalled_decodes())

    def stalled_decodes(self) -> int:
        """Decoding threads that are not believed to come back."""
        allowed, now = self.settings.stall_timeout_s, self.clock()
        if now - self.decoder.oldest <= allowed:  # as a rule; asked for every request
            return 0
        return sum(now - began > allowed for began in self.decoder.out.values())

    def check_decoder(self) -> None:
        """Raises Overloaded where nobody would decode."""
        if self.stalled_decodes() >= self.settings.decode_threads:
            raise threads_stalled()


def threads_stalled() -> Overloaded:
    """Nothing would come of the wait for a deadline; another replica may answer at once."""
    return Overloaded("The threads that would answer have stalled", retry_after_s=1)


def queue_full() -> Overloaded:
    return Overloaded("The queue is full", retry_after_s=1)
