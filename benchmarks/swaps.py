"""Swap the operating point under load: nothing may fail, and no answer may mix two versions' thresholds.

Every answer names the version of the budget that it was judged by. Which exit an image leaves at under any thresholds
is known beforehand, from the same engine without a server: it is bitwise deterministic. So each answer is checked: its
exit is the first one whose confidence reaches the threshold of the version it names, and its confidence is that exit's.
Every other request carries several images, whose answers must all follow from the one version.

    taskset -c 0,1 python -m benchmarks.swaps --bundle build/t2t-vit-12 --out
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.clients import Asked, Line, Load, classify, classify_many
from benchmarks.harness import Options, Report, Server, finish, load_bundle, parse, quantile_ms
from benchmarks.offline import Known, know_bundle, thresholds_for
from server.bench.photos import photos

# Far apart, so that most images leave elsewhere after a swap.
MIXES = ((0.45, 0.30, 0.25), (0.05, 0.15, 0.80), (0.80, 0.15, 0.05), (0.20, 0.60, 0.20), (0.60, 0.05, 0.35))
TOGETHER = 4  # images in every other request
TARGET_PUT_MS = 5.0


def main(arguments: list[str] | None = None) -> int:
    options = parse("swaps", __doc__, arguments, _more)
    return finish(measure(options), options)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--swaps", type=int, default=100, help="(default %(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="connections (default %(default)s)")
    parser.add_argument("--answers", type=int, default=12, help="answers between two swaps (default %(default)s)")


def measure(options: Options) -> Report:
    report = Report("swaps")
    bundle = load_bundle(options)
    files = photos(options.images)
    known = know_bundle(bundle, files)
    targets = [thresholds_for(known.confidence, mix) for mix in _mixes(options.mix)]
    by_version: dict[int, Sequence[float]] = {}
    put_s: list[float] = []
    refused: list[str] = []
    with TemporaryDirectory() as folder, Server(bundle.path, timeout_ms=30000, state_dir=folder) as server:
        state = server.get("/budget")[1]
        by_version[state["version"]] = state["thresholds"]
        line = Line(server.port)
        limit = options.swaps * options.answers + 2 * options.clients
        groups = group(len(files))
        requests = [
            classify_many([files[image] for image in images]) if len(images) > 1 else classify(files[images[0]])
            for images in groups
        ]
        with Load(server.port, requests, options.clients, limit) as load:
            load.wait_for(options.clients)  # the load is there
            for number, thresholds in zip(range(1, options.swaps + 1), cycle(targets), strict=False):
                began = time.monotonic()
                reply = line.ask(_put(thresholds))
                put_s.append(time.monotonic() - began)
                if reply.status == 200:
                    state = reply.json()
                    by_version[state["version"]] = state["thresholds"]
                else:
                    refused.append(f"{reply.status} {reply.body!r}")
                load.wait_for(options.clients + number * options.answers)
            load.join()
        line.close()
        after = server.settled()
    mixed = list(check(load.asked, groups, known, by_version))
    answers = [asked for asked in load.asked if asked.ok]
    versions = {asked.reply.json()["budget_version"] for asked in answers if asked.reply}
    report.add("swaps", str(len(put_s)), swaps=len(put_s))
    report.add(
        "answers", f"{len(answers)}, under {len(versions)} versions", answers=len(answers), versions=len(versions)
    )
    told = sum(
        known.exit_at(image, a) != known.exit_at(image, b) for image in range(len(files)) for a, b in _pairs(targets)
    )
    share = told / (len(files) * len(_pairs(targets)))
    report.add("images that tell two versions apart", f"{share:.0%}", telling=share)
    p50, p99 = quantile_ms(put_s, 0.5), quantile_ms(put_s, 0.99)
    text = f"p50 {p50:.2f} ms, p99 {p99:.2f} ms   (target < {TARGET_PUT_MS:g} ms)"
    report.add("PUT /budget", text, put_p50_ms=p50, put_p99_ms=p99)
    report.must_be_zero("swaps refused", len(refused))
    report.must_be_zero("failed requests", len(load.failed), failures=load.failures())
    report.must_be_zero("answers with mixed thresholds", len(mixed), mixed=mixed[:10])
    report.must_be_zero("slots in use afterwards", int(after.total("dvt_slots_in_use")))
    return report


def group(images: int) -> list[list[int]]:
    """The images of each request: one and several in turn."""
    return [[(n + k) % images for k in range(1 if n % 2 == 0 else TOGETHER)] for n in range(images)]


def check(
    asked: Sequence[Asked], groups: Sequence[Sequence[int]], known: Known, by_version: Mapping[int, Sequence[float]]
) -> Iterator[str]:
    """Every image's answer that does not follow from the version that the request's answer names, in words."""
    for one in asked:
        if one.reply is None or one.reply.status != 200:
            continue
        answer: dict[str, Any] = one.reply.json()
        version = answer["budget_version"]
        if version not in by_version:
            yield f"version {version} was never set"
            continue
        for image, result in zip(groups[one.request], answer["results"], strict=True):
            expected = known.exit_at(image, by_version[version])
            confidence = round(float(known.confidence[expected - 1, image]), 6)  # as the answer rounds it
            if (result["exit"], result["confidence"], result["degraded"]) != (expected, confidence, False):
                yield (
                    f"image {image}: exit {result['exit']} at {result['confidence']} under version {version}, "
                    f"which leads to exit {expected} at {confidence}"
                )


def _put(thresholds: Sequence[float]) -> bytes:
    body = json.dumps({"thresholds": list(thresholds)}).encode()
    head = "PUT /budget HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _mixes(mix: Sequence[float]) -> Sequence[Sequence[float]]:
    """MIXES where they fit the number of exits; else the given mix and its reverse."""
    return MIXES if len(mix) == len(MIXES[0]) else (mix, tuple(reversed(mix)))


def _pairs(targets: Sequence[Sequence[float]]) -> list[tuple[Sequence[float], Sequence[float]]]:
    return list(zip(targets, [*targets[1:], targets[0]], strict=True))


if __name__ == "__main__":
    sys.exit(main())
