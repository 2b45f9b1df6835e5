"""A bundle whose graphs the fake understands, and the fake."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.bundle.manifest import Bundle
from tests.server.engines.tensorrt.fake_tensorrt import FakeTensorRT
from tests.server.engines.tensorrt.tiny_bundle import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def trt() -> FakeTensorRT:
    return FakeTensorRT()
