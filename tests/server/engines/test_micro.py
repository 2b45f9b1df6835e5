"""The micro model, tokeniser, performer and all: the GPU engine against the one on the CPU, from pixels to exits."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from server.bundle.frontier import Criterion
from server.bundle.manifest import Bundle
from server.core import StageBatch
from server.engines.gpu import torch_stage
from server.engines.gpu.engine import GpuEngine, batch_sizes
from server.engines.onnx import OnnxEngine
from tests.server.engines.gpu.fake_cuda import FakeCuda, HostPlace
from tests.server.engines.gpu.runs import all_stages, images


@pytest.mark.parametrize("criterion", ["entropy", "margin"])
def test_confidence_by_another_criterion_is_alike_on_both(criterion: Criterion, tmp_path: Path) -> None:
    from export.write import export_model
    from model.create import create_model

    bundle, cuda = export_model(create_model("micro"), tmp_path / "bundle", {}, criterion=criterion), FakeCuda()
    stages = torch_stage.load(bundle, HostPlace(cuda), [batch_sizes(4)] * 3)
    with (
        closing(GpuEngine(bundle, cuda, stages, name="torch-cuda", runtime="torch")) as ours,
        closing(OnnxEngine(bundle)) as theirs,
    ):
        pixels = images(bundle, 3, seed=0)
        one, other = all_stages(ours, pixels), all_stages(theirs, pixels)
        np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-5)


def test_the_micro_model_answers_and_exits_alike_on_both(micro_bundle: Path) -> None:
    bundle, cuda = Bundle.load(micro_bundle), FakeCuda()
    stages = torch_stage.load(bundle, HostPlace(cuda), [batch_sizes(8)] * 3)
    with (
        closing(GpuEngine(bundle, cuda, stages, name="torch-cuda", runtime="torch")) as ours,
        closing(OnnxEngine(bundle)) as theirs,
    ):
        for size in (1, 2, 3, 5, 8, 11):
            pixels = images(bundle, size, seed=size)
            one, other = all_stages(ours, pixels), all_stages(theirs, pixels)
            np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
            np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-5)
        point = bundle.frontier.rows[len(bundle.frontier.rows) // 2]
        pixels = images(bundle, 11)
        batch = StageBatch(1, pixels, [], [point.thresholds[0]] * 11)
        stays = [[slot is not None for slot in engine.run(batch).slots] for engine in (ours, theirs)]
        assert stays[0] == stays[1]
    assert not cuda.faults
    assert not cuda.leaks
