"""The server with an engine that takes 0.1 ms an image and no CPU, as a fast GPU does: what is left is the host.

    DVT_FRONTENDS=2 python -m benchmarks.serve_at_gpu_speed BUNDLE

Every image leaves at the first exit. Started by `benchmarks.frontends`.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.named_threads import name_threads
from server import process
from server.app import create_app
from server.bundle.manifest import Bundle
from server.core import Slot, StageBatch, StageOutput
from server.engines.fake import FakeEngine
from server.frontend import address, listener
from server.settings import read_settings

IMAGE_S = 0.0001
BATCH = 64
EXECUTORS = 2


class FastEngine(FakeEngine):
    """One batch at a time, and sure of every image."""

    executors = EXECUTORS

    def __init__(self, bundle: Bundle) -> None:
        stages, classes = len(bundle.manifest.stages), len(bundle.manifest.labels)
        super().__init__(
            num_stages=stages,
            num_classes=classes,
            input_size=bundle.preprocessing.crop,
            max_batch_sizes=(BATCH,) * stages,
        )
        self._device = threading.Lock()
        self._input = np.empty((BATCH, *bundle.preprocessing.crop, 3), np.uint8)
        self._probabilities = np.zeros((BATCH, classes), np.float32)
        self._probabilities[:, 0] = 1.0

    def run(self, batch: StageBatch) -> StageOutput:
        size = len(batch.pixels)
        with self._device:
            until = time.perf_counter() + IMAGE_S * size
            np.stack(batch.pixels, out=self._input[:size])  # as every engine does
            time.sleep(max(0.0, until - time.perf_counter()))
        slots: list[Slot | None] = [None] * size
        return StageOutput(self._probabilities[:size], self._probabilities[:size, 0], slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    options = parser.parse_args()
    name_threads()
    process.raise_descriptor_limit()
    process.log_to_stderr("warning")
    settings = read_settings({"port": 0})
    bundle = Bundle.load(options.bundle)
    app = create_app(settings, bundle, FastEngine(bundle))
    with address.bind(settings) as socket:
        url = address.url_of(socket)
        listener.run(app, settings, socket, lambda: print(f"Listening on {url}", flush=True))


if __name__ == "__main__":
    main()
