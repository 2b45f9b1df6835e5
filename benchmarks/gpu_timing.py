"""Time on a device, by events or by the clock; the same calls on a CPU, so that every line is run without a GPU."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Work = Callable[[], object]

SAMPLE_MS = 50.0  # a sample is so many calls that it takes about this long: what happens at its ends does not count
MOST_CALLS = 20_000


@dataclass(frozen=True)
class Spread:
    """Milliseconds a call: the median of the rounds, the fastest, the slowest."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{_shown(self.median)} ({_shown(self.least)} to {_shown(self.most)})"


def _shown(ms: float) -> str:
    return f"{1e3 * ms:.3g} us" if ms < 0.1 else f"{ms:.3g} ms"


class Card:
    """A device of torch, "cuda" or "cpu"."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.cuda.init()
        else:
            torch.set_num_threads(1)

    @property
    def facts(self) -> str:
        """Its name, memory, and what drives it; clocks and power as they are now."""
        if not self.cuda:
            return f"cpu, torch {torch.__version__}"
        card = torch.cuda.get_device_properties(self.device)
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu",
        ]
        told = (
            ""
            if shutil.which(query[0]) is None
            else subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True, check=False).stdout
        )
        return (
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} multiprocessors, "
            f"torch {torch.__version__}, {' '.join(told.split())}"
        )

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype)

    def host(self, count: int) -> torch.Tensor:
        """Random bytes in host memory that the device can read by itself."""
        host = torch.randint(0, 256, (min(count, 2**20),), dtype=torch.uint8).repeat(-(-count // 2**20))[:count]
        return host.pin_memory() if self.cuda else host

    def bytes(self, count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, device=self.device)

    def graph(self, work: Work) -> Work:
        """The work, recorded into a graph, with what it works on; on a CPU the work itself."""
        work()  # what is made at the first call is made outside of the graph
        self.synchronize()
        if not self.cuda:
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()

        def replay(_: Work = work) -> None:
            graph.replay()

        return replay

    def sample_ms(self, work: Work, calls: int) -> float:
        """Milliseconds a call, of so many in a row."""
        if not self.cuda:
            began = time.perf_counter()
            for _ in range(calls):
                work()
            return 1e3 * (time.perf_counter() - began) / calls
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(calls):
            work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / calls

    def wall_ms(self, work: Work, calls: int) -> float:
        """As `sample_ms`, by the clock, and waiting for the device after every call."""
        began = time.perf_counter()
        for _ in range(calls):
            work()
            self.synchronize()
        return 1e3 * (time.perf_counter() - began) / calls

    def compare(
        self, works: Mapping[str, Work], seconds: float, rounds: int = 5, wall: bool = False
    ) -> dict[str, Spread]:
        """Each of the works in turn, round by round, warmed up, in about so many seconds altogether."""
        take = self.wall_ms if wall else self.sample_ms
        calls, most_ms = {}, 1e3 * seconds / rounds / len(works)
        for name, work in works.items():
            take(work, 2)
            one = max(take(work, 2), 1e-4)
            calls[name] = max(1, min(MOST_CALLS, round(min(SAMPLE_MS, most_ms) / one)))
        samples: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                samples[name].append(take(work, calls[name]))
        return {name: Spread(statistics.median(taken), min(taken), max(taken)) for name, taken in samples.items()}
