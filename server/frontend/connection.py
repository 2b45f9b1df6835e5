"""One HTTP/1.1 connection: everything that a client may do to a socket is answered for here, and nowhere else.

`docs/connection.md` lists the promises. What bytes must look like stands in `framing`, everything that has to do with a
client's manners and with time in this module. The application sees a request when its header is there, and the body as
it asks for it.

Theory of operation
- A connection does one thing at a time. It waits for a header, or it has an `Exchange`: one request and its answer.
  Bytes that come meanwhile are kept, up to a header's size, and reading stops until they are needed; so a client that
  pipelines costs what one does that waits.
- What can wait takes turns, in one queue that all connections share: requests of clients that pipeline, refusals of
  clients that are late. One is done a loop iteration, and one a millisecond while there are requests of others; so who
  sends a thousand requests at once, or comes with a thousand slow connections, waits for everybody else.
- Whenever the client owes bytes (a header, a body, or to take an answer), a timer runs, and the connection stands in
  the line of those that may be given up for a newcomer when there are too many, the longest wait first.
- What is wrong with a body is raised where the application reads it (`receive`), and answered like any other error.
- A client may shut its sending side down behind a request and still read (RFC 9112, 9.6); one that has gone away looks
  the same. They are told apart by an interim answer, `100 Continue`, which everybody must be able to skip (RFC 9110,
  15.2): whoever has gone resets the connection. An answer that is quick comes before the first of those.
- An answer that ends a connection is not lost to bytes that the client still sends: our side is shut down first, and
  what comes is thrown away for a while (nginx calls it lingering close).
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message
from uvicorn.config import Config
from uvicorn.server import ServerState

from server.errors import (
    BadRequest,
    ExpectationFailed,
    HeaderTooLarge,
    Overloaded,
    RequestTimeout,
    ServeError,
)
from server.frontend.edge import new_request_id, problem
from server.frontend.framing import Chunked, Head, check_lines, head_of

log = logging.getLogger(__name__)

LINGER_S = 2.0  # long enough for a client that reads while it sends; short enough not to be a way to hold connections
BODY_WINDOW_S = 5.0  # over which a body's rate is judged: a lost packet or two are no slow client
_MAX_UNREAD = 256 * 1024  # bytes of a body that the application has not asked for yet
_HIGH_WATER = 32 * 1024  # bytes of answers that the socket does not take: more, and nothing new begins
_CHUNKS_A_TURN = 256  # of a body, each some microseconds: then the loop sees to others
_FREE_CHUNKS = 1024
_MEAN_CHUNK = 64  # bytes; beyond the free ones, smaller chunks cost more than they bring
_TURN_S = 0.001  # between two turns, beside others' requests
_FIRST_PROBE_S = 0.025  # of a client that shut its side down; twice as long for every further one

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# RFC 9110, 7.2 and RFC 3986, 3.2.2: a name, an IPv4 or an IPv6 address, and a port.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]{0,5})?\Z")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)\Z", re.IGNORECASE)
# Of Linux's tcp_info.
_CLOSE_WAIT = 8  # the other side has sent all that it will
_LAST_RECEIVED = slice(52, 56)  # milliseconds since bytes came, to a tick of the kernel's clock


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    max_connections: int
    max_header_bytes: int
    header_timeout_s: float
    keep_alive_timeout_s: float
    body_timeout_s: float
    min_body_bytes_per_s: float
    send_timeout_s: float


class Connections:
    """What all connections of a server share: their bounds, who owes bytes, and whose pipelined request is next."""

    def __init__(self, limits: ConnectionLimits, refused: Callable[[str], None]) -> None:
        """`refused` is told the code of every refusal that the application does not see."""
        self.limits = limits
        self.refused = refused
        self.open = 0
        self._owing: dict[Connection, None] = {}  # clients that owe bytes, the longest wait first
        self._turns: deque[Callable[[], None]] = deque()
        self.others = 0  # requests that no turn was taken for

    def enter(self) -> bool:
        """False where there is no room, even if the client that has let us wait longest were given up."""
        if self.open >= self.limits.max_connections:
            slowest = next(iter(self._owing), None)
            if slowest is None:
                return False
            slowest.give_up()
        self.open += 1
        return True

    def leave(self, connection: Connection) -> None:
        self.open -= 1
        self.owes(connection, False)

    def owes(self, connection: Connection, owes: bool) -> None:
        if owes:
            self._owing[connection] = None  # who is in it keeps the place
        else:
            self._owing.pop(connection, None)

    def in_turn(self, step: Callable[[], None]) -> None:
        """Do this when it is its turn."""
        self._turns.append(step)
        if len(self._turns) == 1:
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        try:
            self._turns[0]()
        finally:  # a step that fails must not end the turns of all others
            self._turns.popleft()
            if self._turns:
                loop = asyncio.get_running_loop()
                if self.others > 0:
                    loop.call_later(_TURN_S, self._next_turn)
                else:
                    loop.call_soon(self._next_turn)


class Connection(asyncio.Protocol):
    """The bytes of one connection. uvicorn's server makes one for each that is accepted."""

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.loop = _loop or asyncio.get_running_loop()
        self.app: ASGIApp = config.loaded_app
        self.app_state = app_state
        self.server_state = server_state
        self.limits = connections.limits
        self._connections = connections
        self._counted = False  # by `connections`
        self._buffer = bytearray()  # what came and belongs to no request yet
        self._searched = 0  # so many bytes of it were looked at, and do not end a header
        self._exchange: Exchange | None = None
        self._idle = False  # after an answer, before the first byte of the next request
        self._pipelines = False  # has sent a request before it had the answer to the last one
        self._queued = False  # for the turn to begin the next one
        self._reading = True
        self._ended = False  # the client has shut its side down
        self._closing = False  # behind the answer that is being made
        self._lingers = False
        self._patience: asyncio.TimerHandle | None = None  # with a client that owes us a header, or the end
        self._send_timer: asyncio.TimerHandle | None = None
        self._probe: asyncio.TimerHandle | None = None
        self._blocked: asyncio.Future[None] | None = None  # while the client takes no more

    # -- the transport's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a socket's
        self.transport = transport
        transport.set_write_buffer_limits(_HIGH_WATER)
        self._socket = _own_socket(transport)
        self.client = _address(transport.get_extra_info("peername"))
        self.server = _address(transport.get_extra_info("sockname"))
        self.server_state.connections.add(self)  # type: ignore[arg-type]  # uvicorn expects its own classes
        self._counted = self._connections.enter()
        if self._counted:
            self._await_header(self.limits.header_timeout_s)
        else:
            self._refuse(Overloaded(f"{self._connections.open} connections are open", retry_after_s=1))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # it makes no difference why
        if self._socket is not None:
            self._socket.detach()  # the transport closes it, and only now
            self._socket = None
        self.resume_writing()
        self.server_state.connections.discard(self)
        if self._counted:
            self._counted = False
            self._connections.leave(self)
        for timer in (self._patience, self._send_timer, self._probe):
            if timer is not None:
                timer.cancel()
        self._buffer.clear()
        if self._exchange is not None:
            self._exchange.hung_up()
            self._leave_exchange()

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if self._lingers:
            return
        if exchange is not None and not exchange.complete:
            missing = exchange.missing
            if missing is not None and missing < len(data):
                self._buffer += data[missing:]
                data = data[:missing]
            exchange.feed(data)
            return
        if not self._buffer and exchange is None:
            # Empty lines before a request are skipped (RFC 9112, 2.2). They are no sign of life: all timers run on.
            data = data.lstrip(b"\r\n")
        self._buffer += data
        if exchange is not None:
            self._pipelines = True
        elif self._pipelines:
            self._queue()
        elif not self._queued:
            self._begin()
        if self._is_full:
            self.pause_reading()

    def eof_received(self) -> bool:
        """The client has sent all that it will. It may still read: True keeps our side open."""
        self._ended = True
        exchange = self._exchange
        if exchange is not None and exchange.complete:
            self._probe_later(_FIRST_PROBE_S)
        elif exchange is not None or self._lingers or not (self._queued or self._blocked is not None):
            if exchange is not None:
                exchange.hung_up()  # nobody knows what it wanted to ask
            self.close()  # the loop's own close would wait for ever for who takes no answer
        return True  # what came whole is still answered

    def pause_writing(self) -> None:
        self._blocked = self.loop.create_future()
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(self.limits.send_timeout_s, self._drop)
        self._connections.owes(self, True)

    def resume_writing(self) -> None:
        blocked, self._blocked = self._blocked, None
        if blocked is not None and not blocked.done():
            blocked.set_result(None)
        if blocked is None or self.transport.is_closing():
            return
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        if self._exchange is None:
            if not self._lingers:
                self._await_next()
        elif self._exchange.complete:
            self._connections.owes(self, False)

    # -- a request begins and ends

    def _begin(self) -> None:
        """Read the next header from what is there, and let the application answer it."""
        if self._blocked is not None or self._lingers or self.transport.is_closing():
            return  # who does not take answers gets no more of them
        try:
            header = self._next_header()
            if header is None:
                if self._ended or (self._closing and not self._buffer):
                    self.close()
                elif self._buffer and self._idle:
                    self._idle = False
                    self._await_header(self.limits.header_timeout_s)
                return
            exchange = Exchange(self, Head.of(header))
        except ServeError as error:
            self._refuse(error)
            return
        size = len(self._buffer) if exchange.missing is None else exchange.missing
        if size < len(self._buffer) and not self._pipelines:
            self._pipelines = True
            self._buffer[:0] = header
            self._queue()
            return
        self._exchange = exchange
        self._idle = False
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        body = bytes(self._buffer[:size])
        del self._buffer[:size]
        self.resume_reading()
        self._connections.others += not self._pipelines
        exchange.in_turn = self._pipelines
        exchange.feed(body)
        exchange.start()

    def body_is_there(self, rest: bytes) -> None:
        """`rest`: what came behind it."""
        self._connections.owes(self, False)
        self._buffer += rest
        if self._is_full:
            self.pause_reading()
        else:
            self.resume_reading()  # too much of the body may have been there at once: now only the end is to come
        if self._ended or not self._reading:
            self._probe_later(_FIRST_PROBE_S)

    def body_is_missing(self) -> None:
        """All that has come was looked at."""
        if self._ended:
            self.close()

    def answered(self, keep_alive: bool) -> None:
        """The answer of the exchange is out. Go on, or end the connection without losing it."""
        exchange = self._exchange
        if exchange is None:
            return
        self._leave_exchange()
        if self._probe is not None:
            self._probe.cancel()
            self._probe = None
        self.server_state.total_requests += 1
        if not keep_alive or self._closing:
            self._end(clean=exchange.complete and not self._buffer)
        elif not self.transport.is_closing():
            self._await_next()

    def _await_next(self) -> None:
        if self._buffer and self._buffer[0] in b"\r\n":
            self._buffer = self._buffer.lstrip(b"\r\n")
        self.resume_reading()
        self._idle = not self._buffer
        self._await_header(self.limits.keep_alive_timeout_s if self._idle else self.limits.header_timeout_s)
        if self._buffer or self._ended:
            self._queue()

    def _queue(self) -> None:
        if not self._queued:
            self._queued = True
            self._connections.in_turn(self._take_turn)

    def _take_turn(self) -> None:
        self._queued = False
        self._begin()

    def _leave_exchange(self) -> None:
        assert self._exchange is not None
        self._connections.others -= not self._exchange.in_turn
        self._exchange = None

    def _end(self, clean: bool) -> None:
        """Close. `clean`: nothing that the client has sent is unread, so that no reset can overtake the answer."""
        if clean or self._ended:
            self.close()
        elif not self.transport.is_closing():
            self._lingers = True
            self._buffer.clear()
            self.resume_reading()
            self._wait(LINGER_S, self.close)
            self._connections.owes(self, True)
            self.transport.write_eof()

    def close(self) -> None:
        """Close, behind what is still to be sent, for which the client has `send_timeout_s`."""
        if self._patience is not None:
            self._patience.cancel()
        if self.transport.get_write_buffer_size() and self._send_timer is None:
            self._send_timer = self.loop.call_later(self.limits.send_timeout_s, self._drop)
        self.transport.close()

    def give_up(self) -> None:
        """Make room: this client has let us wait longer than all others."""
        self._counted = False
        self._connections.leave(self)
        self._connections.refused("connection_given_up")
        self._drop()

    def _drop(self) -> None:
        """End it now. What was not sent would stay with the kernel, for minutes: then with a reset."""
        unsent = self.transport.get_write_buffer_size() or _holds_unsent(self._socket)
        if unsent and self._socket is not None:
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def shutdown(self) -> None:
        """uvicorn asks every connection to end: now where there is no request, else behind its answer."""
        self._closing = True
        if self._exchange is None and (self._lingers or b"\r\n\r\n" not in self._buffer):
            self.close()

    # -- what an exchange asks of its connection

    @property
    def closing(self) -> bool:
        return self._closing

    def in_turn(self, step: Callable[[], None]) -> None:
        self._connections.in_turn(step)

    def waited_s(self) -> float:
        """How long what has come was there before we came to it. Who pipelines waits for its turn, which is no part."""
        return 0.0 if self._pipelines else _since_last_byte(self._socket)

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    async def drain(self) -> None:
        """Until the client takes more."""
        if self._blocked is not None:
            await asyncio.shield(self._blocked)

    def pause_reading(self) -> None:
        if self._reading and not self._ended and not self.transport.is_closing():
            self._reading = False
            self.transport.pause_reading()
            if self._exchange is not None and self._exchange.complete:
                self._probe_later(_FIRST_PROBE_S)  # the client's end would go unnoticed behind what is not read

    @property
    def _is_full(self) -> bool:
        return len(self._buffer) > self.limits.max_header_bytes

    def resume_reading(self) -> None:
        if not self._reading and not self._is_full:
            self._reading = True
            if not self._ended and not self.transport.is_closing():
                self.transport.resume_reading()

    # -- waiting

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self.loop.call_later(seconds, then)

    def _await_header(self, seconds: float) -> None:
        self._wait(seconds, self._header_is_late)
        self._connections.owes(self, True)

    def _header_is_late(self) -> None:
        self._patience = None
        self._connections.in_turn(self._dismiss)

    def _dismiss(self) -> None:
        if self._patience is not None or self._exchange is not None or self._blocked is not None:
            return  # it came after all, or the time to send judges this client
        if self._queued:
            self._await_header(self.limits.header_timeout_s)  # now it is us who let it wait
        elif self._buffer:
            seconds = self.limits.header_timeout_s
            self._refuse(RequestTimeout(f"The header was not complete after {seconds:g} s"))
        elif _holds_unsent(self._socket):  # the last answer: it would stay with the kernel
            self._drop()
        else:  # not one byte of a request: there is nothing to answer
            self.close()

    def _probe_later(self, seconds: float) -> None:
        if self._probe is None:
            self._probe = self.loop.call_later(seconds, self._is_anybody_there, seconds)

    def _is_anybody_there(self, waited: float) -> None:
        """Where the client has sent its end, provoke a reset if it is gone; look again later."""
        self._probe = None
        exchange = self._exchange
        if exchange is not None and exchange.may_be_probed:
            if self._ended or _has_sent_its_end(self._socket):
                self.write(_CONTINUE)
            self._probe_later(2 * waited)

    # -- headers

    def _next_header(self) -> bytes | None:
        """A whole header, taken from the buffer. None where its end is not there yet. Raises ServeError."""
        buffer, most = self._buffer, self.limits.max_header_bytes
        found = buffer.find(b"\r\n\r\n", max(0, self._searched - 3))
        if (len(buffer) if found < 0 else found + 4) > most:
            raise HeaderTooLarge(f"The header is larger than {most} bytes")
        if found >= 0:
            header = bytes(buffer[: found + 4])
            del buffer[: found + 4]
            self._searched = 0
            return header
        # What can never become a request is refused now: a TLS handshake, HTTP/0.9, lines that end in a bare LF.
        if buffer and buffer[0] <= 0x20:
            raise BadRequest("This is not HTTP/1.1")
        if buffer.find(b"\n", self._searched) >= 0:
            check_lines(bytes(buffer))
        self._searched = len(buffer)
        return None

    def _refuse(self, error: ServeError) -> None:
        """Answer outside of the application, and close."""
        if self.transport.is_closing() or self._lingers:
            return
        self._connections.refused(error.code)
        request_id = new_request_id()
        response = problem(error, {"request_id": request_id})
        headers = [*response.raw_headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
        head = head_of(response.status_code, [*self.server_state.default_headers, *headers])
        self.write(head + bytes(response.body))
        self._end(clean=not self._counted)  # those that are not counted do not stay either


class Exchange:
    """One request and its answer, as ASGI has them: `receive` and `send` are the application's."""

    def __init__(self, connection: Connection, head: Head) -> None:
        """Raises BadRequest, ExpectationFailed."""
        self._connection = connection
        given = head.given
        self._http_10 = head.version == b"1.0"
        self._is_waited_for = b"expect" in given and not self._http_10  # by a client that holds its body back
        if self._is_waited_for and given[b"expect"].lower() != b"100-continue":
            raise ExpectationFailed("Expect: 100-continue is the only expectation that there is")
        self._scope = _scope_of(head, connection)
        self._scope["state"]["hang_up"] = self.at_hang_up
        self._head_only = head.method == b"HEAD"
        self._keep_alive = not self._http_10 and not (b"connection" in given and _says_close(head))
        self._length = head.length
        self._framed = Chunked(connection.limits.max_header_bytes) if self._length is None else None

        self.in_turn = False  # it began when it was its turn
        self.complete = False  # all of the request has come
        self._chunks: list[bytes] = []  # of the body, not read yet
        self._unread = 0  # bytes of them
        self._received = 0  # bytes of the body
        self._read_all = False  # the application has
        self._error: ServeError | None = None  # what is wrong with the body
        self._gone = False
        self._then: Callable[[], object] | None = None  # to be done when the client leaves
        self._news: asyncio.Future[None] | None = None  # `receive` waits for it
        self._timer: asyncio.TimerHandle | None = None  # while the body comes
        self._more: asyncio.Handle | None = None  # events that are left for the loop's next turn

        self._began = self._answered = False
        self._head: bytes | None = None  # of the answer, until its body comes
        self._bodiless = self._chunked = False
        self._left: int | None = None  # bytes of the answer's body that are to come

    # -- the request

    @property
    def missing(self) -> int | None:
        """Bytes of the body that are to come. None where only the chunks tell."""
        return None if self._length is None else self._length - self._received

    def feed(self, data: bytes) -> None:
        """Take in what came behind the header."""
        if self._error is not None:
            return
        if data:
            self._is_waited_for = False
        if self._framed is None:
            if data:
                self._take(data)
            if self._received == self._length:
                self._is_complete(b"")
            else:
                self._await_body()
            return
        self._framed.feed(data)
        if self._more is None:
            self._take_chunks(self._framed)

    def _take_chunks(self, framed: Chunked) -> None:
        self._more = None
        try:
            for _ in range(_CHUNKS_A_TURN):
                data = framed.next()
                if data is None:
                    self._await_body()
                    return
                if not data:
                    self._is_complete(framed.rest)
                    return
                self._take(data)
                if framed.count > _FREE_CHUNKS + self._received // _MEAN_CHUNK:
                    raise BadRequest(f"The body comes in chunks of less than {_MEAN_CHUNK} bytes")
        except ServeError as error:
            self._fail(error)
        else:
            self._connection.pause_reading()
            self._more = self._connection.loop.call_soon(self._go_on, framed)

    def _go_on(self, framed: Chunked) -> None:
        if self._unread <= _MAX_UNREAD:
            self._connection.resume_reading()
        self._take_chunks(framed)

    def _take(self, data: bytes) -> None:
        self._chunks.append(data)
        self._unread += len(data)
        self._received += len(data)
        if self._unread > _MAX_UNREAD:
            self._connection.pause_reading()
        self._tell()

    def _is_complete(self, rest: bytes) -> None:
        """`rest`: what came behind the body."""
        self.complete = True
        self._stop_timer()
        self._connection.body_is_there(rest)
        self._tell()

    def _await_body(self) -> None:
        if self._timer is None:
            now = self._connection.loop.time()
            self._judge_later(now, now)
        self._connection.body_is_missing()

    def _judge_later(self, began: float, now: float) -> None:
        left = began + self._connection.limits.body_timeout_s - now
        self._timer = self._connection.loop.call_later(
            max(0.0, min(BODY_WINDOW_S, left)), self._judge, began, now, self._received
        )

    def _judge(self, began: float, since: float, before: int) -> None:
        """Once a window: a body is to come within a time, and at a rate, while it is us who read."""
        limits, now = self._connection.limits, self._connection.loop.time()
        enough = limits.min_body_bytes_per_s * (now - since)
        late = None
        if now >= began + limits.body_timeout_s:
            late = RequestTimeout(f"The body was not complete after {limits.body_timeout_s:g} s")
        elif self._received - before < enough and self._unread <= _MAX_UNREAD:
            late = RequestTimeout(f"The body came at less than {limits.min_body_bytes_per_s:g} bytes a second")
        if late is not None:
            self._connection.in_turn(lambda: self._fail(late))
        else:
            self._judge_later(began, now)

    def _fail(self, error: ServeError) -> None:
        if self.complete or self._gone:
            return
        self._stop_timer()
        self._error = error
        self._tell()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def hung_up(self) -> None:
        """The client has left: the application hears `http.disconnect`, whatever it waits for."""
        self._gone = True
        self._stop_timer()
        if self._more is not None:
            self._more.cancel()
        self._chunks.clear()
        self._tell()
        if self._then is not None:
            self._then()

    # -- the application's side

    def start(self) -> None:
        scope, self._scope = self._scope, {}  # it knows us: kept, each would keep the other
        self._task = self._connection.loop.create_task(self._run(scope))
        self._connection.server_state.tasks.add(self._task)

    def at_hang_up(self, then: Callable[[], object] | None) -> None:
        """Do this, at once, when the client leaves; None: nothing any more. For who has read the body, and waits for
        something else."""
        self._then = then

    @property
    def may_be_probed(self) -> bool:
        """Whether an interim answer can be sent now."""
        return not self._began and not self._http_10

    async def _run(self, scope: dict[str, Any]) -> None:
        try:
            await self._connection.app(scope, self.receive, self.send)
        except Exception:
            if not self._began:  # else the application has logged it
                log.exception("a request was not answered")
        finally:
            if not self._answered and not self._gone:
                self._connection.transport.abort()  # half an answer: only a broken connection tells the client so
            self._connection.server_state.tasks.discard(self._task)

    async def receive(self) -> Message:
        """Raises BadRequest, HeaderTooLarge or RequestTimeout for a body that is not valid, or late."""
        while not (
            self._chunks
            or self._gone
            or self._answered
            or (not self._read_all and (self._error is not None or self.complete))
        ):
            if self._is_waited_for and not self._began:
                self._is_waited_for = False
                self._connection.write(_CONTINUE)
            self._news = self._connection.loop.create_future()
            await self._news
        if self._gone or self._answered:
            return {"type": "http.disconnect"}
        if self._error is not None:
            self._read_all = True
            raise self._error
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._unread = 0
        self._read_all = self.complete
        if not self.complete and self._more is None:
            self._connection.resume_reading()
        return {"type": "http.request", "body": body, "more_body": not self.complete}

    async def send(self, message: Message) -> None:
        if self._gone:
            return  # the application hears of it where it receives
        if message["type"] == "http.response.start":
            self._begin_answer(message["status"], list(message["headers"]))
            return
        more: bool = message.get("more_body", False)
        self._send_body(message.get("body", b""), more)
        if more:
            await self._connection.drain()

    def _begin_answer(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        assert not self._began, "an answer begins once"
        self._began = True
        given = dict(headers)
        self._bodiless = self._head_only or status in (204, 304)
        if b"content-length" in given:
            self._left = int(given[b"content-length"])
        self._chunked = self._left is None and not self._bodiless and not self._http_10
        if self._chunked:
            headers.append((b"transfer-encoding", b"chunked"))
        until_the_end = self._left is None and not self._bodiless and self._http_10
        if given.get(b"connection") == b"close":
            self._keep_alive = False
        elif not (self._keep_alive and self.complete) or self._connection.closing or until_the_end:
            self._keep_alive = False
            headers.append((b"connection", b"close"))
        self._head = head_of(status, [*self._connection.server_state.default_headers, *headers])

    def _send_body(self, body: bytes, more: bool) -> None:
        assert self._began, "a body comes behind its header"
        assert not self._answered, "an answer ends once"
        if self._bodiless:
            body = b""
        elif self._chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        elif self._left is not None:
            self._left -= len(body)
            assert self._left == 0 or (more and self._left > 0), "a body is as long as its header says"
        if self._head is not None:
            body, self._head = self._head + body, None
        if body:
            self._connection.write(body)
        if not more:
            self._answered = True
            self._stop_timer()
            if self._more is not None:
                self._more.cancel()
            self._tell()
            self._connection.answered(self._keep_alive)


def _says_close(head: Head) -> bool:
    values = (value for name, value in head.headers if name == b"connection")
    return any(option.strip(b" \t").lower() == b"close" for value in values for option in value.split(b","))


def _scope_of(head: Head, connection: Connection) -> dict[str, Any]:
    """The ASGI scope. Raises BadRequest for a target or a Host that is not valid."""
    target, headers, host = head.target, head.headers, head.given.get(b"host", b"")
    if not target.startswith(b"/"):
        if (absolute := _ABSOLUTE.match(target)) is not None:  # RFC 9112, 3.2.2: its host counts
            host, target = absolute[1], absolute[2]
            headers = [(b"host", host), *((name, value) for name, value in headers if name != b"host")]
            if not target.startswith(b"/"):
                target = b"/" + target
        elif target != b"*" or head.method != b"OPTIONS":
            raise BadRequest("The request target is no path")
    if b"#" in target:
        raise BadRequest("The request target has a fragment")
    if not _HOST.match(host):
        raise BadRequest("The Host is not valid")
    raw_path, _, query = target.partition(b"?")
    path = raw_path.decode("ascii")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": head.version.decode("ascii"),
        "server": connection.server,
        "client": connection.client,
        "scheme": "http",
        "method": head.method.decode("ascii"),
        "root_path": "",
        "path": unquote(path) if "%" in path else path,
        "raw_path": raw_path,
        "query_string": query,
        "headers": headers,
        "state": {**connection.app_state, "waited_s": connection.waited_s},
    }


def _address(of: Any) -> tuple[str, int] | None:
    return (str(of[0]), int(of[1])) if isinstance(of, tuple) else None


def _own_socket(transport: asyncio.Transport) -> socket.socket | None:
    """A wrapper of our own around the transport's socket: the loop hands out one without options. None where it is
    closed already."""
    found = transport.get_extra_info("socket")
    if found is None or (descriptor := found.fileno()) < 0:
        return None
    # The family makes no difference to options; to find it out takes the kernel longer than they do.
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=descriptor)


def _has_sent_its_end(own: socket.socket | None) -> bool:
    """Whether a FIN waits behind what we have not read. Only Linux tells."""
    if sys.platform != "linux" or own is None:
        return False
    try:
        return own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSE_WAIT
    except OSError:  # nobody knows
        return False


def _since_last_byte(own: socket.socket | None) -> float:
    """Seconds since the kernel was given the last of the client's bytes; 0 where nobody knows. Only Linux tells."""
    if sys.platform != "linux" or own is None:
        return 0.0
    try:
        info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_RECEIVED.stop)
    except OSError:
        return 0.0
    return int.from_bytes(info[_LAST_RECEIVED], sys.byteorder) / 1000


def _holds_unsent(own: socket.socket | None) -> bool:
    """Whether the client has not taken what the kernel has for it. Only Linux tells."""
    if sys.platform != "linux" or own is None:
        return False
    import fcntl
    import termios

    try:
        return fcntl.ioctl(own.fileno(), termios.TIOCOUTQ, bytes(4)) != bytes(4)
    except OSError:
        return False
