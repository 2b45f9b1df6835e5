"""A device to run on: the fake one, and a real one where there is one. On a machine that has little more than a GPU and
torch for it, without the conftests above:

    python -m pytest -c /dev/null --rootdir=. --confcutdir=tests/server/engines/gpu --import-mode=importlib \
        tests/server/engines/gpu
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch

from server.bundle.manifest import EMBEDDED, Bundle
from server.engines.gpu import torch_stage
from server.engines.gpu.device import Device
from server.engines.gpu.engine import GpuEngine, batch_sizes
from server.engines.gpu.probe import visible_gpus
from server.engines.gpu.stage import Stage
from tests.server.engines.gpu.fake_cuda import FakeCuda, HostPlace
from tests.server.engines.small_stages import write_bundle

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)  # the models are tiny
if not visible_gpus():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # our own kernels run on the CPU, too, where Triton is there


@dataclass
class Rig:
    """A device, torch on it, and engines that are closed at the end."""

    device: Device
    place: torch_stage.Place
    within: float  # what float32 answers may differ by from another engine's
    engines: list[GpuEngine]

    def stages(self, bundle: Bundle, largest: int = 8) -> list[torch_stage.TorchStage]:
        return torch_stage.load(bundle, self.place, [batch_sizes(largest)] * len(bundle.manifest.stages))

    def engine(
        self, bundle: Bundle, stages: Sequence[Stage] | None = None, *, largest: int = 8, **options: Any
    ) -> GpuEngine:
        engine = GpuEngine(
            bundle, self.device, stages or self.stages(bundle, largest), name="torch-cuda", runtime="torch", **options
        )
        self.engines.append(engine)
        return engine


@contextmanager
def _fake() -> Iterator[Rig]:
    cuda = FakeCuda()
    with closing_engines(Rig(cuda, HostPlace(cuda), 1e-5, [])) as rig:
        yield rig
    assert not cuda.faults
    assert not cuda.leaks


@contextmanager
def _real() -> Iterator[Rig]:
    if not visible_gpus():
        pytest.skip("there is no NVIDIA GPU")
    from server.engines.gpu.cuda import CudaDevice

    with closing_engines(Rig(CudaDevice(), torch_stage.CudaPlace(), 1e-4, [])) as rig:
        yield rig


@contextmanager
def closing_engines(rig: Rig) -> Iterator[Rig]:
    yield rig
    for engine in rig.engines:
        assert engine.slots_in_use == 0, "every test leaves nothing held"
        engine.close()


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """On the fake device or on a real one."""
    with _fake() if request.param == "fake" else _real() as found:
        yield found


@pytest.fixture
def rig_on_gpu() -> Iterator[Rig]:
    with _real() as found:
        yield found


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """The fake device, for what a real one cannot be asked to do. A test that breaks it looks after its own faults."""
    fake = FakeCuda()
    yield fake
    assert not fake.faults
    assert not fake.leaks


@pytest.fixture(scope="session")
def photo10() -> Bundle:
    """The embedded model: a real three-exit DVT, small."""
    return Bundle.load(EMBEDDED)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle"))
