"""What the benchmarks rely on to see a broken promise: each check is shown one."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks import drain, host_cpu, hostile, swaps
from benchmarks.clients import Asked, Reply, dechunked
from benchmarks.harness import ROOT, Report, Snapshot, Window
from benchmarks.offline import Known, RawLoop, know_bundle, thresholds_for
from server.bench.photos import photo, photos
from server.bundle.frontier import NEVER
from server.bundle.manifest import Bundle
from server.engines import load_engine

ONE_IMAGE = Known((np.zeros((1, 1, 3), np.uint8),), np.array([[0.5], [0.7], [0.9]], np.float32))
BY_VERSION = {1: (0.4, 0.6, 0.0), 2: (0.6, 0.6, 0.0), 3: (0.6, 0.8, 0.0)}  # it leaves at exit 1, 2, 3


def reply(status: int, body: bytes, content_type: str = "application/json") -> Reply:
    return Reply(f"HTTP/1.1 {status} Whatever\r\nContent-Type: {content_type}".encode(), body)


def answered(version: int, exit_: int, confidence: float, degraded: bool = False) -> Asked:
    result = {"exit": exit_, "confidence": confidence, "degraded": degraded}
    return Asked(0, 0.0, 1.0, reply(200, json.dumps({"budget_version": version, "results": [result]}).encode()))


@pytest.mark.parametrize(("version", "exit_", "confidence"), [(1, 1, 0.5), (2, 2, 0.7), (3, 3, 0.9)])
def test_an_answer_that_follows_from_its_version_passes(version: int, exit_: int, confidence: float) -> None:
    assert list(swaps.check([answered(version, exit_, confidence)], [[0]], ONE_IMAGE, BY_VERSION)) == []


@pytest.mark.parametrize(
    "one",
    [
        answered(1, 2, 0.7),  # as under version 2
        answered(3, 2, 0.7),  # stage 1 judged by version 3, stage 2 by version 2
        answered(2, 2, 0.5),  # another exit's confidence
        answered(2, 2, 0.7, degraded=True),
        answered(4, 1, 0.5),  # nobody set version 4
    ],
)
def test_an_answer_of_mixed_thresholds_is_found(one: Asked) -> None:
    assert len(list(swaps.check([one], [[0]], ONE_IMAGE, BY_VERSION))) == 1


def posted(expect: str, status: int, body: bytes = b"{}", content_type: str = "application/problem+json") -> str:
    return hostile.Posted("file", expect, reply(status, body, content_type), 0.0, 0.0).wrong


PROBLEM = json.dumps({"status": 415, "code": "unsupported_media_type", "detail": "it is no image"}).encode()


@pytest.mark.parametrize(
    ("expect", "status", "body"),
    [
        ("decode", 200, b"{}"),
        ("decode or a clean 415/422", 200, b"{}"),
        ("decode or a clean 415/422", 415, PROBLEM),
        ("clean 4xx, no crash", 415, PROBLEM),
        ("", 200, b"{}"),
        ("", 415, PROBLEM),
    ],
)
def test_a_hostile_file_may_get_what_is_expected(expect: str, status: int, body: bytes) -> None:
    assert posted(expect, status, body) == ""


@pytest.mark.parametrize(
    ("expect", "status", "body"),
    [
        ("decode", 415, PROBLEM),
        ("decode or a clean 415/422", 500, b"{}"),
        ("decode or a clean 415/422", 415, b"{}"),  # which names no cause
        ("clean 4xx, no crash", 200, b"{}"),
        ("", 503, b"{}"),
    ],
)
def test_any_other_answer_to_a_hostile_file_is_found(expect: str, status: int, body: bytes) -> None:
    assert posted(expect, status, body) != ""


def test_no_answer_to_a_hostile_file_is_found() -> None:
    assert hostile.Posted("file", "", None, 0.0, 0.0).wrong == "no answer"


def test_a_broken_promise_is_told_and_fails_the_run() -> None:
    report = Report("some")
    report.must_be_zero("failed requests", 0)
    assert report.broken == []
    report.must_be_zero("failed requests", 2)
    assert report.broken == ["failed requests: 2"]


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (drain.Sent(at=1.0, ended=1.1, status=0, new=False), "unanswered"),
        (drain.Sent(at=1.0, ended=1.1, status=0, new=True), "unanswered"),  # accepted, then dropped
        (drain.Sent(at=1.9, ended=2.01, status=0, new=False), "unanswered"),  # a kept connection was accepted
        (drain.Sent(at=1.9, ended=2.01, status=0, new=True), "in_backlog"),  # reset together with the socket
        (drain.Sent(at=1.9, ended=2.3, status=0, new=True), "unanswered"),  # accepted, and cut off at the very end
        (drain.Sent(at=2.1, ended=2.2, status=0, new=False), "late"),
        (drain.Sent(at=1.0, ended=1.1, status=503, new=True), "answered"),
    ],
)
def test_a_request_without_an_answer_is_put_where_it_belongs(sent: drain.Sent, kind: str) -> None:
    assert drain.judge(sent, listened_until=2.0, closed_by=2.002) == kind


def test_stack_samples_go_to_the_innermost_part_that_is_known() -> None:
    loop = "thread (0x1): event-loop;run (asyncio/runners.py);data_received (uvicorn/protocols/http/httptools_impl.py)"
    stacks: Sequence[str] = (
        f"{loop};classify (server/frontend/routes.py);inc (prometheus_client/metrics.py) 1",
        f"{loop} 2",
        "thread (0x1): event-loop;run (asyncio/runners.py) 1",
        "thread (0x2): executor-1;_execute (server/cascade/batcher.py);run (server/engines/onnx.py) 5",
        "thread (0x3): asyncio_0;run (threading.py) 9",
    )
    shares = host_cpu.shares("\n".join(stacks))
    assert shares["loop"] == {"metrics": 0.25, "HTTP protocol": 0.5, "asyncio, uvloop": 0.25}
    assert shares["executor"] == {"engine: gather, slots": 1.0}
    assert "other" not in shares


@pytest.mark.parametrize(
    ("group", "rooms"),
    [
        ("loop", ("frontend", "cascade", "budget")),
        ("executor", ("cascade", "engines")),
        ("decode", ("frontend/images.py", "frontend/decoding.py")),
    ],
)
def test_every_file_that_a_thread_runs_belongs_to_a_part(group: str, rooms: Sequence[str]) -> None:
    for room in rooms:
        place = ROOT / "server" / room
        files = sorted(place.glob("*.py")) or [place]
        assert all(file.is_file() for file in files)
        for file in files:
            frame = f"run ({file.relative_to(ROOT)})"
            assert host_cpu.bucket_of([frame], host_cpu.BUCKETS[group]) != "other", frame


def test_a_window_counts_what_came_between_two_readings() -> None:
    def reading(at: float, batches: float, images: float) -> Snapshot:
        stage = frozenset({("stage", "2")})
        samples = {("dvt_batches_total", stage): batches, ("dvt_batch_images_total", stage): images}
        return Snapshot(at, samples, {"loop": at})

    window = Window(reading(1.0, 10, 20), reading(3.0, 14, 48))
    assert window.fill(2) == 7
    assert window.seconds == 2
    assert window.cpu == {"loop": 2.0}


def test_thresholds_give_the_mix_that_is_wanted() -> None:
    confidence = np.random.default_rng(0).random((3, 1000), dtype=np.float32)
    known = Known(tuple(np.zeros((1000, 1, 1, 3), np.uint8)), confidence)
    for mix in ((0.45, 0.30, 0.25), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.1, 0.9, 0.0)):
        assert known.mix(thresholds_for(confidence, mix)) == pytest.approx(mix)
    assert thresholds_for(confidence, (0.0, 0.0, 1.0)) == (NEVER, NEVER, 0.0)


def test_the_raw_loop_brings_every_image_to_its_own_exit(bundle: Bundle) -> None:
    known = know_bundle(bundle, photos(12))
    thresholds = thresholds_for(known.confidence, (0.5, 0.25, 0.25))
    engine = load_engine(bundle, max_batch_sizes=(4, 2, 2))
    run = RawLoop(engine, known.pixels, thresholds, threads=2).run(0.05)
    assert engine.slots_in_use == 0
    assert run.images == run.rows[0] == sum(run.exits)
    assert run.images % 4 == 0
    assert run.rows[1] == run.exits[1] + run.exits[2]
    assert run.rows[2] == run.exits[2]
    passes, rest = divmod(run.images, 12)
    exits = [known.exit_at(image, thresholds) for image in range(12)]
    assert run.exits == tuple(passes * exits.count(e) + exits[:rest].count(e) for e in (1, 2, 3))


def test_a_photo_is_the_same_every_time() -> None:
    assert photo(3) == photo(3) != photo(4)
    assert photo(3).startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize("cut", range(24))
def test_a_body_in_chunks_is_known_once_its_end_is_there(cut: int) -> None:
    whole = b'4\r\n{"a"\r\n4;x=1\r\n: 1}\r\n0\r\n\r\n'
    assert dechunked(whole) == b'{"a": 1}'
    assert dechunked(whole[:cut]) is None
