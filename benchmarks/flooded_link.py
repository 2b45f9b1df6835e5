"""The engine's end of a link at its limit: what an image costs the engine's process when records never run out.

Another process plays a front end that neither parses nor decodes: it keeps so many images in flight over a real socket.
The engine takes no CPU and no time. What is left is reading records, scheduling, answering, counting.

    python -m benchmarks.flooded_link --out
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import time

import uvloop

from benchmarks.harness import Options, Report, finish, load_bundle, parse
from benchmarks.serve_at_gpu_speed import FastEngine
from server.app import create_app
from server.bundle.manifest import Bundle
from server.core import StageBatch, StageOutput
from server.frontend.remote import records
from server.frontend.remote.counts import CELLS
from server.frontend.remote.link import Link
from server.frontend.remote.memory import SharedMemory, create_memory
from server.frontend.remote.records import Kind, Reader
from server.settings import Settings

SLOTS = 1024


class NoEngine(FastEngine):
    def run(self, batch: StageBatch) -> StageOutput:
        size = len(batch.pixels)
        return StageOutput(self._probabilities[:size], self._probabilities[:size, 0], [None] * size)


def main(arguments: list[str] | None = None) -> int:
    options = parse("flooded_link", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=20_000, help="images a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--in-flight", type=int, default=256, help="images (default %(default)s)")


def measure(options: Options) -> Report:
    report = Report("flooded_link")
    bundle = load_bundle(options)
    rounds = [uvloop.run(_flood(bundle, options.count, options.in_flight)) for _ in range(options.rounds)]
    loop, process, rate = (statistics.median(one[at] for one in rounds) for at in range(3))
    report.add("event loop, CPU", f"{loop:.1f} us an image", loop_cpu_us=loop, rounds=rounds)
    report.add("all threads, CPU", f"{process:.1f} us an image", process_cpu_us=process)
    report.add("reached here", f"{rate:.0f} images/s", images_per_s=rate)
    report.add("with a core of its own", f"{1e6 / process:.0f} images/s", ceiling_images_per_s=1e6 / process)
    return report


async def _flood(bundle: Bundle, count: int, in_flight: int) -> tuple[float, float, float]:
    """Microseconds an image of the event loop's thread and of all threads, which share one lock; images/s."""
    settings = Settings(state_dir=None, profile_seconds=0, frontends=1, max_queued_images=SLOTS, timeout_ms=30_000)
    app = create_app(settings, bundle, NoEngine(bundle))
    shape = bundle.preprocessing.crop
    classes = len(bundle.manifest.labels)
    async with app.router.lifespan_context(app):
        memory = SharedMemory(
            create_memory(cells=CELLS, slots=SLOTS, input_size=shape), cells=CELLS, slots=SLOTS, input_size=shape
        )
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "benchmarks.flooded_link"]
            numbers = [str(number) for number in (theirs.fileno(), count, in_flight, classes)]
            peer = subprocess.Popen([*command, "play", *numbers], pass_fds=[theirs.fileno()])
        link = Link(app.state.service, app, memory, records.document(Kind.WELCOME, {}), lambda: None)
        over = asyncio.Event()
        link.at_end(over.set)
        ours.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
        await link.ready
        loop, process, began = time.thread_time(), time.process_time(), time.perf_counter()
        await over.wait()
        loop, process, seconds = time.thread_time() - loop, time.process_time() - process, time.perf_counter() - began
        await asyncio.to_thread(peer.wait)
    return 1e6 * loop / count, 1e6 * process / count, count / seconds


def play(link: int, count: int, in_flight: int, classes: int) -> None:
    """The front end."""
    engine = socket.socket(fileno=link)
    reader = Reader(records.TO_FRONT_END, classes=classes, max_items=SLOTS)
    free, sent, answered = list(range(SLOTS)), 0, 0
    engine.sendall(records.plain(Kind.HELLO))
    while answered < count:
        now, out = time.monotonic(), []
        while free and sent < count and sent - answered < in_flight:
            sent += 1
            terms = records.Terms(now + 20, now, 0.5, None, 1, None)
            out += [records.arrived(1, 20.0, 1), records.submit(sent, [free.pop()], terms)]
        engine.sendall(b"".join(out))
        for record in reader.feed(engine.recv(2**18)):
            if record.kind == Kind.FREED:
                free += records.get_freed(record)
            answered += record.kind == Kind.ANSWER


if __name__ == "__main__":
    if sys.argv[1:2] == ["play"]:
        play(*[int(number) for number in sys.argv[2:]])
    else:
        sys.exit(main())
