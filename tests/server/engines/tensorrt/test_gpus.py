"""Which GPU there is, and in one line why there is none, from a driver that is played here."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from server.engines.tensorrt.gpus import Gpu, find_gpu
from server.errors import BundleError


class Driver:
    """libcuda with the functions that are called; `fails` gives back a code for one of them."""

    def __init__(self, version: int = 13_000, **fails: int) -> None:
        self.version, self.fails = version, fails
        self.called: list[str] = []

    def __getattr__(self, function: str) -> Any:
        def call(*arguments: Any) -> int:
            self.called.append(function)
            play = getattr(type(self), f"_{function}", lambda *_: 0)
            return self.fails.get(function) or play(self, *arguments)

        return call

    def _cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self.version
        return 0

    def _cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = 10 + index
        return 0

    def _cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:  # noqa: N802
        name.value = b"NVIDIA L4 number %d"[: size - 1] % (device.value - 10)
        return 0

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        assert device.value >= 10
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def _cuGetErrorString(self, code: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"no CUDA-capable device is detected" if code == 100 else None
        return 0


def test_a_gpu_has_a_name_and_a_compute_capability() -> None:
    assert find_gpu(Driver()) == Gpu("NVIDIA L4 number 0", (8, 9))


def test_a_driver_that_is_too_old_is_not_asked_for_more() -> None:
    driver = Driver(version=12_080)
    with pytest.raises(BundleError, match=r"too old: it knows CUDA 12\.8, and 13\.0 is needed; update it to 580"):
        find_gpu(driver)
    assert driver.called == ["cuDriverGetVersion"]


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        (Driver(cuInit=100), r"gives no GPU: cuInit: no CUDA-capable device is detected \(100\)"),
        (Driver(cuInit=999), r"gives no GPU: cuInit: unknown error \(999\)"),
        (Driver(cuDeviceGetName=1), r"gives no GPU: cuDeviceGetName: unknown error \(1\)"),
        (Driver(cuDeviceGet=101), r"gives no GPU: cuDeviceGet: unknown error \(101\)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(driver: Driver, says: str) -> None:
    with pytest.raises(BundleError, match=says) as caught:
        find_gpu(driver)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "capability"), [("sm89", (8, 9)), ("SM120", (12, 0)), ("8.6", (8, 6)), ("sm_75", (7, 5))]
)
def test_a_capability_is_read_however_it_is_written(text: str, capability: tuple[int, int]) -> None:
    gpu = Gpu.of_capability(text)
    assert (gpu.capability, gpu.name) == (capability, gpu.sm)


@pytest.mark.parametrize("text", ["", "sm", "8", "sm8x", "sm12345", "8.9.1", "ampere"])
def test_what_is_no_capability_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no compute capability"):
        Gpu.of_capability(text)
