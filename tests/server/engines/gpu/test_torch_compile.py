"""Stages that torch has compiled: other kernels, the same answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from server.bundle.manifest import Bundle
from server.engines.gpu import torch_stage
from server.engines.gpu.engine import batch_sizes
from server.engines.gpu.probe import visible_gpus
from server.engines.gpu.torch_compile import FOLDERS, compiler
from server.engines.gpu.torch_stage import Kernel
from server.errors import EngineUnavailable
from tests.server.engines.gpu.conftest import Rig
from tests.server.engines.gpu.fake_cuda import FakeCuda, HostPlace
from tests.server.engines.gpu.runs import all_stages, images
from tests.server.engines.small_stages import write_bundle

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in FOLDERS:
        monkeypatch.setenv(variable, str(tmp_path))  # what it was is put back afterwards


def test_compiled_stages_answer_as_plain_ones_and_are_compiled_once_for_all_lanes(rig: Rig, small: Bundle) -> None:
    graphs = []

    def traced(program: Kernel, tensors: Sequence[torch.Tensor]) -> Kernel:
        """What torch would compile: the fake device watches every operator, and there it does not."""
        graphs.append(make_fx(program)(*tensors))
        return graphs[-1]

    stages = torch_stage.load(small, rig.place, [batch_sizes(4)] * 3, traced)
    plain, compiled = rig.engine(small, largest=4), rig.engine(small, stages, executors=2)
    compiled.warm_up()
    assert len(graphs) == 3 * 3  # stages, batch sizes
    for size in (1, 2, 3, 4, 7):
        pixels = images(small, size, seed=size)
        for _ in range(2):
            one, other = all_stages(plain, pixels), all_stages(compiled, pixels)
            np.testing.assert_allclose(one.probabilities, other.probabilities, atol=rig.within)
            np.testing.assert_allclose(one.confidence, other.confidence, atol=rig.within)
    assert len(graphs) == 3 * 3


def test_a_program_is_shared_only_by_contexts_that_are_asked_for_the_same_in_whatever_order(tmp_path: Path) -> None:
    compiled = []

    def traced(program: Kernel, tensors: Sequence[torch.Tensor]) -> Kernel:
        compiled.append([tuple(tensor.shape) for tensor in tensors])
        return make_fx(program)(*tensors)

    spec, cuda = write_bundle(tmp_path).manifest.stages[0], FakeCuda()
    stage = torch_stage.TorchStage(tmp_path / "stage1.onnx", spec, HostPlace(cuda), (2,), traced)
    stream = cuda.stream()
    names = ("image", "probabilities", "confidence")
    for asked in (names, names[::-1], (*names, "relations1"), names):
        context = stage.context(2, {name: cuda.allocate(4096) for name in asked}, 0, stream)
        for _ in range(2):
            context.enqueue()
        cuda.synchronize(stream)
        context.close()
    assert [len(shapes) for shapes in compiled] == [3, 4]


def test_a_compiled_program_writes_what_is_wanted_where_it_belongs(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)

    def program(given: torch.Tensor, wanted: torch.Tensor, joined: torch.Tensor) -> None:
        wanted.copy_(given @ weight)
        torch.cat([given, given + 1], 1, out=joined)

    tensors = [torch.ones(2, 3), torch.zeros(2, 4), torch.zeros(2, 6)]
    compiled = compiler(tmp_path, backend="aot_eager")(program, tensors)
    for factor in (1.0, 2.0):
        others = [torch.full((2, 3), factor), torch.zeros(2, 4), torch.zeros(2, 6)]
        compiled(*others)
        torch.testing.assert_close(others[1], others[0] @ weight)
        torch.testing.assert_close(others[2], torch.cat([others[0], others[0] + 1], 1))


@pytest.mark.gpu
@pytest.mark.skipif(not visible_gpus(), reason="there is no NVIDIA GPU")
def test_torch_s_own_compiler_makes_stages_that_answer_alike(rig_on_gpu: Rig, small: Bundle, tmp_path: Path) -> None:
    stages = torch_stage.load(small, rig_on_gpu.place, [(8,)] * 3, compiler(tmp_path))
    engine, plain = rig_on_gpu.engine(small, stages), rig_on_gpu.engine(small, largest=8)
    pixels = images(small, 8)
    one, other = all_stages(engine, pixels), all_stages(plain, pixels)
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-4)
    assert any(path.is_file() for path in tmp_path.rglob("*"))  # is there at the next start


def test_what_is_compiled_is_kept_where_it_is_told_or_nowhere(tmp_path: Path) -> None:
    compiler(tmp_path / "engines")
    for variable, name in FOLDERS.items():
        assert os.environ[variable] == str(tmp_path / "engines" / f"torch-{torch.__version__}" / name)
    compiler(None)
    kept = {Path(os.environ[variable]) for variable in FOLDERS}
    assert all(path.is_dir() and path.parent.stat().st_mode & 0o777 == 0o700 for path in kept)
    assert not any(path.is_relative_to(tmp_path) for path in kept)


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / f"torch-{torch.__version__}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(EngineUnavailable, match="nobody else can write to"):
        compiler(tmp_path)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(EngineUnavailable, match="nobody else can write to"):
        compiler(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineUnavailable, match=r"cannot be kept in .*file"):
        compiler(tmp_path / "file")
